"""Joining the attention of several key segments into the attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_segments(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Join `(out, lse)` of disjoint key segments: `sum_s exp(lse_s - lse) out_s` with `lse = log sum_s exp(lse_s)`.

    Args:
        parts: for each segment `out [num_q_heads, num_queries, head_dim]` and `lse [num_q_heads, num_queries]`, float32
            or float64. Each query must see a key in at least one segment.

    Returns:
        `[num_q_heads, num_queries, head_dim]` in the dtype of the parts; a single part is returned as it is.

    Source: the log-sum-exp merge of FlashDecoding and Cascade inference, https://flashinfer.ai/2024/02/02/cascade-inference.html
    """
    if len(parts) == 1:
        return parts[0][0]
    if len(parts) == 2:
        (first, first_lse), (second, second_lse) = parts
        return torch.lerp(first, second, torch.sigmoid(second_lse - first_lse)[..., None])
    total = torch.logsumexp(torch.stack([lse for _, lse in parts]), dim=0)
    merged = torch.zeros_like(parts[0][0])
    for out, lse in parts:
        merged.addcmul_(out, torch.exp(lse - total)[..., None])
    return merged
