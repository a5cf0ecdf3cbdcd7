"""Segment attention through fused kernels that return the log-sum-exp: torch's own (CPU and CUDA) and `flash-attn`.

The query heads that share a key/value head are stacked as rows, so the keys are read once a group and nothing is
repeated. That is possible where every query sees every key; the triangle at the end of a segment is done apart, on keys
repeated for the few tokens of the triangle only.

`flash-attn` itself is not yet run on a GPU.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from cag_kernels.merge import merge_segments

MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8  # of kernels on a GPU


def fused_serves(query: Tensor) -> bool:
    """Whether a fused kernel takes queries of this type and head_dim: on a GPU 16 bits and not all sizes."""
    if not query.is_cuda:
        return True
    head_dim = query.shape[2]
    return query.itemsize == 2 and head_dim % HEAD_DIM_MULTIPLE == 0 and head_dim <= MAX_HEAD_DIM


@cache
def has_flash_attn() -> bool:
    """Whether the `flash-attn` package can be imported on this machine."""
    return importlib.util.find_spec("flash_attn") is not None


def fused_attention(query: Tensor, keys: Tensor, values: Tensor, *, scale: float, offset: int) -> tuple[Tensor, Tensor]:
    """As `reference.segment_attention_reference`, no window, no cap; the queries end the segment or lie behind it.

    Keys and values in another dtype than the query's are converted whole: a scratch of one layer, for blocks of many
    queries, where it costs little against the products.
    """
    num_queries, num_keys = query.shape[1], keys.shape[1]

    def sides(tokens: slice) -> tuple[Tensor, Tensor]:
        converted = keys[:, tokens].to(query.dtype)
        return converted, converted if values is keys else values[:, tokens].to(query.dtype)

    if offset >= num_keys - 1:
        return _unmasked(query, *sides(slice(None)), scale)
    assert offset + num_queries == num_keys, "queries must end the segment"
    triangle = _triangle(query, *sides(slice(offset, None)), scale)
    if offset == 0:
        return triangle
    before = _unmasked(query, *sides(slice(offset)), scale)
    return merge_segments([before, triangle]), torch.logaddexp(before[1], triangle[1])


def _unmasked(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    rows = query.reshape(keys.shape[0], -1, query.shape[2])
    out, lse = _kernel(rows, keys, values, scale, causal=False)
    return out.reshape(query.shape).float(), lse.reshape(query.shape[:2]).float()


def _triangle(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    group = query.shape[0] // keys.shape[0]
    keys = keys.repeat_interleave(group, dim=0)
    values = values.repeat_interleave(group, dim=0)
    out, lse = _kernel(query, keys, values, scale, causal=True)
    return out.float(), lse.float()


def _kernel(query: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """One fused call on `[heads, tokens, head_dim]`, equal head counts; `(out, lse)` of the same heads."""
    if query.device.type == "cpu":
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = op(query[None], keys[None], values[None], 0.0, causal, scale=scale)
        return out[0], lse.reshape(query.shape[:2])
    if has_flash_attn():
        from flash_attn import flash_attn_with_kvcache

        parts = [tensor.transpose(0, 1)[None] for tensor in (query, keys, values)]  # [1, tokens, heads, head_dim]
        out, lse = flash_attn_with_kvcache(*parts, softmax_scale=scale, causal=causal, return_softmax_lse=True)
        return out[0].transpose(0, 1), lse[0]
    result = torch.ops.aten._scaled_dot_product_flash_attention(
        query[None], keys[None], values[None], 0.0, causal, False, scale=scale
    )
    return result[0][0], result[1][0]
