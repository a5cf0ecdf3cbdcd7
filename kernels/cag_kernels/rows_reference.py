"""What the steps of `cpu_rows` mean, in plain torch and any floating dtype: the specification that tests compare with.

Keys and values are tensors here, in the dtype that they are kept in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.merge import merge_segments
from cag_kernels.reference import segment_attention_reference


def add_and_norm_reference(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`(hidden + update, its RMS norm times weight)`, `[num_rows, size]` each."""
    added = hidden + update
    return added, head_norm_reference(added, weight, epsilon)


def head_norm_reference(heads: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last axis, times `weight`."""
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + epsilon) * weight


def rotate_reference(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoPE on `[num_heads, num_rows, head_dim]` whose pairs stand half a head apart; cosines, sines `[num_rows,
    head_dim]`."""
    low, high = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-high, low], dim=-1) * sines


def attend_and_merge_reference(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, parts: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Causal attention of the last tokens of a tail `[num_kv_heads, num_tokens, head_dim]`, joined with `parts`.

    Returns `[num_rows, num_q_heads * head_dim]`.
    """
    offset = keys.shape[1] - query.shape[1]
    own = segment_attention_reference(query, keys, values, scale=scale, offset=offset)
    return merge_segments([*parts, own]).transpose(0, 1).flatten(1)


def gate_reference(projected: Tensor) -> Tensor:
    """`silu(left) * right` of the two halves of the last axis."""
    left, right = projected.chunk(2, dim=-1)
    return torch.nn.functional.silu(left) * right
