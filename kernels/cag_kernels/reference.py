"""The specification of segment attention: the shortest code that is right, whole score matrix in memory.

Every other path of this package is tested against this one evaluated in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visibility(num_queries: int, num_keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Which key each query sees, `[num_queries, num_keys]` bool.

    Query `i` stands at position `offset + i`, key `j` at position `j`. A query sees keys up to its own position, and
    with a `window` only the last `window` of them, its own position included.
    """
    query_positions = torch.arange(offset, offset + num_queries, device=device)[:, None]
    key_positions = torch.arange(num_keys, device=device)[None, :]
    visible = key_positions <= query_positions
    if window is not None:
        visible &= query_positions - key_positions < window
    return visible


def segment_attention_reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scale: float,
    offset: int,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a few queries over one segment of keys and values, with the log-sum-exp of each row.

    `out[h, i] = sum_j softmax_j(s[h, i, j]) values[h // group, j]`, `s = scale * query . key`, capped to
    `softcap * tanh(s / softcap)` where a cap is given, over the keys that `visibility` lets query `i` see.

    Args:
        query: `[num_q_heads, num_queries, head_dim]`.
        keys: `[num_kv_heads, num_keys, head_dim]`; `num_q_heads` is a multiple of `num_kv_heads`.
        values: as `keys`.
        scale: factor of the scores before the softmax.
        offset: position of the first query, counted from the segment's first key.
        window: number of keys a query sees at most, or None for all.
        softcap: cap of the scores (Gemma 2), or None.

    Returns:
        `out [num_q_heads, num_queries, head_dim]` and `lse [num_q_heads, num_queries]`, both in float32 (float64 for
        float64 input). A query that sees no key gets zeros and `-inf`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[0] // keys.shape[0]
    keys = keys.to(dtype).repeat_interleave(group, dim=0)
    values = values.to(dtype).repeat_interleave(group, dim=0)
    scores = query.to(dtype) @ keys.transpose(1, 2) * scale  # [num_q_heads, num_queries, num_keys]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visibility(query.shape[1], keys.shape[1], offset, window, query.device)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.clamp_min(torch.finfo(dtype).min)[..., None])
    return weights @ values, lse
