"""Segment attention in plain torch, one tile of keys at a time with an online softmax.

Runs on every device and for every mask. A tile is widened to float32 in a small scratch that stays in the processor's
cache, so a prefix held in bfloat16 is read from memory once and never copied as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.reference import visibility

TILE_TOKENS = 1024  # of 512, 1024 and 2048 the quickest on an AVX-512 CPU; see docs/log.md


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
    """As `reference.segment_attention_reference`, in memory of one tile.

    Accumulates in float32 (float64 for float64 input).
    """
    num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys, _ = keys.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = (query.to(dtype) * scale).reshape(num_kv_heads, -1, head_dim)  # query heads of a group become rows
    accumulator = _Accumulator(rows)
    first = 0 if window is None else max(0, offset - window + 1)
    last = min(num_keys, offset + num_queries)
    for start in range(first - first % tile_tokens, last, tile_tokens):
        tile = slice(start, min(start + tile_tokens, last))
        scores = rows @ keys[:, tile].to(dtype).transpose(1, 2)  # [num_kv_heads, group * num_queries, tile]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if tile.stop - 1 > offset or (window is not None and start <= offset + num_queries - 1 - window):
            visible = visibility(num_queries, tile.stop - start, offset - start, window, query.device)
            scores = scores.masked_fill_(~visible.repeat(rows.shape[1] // num_queries, 1), -torch.inf)
        accumulator.add(scores, values[:, tile].to(dtype))
    out, lse = accumulator.result()
    return out.view(num_q_heads, num_queries, head_dim), lse.view(num_q_heads, num_queries)


class _Accumulator:
    """Running maximum, denominator and weighted sum of an online softmax; each `[num_kv_heads, rows, 1 or head_dim]`.

    Source: Milakov and Gimelshein, Online normalizer calculation for softmax, arXiv:1805.02867.
    """

    def __init__(self, rows: Tensor) -> None:
        self.maximum = rows.new_full((*rows.shape[:2], 1), torch.finfo(rows.dtype).min)
        self.denominator = rows.new_zeros((*rows.shape[:2], 1))
        self.weighted = torch.zeros_like(rows)

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in a tile. `scores` is overwritten."""
        maximum = torch.maximum(self.maximum, scores.amax(dim=-1, keepdim=True))
        correction = (self.maximum - maximum).exp_()
        weights = scores.sub_(maximum).exp_()
        self.denominator.mul_(correction).add_(weights.sum(dim=-1, keepdim=True))
        self.weighted.mul_(correction).baddbmm_(weights, values)
        self.maximum = maximum

    def result(self) -> tuple[Tensor, Tensor]:
        """`(out, lse)`; rows that saw no key are zero and `-inf`."""
        lse = self.maximum + self.denominator.log()
        return self.weighted / self.denominator.clamp_min(torch.finfo(self.weighted.dtype).tiny), lse
