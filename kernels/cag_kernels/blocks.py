"""Causal attention of many queries, as prefill has them, by compiled code for queries behind keys.

All queries lie behind what stands before the block, and meet it some rows at a time. The triangle of the block itself
is halved until little of it is left: its later half lies behind the earlier one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.cpu.attention.segments import RANGE_TOKENS, cpu_attention, cpu_attention_serves
from cag_kernels.cpu.processor import prefers_dots
from cag_kernels.flash import fused_attention
from cag_kernels.merge import merge_segments
from cag_kernels.tiled import tiled_attention

TRIANGLE_TOKENS = 64  # of a triangle that a library attends to whole
PIECE_ROWS = 512  # a key/value head that are served at once
_SCRATCH_NUMBERS = 1 << 23  # of sums under way, float32

Result = tuple[Tensor, Tensor]


def blocks_serve(query: Tensor, keys: Tensor) -> bool:
    """Whether `block_attention` takes these tensors and is quicker than a library's fused attention: queries in
    bfloat16, by products of pairs (docs/design/026-vectors-of-bfloat16.md)."""
    is_rounded = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return is_rounded and prefers_dots() and cpu_attention_serves(query, keys)


def block_attention(
    query: Tensor, keys: Tensor, values: Tensor, *, scale: float, offset: int, window: int | None = None
) -> Result:
    """As `reference.segment_attention_reference`, no cap; the queries end the segment or lie behind it. For what
    `blocks_serve`; `window` only where it hides a key from a query."""
    if offset >= keys.shape[1] - 1:
        return _behind(query, keys, values, scale, offset, window)
    assert offset + query.shape[1] == keys.shape[1], "queries must end the segment"
    triangle = _triangle(query, keys[:, offset:], values[:, offset:], scale, window)
    if offset == 0:
        return triangle
    before = _behind(query, keys[:, :offset], values[:, :offset], scale, offset, window)
    return _joined(before, triangle)


def _behind(query: Tensor, keys: Tensor, values: Tensor, scale: float, offset: int, window: int | None) -> Result:
    num_kv_heads, num_keys, head_dim = keys.shape
    row_numbers = num_kv_heads * -(-num_keys // RANGE_TOKENS) * head_dim
    rows = min(PIECE_ROWS, max(TRIANGLE_TOKENS, _SCRATCH_NUMBERS // row_numbers))
    size = max(1, rows * num_kv_heads // query.shape[0])
    parts = []
    for first in range(0, query.shape[1], size):
        piece = query[:, first : first + size]
        parts.append(cpu_attention(piece, keys, values, scale=scale, offset=offset + first, window=window))
    return _side_by_side(parts)


def _triangle(query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Result:
    num_queries = query.shape[1]
    if num_queries <= TRIANGLE_TOKENS:
        if window is not None and num_queries > window:
            return tiled_attention(query, keys, values, scale=scale, offset=0, window=window)
        return fused_attention(query, keys, values, scale=scale, offset=0)
    half = num_queries // 2
    earlier, later = slice(half), slice(half, None)
    first = _triangle(query[:, earlier], keys[:, earlier], values[:, earlier], scale, window)
    behind = _behind(query[:, later], keys[:, earlier], values[:, earlier], scale, half, window)
    last = _triangle(query[:, later], keys[:, later], values[:, later], scale, window)
    return _side_by_side([first, _joined(behind, last)])


def _joined(first: Result, second: Result) -> Result:
    return merge_segments([first, second]), torch.logaddexp(first[1], second[1])


def _side_by_side(parts: list[Result]) -> Result:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)
