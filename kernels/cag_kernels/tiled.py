"""Segment attention in plain torch, one tile of keys at a time with an online softmax.

Runs on every device and for every mask. A tile is widened to float32 in a small scratch that stays in the processor's
cache, so a prefix held in bfloat16 is read from memory once and never copied as a whole.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from cag_kernels.reference import visibility

TILE_TOKENS = 1024  # of 512, 1024 and 2048 the quickest on an AVX-512 CPU; see docs/log.md
_WIDE_HEAD_DIM = 256  # heads above it, as latents have, are multiplied in parts
_PART_CHANNELS = 144


def tiled_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    offset: int,
    window: int | None = None,
    softcap: float | None = None,
    tile_tokens: int = TILE_TOKENS,
) -> tuple[Tensor, Tensor]:
    """As `reference.segment_attention_reference`, in memory of one tile. Keys that are the values are widened once.

    Accumulates in float32 (float64 for float64 input).
    """
    num_queries, head_dim = query.shape[1:]
    num_keys = keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = (query.to(dtype) * scale).reshape(keys.shape[0], -1, head_dim)  # query heads of a group become rows
    accumulator = _Accumulator(rows)
    first = 0 if window is None else max(0, offset - window + 1)
    last = min(num_keys, offset + num_queries)
    for start in range(first - first % tile_tokens, last, tile_tokens):
        tile = slice(start, min(start + tile_tokens, last))
        wide = keys[:, tile].to(dtype)
        scores = scores_of(rows, wide)  # [num_kv_heads, group * num_queries, tile]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if tile.stop - 1 > offset or (window is not None and start <= offset + num_queries - 1 - window):
            hidden = _hidden_from_rows(
                rows.shape[1], num_queries, tile.stop - start, offset - start, window, query.device
            )
            scores = scores.masked_fill_(hidden, -torch.inf)
        accumulator.add(scores, wide if values is keys else values[:, tile].to(dtype))
    out, lse = accumulator.result()
    return out.view(query.shape), lse.view(query.shape[:2])


def scores_of(rows: Tensor, keys: Tensor) -> Tensor:
    """`rows @ keys.mT`. Of wide heads some channels after the other: one long sum, as a library may take it, rounds
    each product against all before it."""
    head_dim = rows.shape[-1]
    size = _PART_CHANNELS if head_dim > _WIDE_HEAD_DIM else head_dim
    scores = rows[..., :size] @ keys[..., :size].mT
    for first in range(size, head_dim, size):
        part = slice(first, first + size)
        scores += rows[..., part] @ keys[..., part].mT
    return scores


@lru_cache(maxsize=32)
def _hidden_from_rows(
    num_rows: int, num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device
) -> Tensor:
    """Which key each row must not see, `[num_rows, num_keys]` bool; the same in all layers of a forward, so kept."""
    return ~visibility(num_queries, num_keys, offset, window, device).repeat(num_rows // num_queries, 1)


class _Accumulator:
    """Running maximum, denominator and weighted sum of an online softmax; each `[num_kv_heads, rows, 1 or head_dim]`.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self._lowest = torch.finfo(rows.dtype).min
        self._maximum: Tensor | None = None

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in a tile. `scores` is overwritten."""
        maximum = scores.amax(dim=-1, keepdim=True).clamp_min_(self._lowest)  # -inf where a row sees nothing
        if self._maximum is None:
            weights = scores.sub_(maximum).exp_()
            self._denominator = weights.sum(dim=-1, keepdim=True)
            self._weighted = weights @ values
        else:
            maximum = torch.maximum(self._maximum, maximum)
            correction = (self._maximum - maximum).exp_()
            weights = scores.sub_(maximum).exp_()
            self._denominator.mul_(correction).add_(weights.sum(dim=-1, keepdim=True))
            self._weighted.mul_(correction).baddbmm_(weights, values)
        self._maximum = maximum

    def result(self) -> tuple[Tensor, Tensor]:
        """`(out, lse)`; rows that saw no key are zero and `-inf`."""
        if self._maximum is None:
            return torch.zeros_like(self._rows), self._rows.new_full((*self._rows.shape[:2], 1), -torch.inf)
        lse = self._maximum + self._denominator.log()
        return self._weighted / self._denominator.clamp_min(torch.finfo(lse.dtype).tiny), lse
