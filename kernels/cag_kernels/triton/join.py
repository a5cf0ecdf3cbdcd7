"""Joining of partial attentions inside the launch that makes them: the last program of a key/value head does it.

As `triton.merge`, without a launch of its own. Each program stores its part, all of its threads meet at a barrier, then
one of them adds 1 to the head's count: an atomic with release and acquire at the device's scope. Who finds all others
counted has all of their parts before it: stores come before the barrier, the barrier before the release, the release
before the acquire, that before a second barrier, and only then are the parts read, past the first-level cache. It puts
the count back to 0 for the next launch. A count serves one launch at a time: whoever owns it sees to that.
Accumulates in float32. Inlined; none is launched.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.prefixes import PagedTails
from cag_kernels.triton.numbers import rounded

MAX_ROWS = 8  # of a key/value head: one program reads all parts of them
TILE_ROWS = tl.constexpr(64)  # rows of parts that it asks for at once


class Join(NamedTuple):
    """What a launch does besides its own parts: further programs for the tails, and then the joining.

    out: `[num_queries, num_q_heads, head_dim]`. lse: float32 `[num_q_heads, num_queries]`.
    arrivals: int32, zeros, one for each key/value head at least; zeros again behind the launch.
    num_parts: of all, the tails' at the end. tail_splits: of each tail. Parts of the launch's own splits are the first.
    """

    out: Tensor
    lse: Tensor
    arrivals: Tensor
    num_parts: int
    tails: PagedTails | None
    tail_splits: int

    @property
    def num_programs(self) -> int:
        """For the tails, of a key/value head."""
        return 0 if self.tails is None else self.tails.lengths.shape[0] * self.tail_splits


@triton.jit
def is_last(arrivals, kv_head):
    """Whether all other programs of a key/value head have stored their parts; each asks once, behind its own stores."""
    tl.debug_barrier()
    before = tl.atomic_add(arrivals + kv_head, 1, sem="acq_rel", scope="gpu")
    return before == tl.num_programs(2) - 1


@triton.jit
def join_parts(
    part_out, part_lse, out, lse, arrivals, query_starts, num_parts, tail_part, num_sessions, num_queries, kv_head,
    group_size: tl.constexpr, head_dim: tl.constexpr, num_rows: tl.constexpr, has_tails: tl.constexpr,
):  # fmt: skip
    """Join the parts of the rows of a key/value head, `part_out [num_parts, num_q_heads, num_queries, head_dim]`."""
    tl.store(arrivals + kv_head, 0)
    rows, channels = tl.arange(0, num_rows), tl.arange(0, head_dim)
    is_row = rows < num_queries * group_size
    queries, heads = rows // group_size, kv_head * group_size + rows % group_size
    num_heads = tl.num_programs(1) * group_size
    end = num_parts + tl.zeros((num_rows,), tl.int32)
    if has_tails:  # nobody writes tails' parts of queries of no session
        end = tl.where(queries < tl.load(query_starts + num_sessions), num_parts, tail_part)
    block: tl.constexpr = TILE_ROWS // num_rows
    maximum = tl.full((num_rows,), float("-inf"), tl.float32)
    denominator = tl.zeros((num_rows,), tl.float32)
    total = tl.zeros((num_rows, head_dim), tl.float32)
    for first in range(0, num_parts, block):
        parts = first + tl.arange(0, block)
        places = (parts[:, None] * num_heads + heads[None, :]) * num_queries + queries[None, :]
        mask = is_row[None, :] & (parts[:, None] < end[None, :])
        sizes = tl.load(part_lse + places, mask=mask, other=float("-inf"), cache_modifier=".cg")
        outs = tl.load(
            part_out + places[:, :, None] * head_dim + channels[None, None, :], mask=mask[:, :, None], other=0.0,
            cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(maximum, tl.max(sizes, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights, factor = tl.exp(sizes - base[None, :]), tl.exp(maximum - base)
        total = total * factor[:, None] + tl.sum(outs * weights[:, :, None], 0)
        denominator = denominator * factor + tl.sum(weights, 0)
        maximum = higher
    divisor = tl.where(denominator > 0.0, denominator, 1.0)
    target = out + (queries * num_heads + heads)[:, None] * head_dim + channels[None, :]
    tl.store(target, rounded(total / divisor[:, None], out.dtype.element_ty), mask=is_row[:, None])
    size = tl.where(denominator > 0.0, maximum + tl.log(divisor), float("-inf"))
    tl.store(lse + heads * num_queries + queries, size, mask=is_row)
