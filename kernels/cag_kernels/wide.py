"""Attention over paged tails in plain torch for heads that the GPU kernels do not take: wide ones, as latents are.

A fixed number of operations for sizes that the host knows, and nothing waits for the device, so that it can be recorded
in a CUDA graph. `prefix_reference.paged_attention_reference` says what it means.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.prefixes import PagedTails
from cag_kernels.tiled import scores_of

GATHERED_NUMBERS = 1 << 26  # of keys that are taken out of their pages at once


def wide_paged_attention(
    query: Tensor, tails: PagedTails, *, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """As `prefix_reference.paged_attention_reference`; accumulates in float32 (float64 for float64 queries)."""
    num_heads, num_rows, head_dim = query.shape
    num_sessions, num_kv_heads = len(tails.lengths), tails.keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    starts = tails.query_starts.long()
    rows = torch.arange(num_rows, device=query.device)
    session = (torch.searchsorted(starts, rows, right=True) - 1).clamp(0, num_sessions - 1)
    asked_at = starts[:-1, None] + torch.arange(tails.max_queries, device=query.device)  # [num_sessions, max_queries]
    places = (tails.lengths - starts.diff())[:, None] + (asked_at - starts[:-1, None])  # in their tails
    asked = (query.to(dtype) * scale)[:, asked_at.clamp(max=num_rows - 1)]  # [heads, sessions, max_queries, head_dim]
    asked = asked.view(num_kv_heads, -1, *asked.shape[1:]).permute(2, 0, 1, 3, 4).flatten(2, 3)
    group = num_heads // num_kv_heads
    step = max(1, GATHERED_NUMBERS // (tails.pages.shape[1] * tails.keys[0].numel()))
    parts = [
        _attend_sessions(asked[part], tails, part, places[part].repeat(1, group), window, softcap)
        for part in (slice(first, first + step) for first in range(0, num_sessions, step))
    ]
    out, lse = (torch.cat(both) for both in zip(*parts, strict=True))  # [sessions, kv heads, group * max_queries, ...]
    own = (rows - starts[session]).clamp(0, tails.max_queries - 1)
    out = out.view(num_sessions, num_heads, tails.max_queries, head_dim)[session, :, own]
    lse = lse.view(num_sessions, num_heads, tails.max_queries)[session, :, own]
    return out.transpose(0, 1), lse.T


def _attend_sessions(
    rows: Tensor, tails: PagedTails, part: slice, places: Tensor, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Some sessions' `rows` `[num_sessions, num_kv_heads, num_rows, head_dim]`, which stand at `places`."""
    keys = _gathered(tails.keys, tails, part, rows.dtype)
    values = keys if tails.values is tails.keys else _gathered(tails.values, tails, part, rows.dtype)
    scores = scores_of(rows, keys)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    behind = places[:, None, :, None] - torch.arange(keys.shape[2], device=rows.device)
    hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
    scores = scores.masked_fill_(hidden, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(rows.dtype).min)[..., None])
    return weights @ values, lse


def _gathered(side: Tensor, tails: PagedTails, part: slice, dtype: torch.dtype) -> Tensor:
    """`[num_sessions, num_kv_heads, max_pages * page_tokens, head_dim]` out of the pool, with zeros for what is behind
    each tail: no weight makes zero of what may lie there."""
    found = side[tails.pages[part].long().clamp(0, len(side) - 1)].transpose(1, 2).flatten(2, 3).to(dtype)
    behind = torch.arange(found.shape[2], device=side.device) >= tails.lengths[part, None]
    return found.masked_fill_(behind[:, None, :, None], 0)
