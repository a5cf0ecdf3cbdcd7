"""Triton kernel that joins partial attentions: the device's `merge.merge_segments`, with the log-sum-exp of the whole.

`lse = log sum_p exp(lse_p)`, `out = sum_p exp(lse_p - lse) out_p`. Grid: `(query heads, queries)`, one row each.
Accumulates in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.prefixes import PagedTails
from cag_kernels.triton.numbers import rounded
from cag_kernels.triton.overlap import launch_options, wait_for_launch


@triton.jit
def merge(
    part_out, part_lse, out, lse, query_starts, num_parts, tail_part, num_sessions,
    head_dim: tl.constexpr, block_dim: tl.constexpr, block_parts: tl.constexpr, has_tails: tl.constexpr,
    overlaps: tl.constexpr,
):  # fmt: skip
    """One row of all parts; `part_out [num_parts, rows, head_dim]`, `part_lse [num_parts, rows]`, float32."""
    wait_for_launch(overlaps)
    if has_tails:  # nobody writes tails' parts of queries of no session
        num_parts = tl.where(tl.program_id(1) < tl.load(query_starts + num_sessions), num_parts, tail_part)
    row = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    num_rows = tl.num_programs(0) * tl.num_programs(1)
    channels = tl.arange(0, block_dim)
    maximum = tl.full((), float("-inf"), tl.float32)
    denominator = tl.zeros((), tl.float32)
    total = tl.zeros((block_dim,), tl.float32)
    for first in range(0, num_parts, block_parts):
        parts = first + tl.arange(0, block_parts)
        is_part = parts < num_parts
        places = (parts * num_rows + row).to(tl.int64)
        sizes = tl.load(part_lse + places, mask=is_part, other=float("-inf"))
        higher = tl.maximum(maximum, tl.max(sizes, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, factor = tl.exp(sizes - base), tl.exp(maximum - base)
        mask = is_part[:, None] & (channels < head_dim)[None, :]
        outs = tl.load(part_out + places[:, None] * head_dim + channels[None, :], mask=mask, other=0.0)
        outs = tl.where((weights > 0.0)[:, None], outs, 0.0)  # others may never have been written
        total = total * factor + tl.sum(outs * weights[:, None], 0)
        denominator = denominator * factor + tl.sum(weights, 0)
        maximum = higher
    divisor = tl.where(denominator > 0.0, denominator, 1.0)
    dtype: tl.constexpr = out.dtype.element_ty
    target = out + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * head_dim + channels
    tl.store(target, rounded(total / divisor, dtype), mask=channels < head_dim)
    tl.store(lse + row, tl.where(denominator > 0.0, maximum + tl.log(divisor), float("-inf")))


def merge_parts(
    part_out: Tensor, part_lse: Tensor, dtype: torch.dtype, tails: PagedTails | None = None, num_own: int = 0
) -> tuple[Tensor, Tensor]:
    """`(out, lse)` of `part_out [num_parts, num_q_heads, num_queries, head_dim]` and `part_lse` without the last axis.

    The last `num_own` parts are those of `tails`. `out` in `dtype`, in memory the heads of a query side by side, as a
    product wants them; `lse` in float32.
    """
    num_parts, num_q_heads, num_queries, head_dim = part_out.shape
    out = torch.empty((num_queries, num_q_heads, head_dim), dtype=dtype, device=part_out.device)
    lse = torch.empty(part_lse.shape[1:], dtype=torch.float32, device=part_out.device)
    starts, num_sessions = (part_lse, 0) if tails is None else (tails.query_starts, tails.lengths.shape[0])
    if num_queries:
        merge[(num_q_heads, num_queries)](
            part_out, part_lse, out, lse, starts, num_parts, num_parts - num_own, num_sessions,
            head_dim=head_dim, block_dim=triton.next_power_of_2(head_dim),
            block_parts=min(64, triton.next_power_of_2(num_parts)), has_tails=tails is not None, num_warps=4,
            **launch_options(part_out.device),
        )  # fmt: skip
    return out.transpose(0, 1), lse
