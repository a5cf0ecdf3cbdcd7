"""One batched attention on the device: partial results of the prefix's splits and of the tails, then one merge.

A query in, `(out, lse)` out; the checks are in `prefix`. Nothing here waits for the device, so a call can be part of a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cag_kernels.prefixes import PagedTails, Prefix, Prefixes, pieces_of
from cag_kernels.triton.join import MAX_ROWS, Join
from cag_kernels.triton.launch_ways import launch_ways
from cag_kernels.triton.merge import merge_parts
from cag_kernels.triton.paged import SPLIT_TOKENS, attend_tails_parts, num_tail_splits
from cag_kernels.triton.prefix import JOINED_SPLIT_TOKENS, SplitPlan, attend_prefix_parts, plan_splits

MAX_TAIL_PROGRAMS = 4  # of a key/value head in a launch that joins: they take the place of splits of the prefix


def attend(
    query: Tensor,
    prefix: Prefixes | None,
    tails: PagedTails | None,
    num_processors: int,
    *,
    scale: float,
    positions: Tensor | None,
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype = torch.float32,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a prefix, in any number of pieces, and over paged tails; `out` in `dtype`, `lse` in float32.

    Arguments as in `prefix_reference`; `num_processors` decides how finely the prefix is split. `arrivals`: memory with
    which the launch of a first piece in codes may take short tails along and join all parts; see `triton.join.Join`.
    """
    query = query if query.stride(2) == 1 else query.contiguous()
    num_q_heads, num_queries, head_dim = query.shape
    pieces = pieces_of(prefix)
    joins = num_queries > 0 and arrivals is not None and _can_join(query, pieces, tails, num_processors)
    num_own = 0 if tails is None else num_tail_splits(tails, JOINED_SPLIT_TOKENS if joins else SPLIT_TOKENS)
    num_others = tails.lengths.shape[0] * num_own if joins and tails is not None else 0
    plans = [_plan(query, piece, num_processors, num_others) for piece in pieces]
    size = (sum(plan.num_splits for plan in plans) + num_own, num_q_heads, num_queries)
    part_out = torch.empty((*size, head_dim), dtype=torch.float32, device=query.device)
    part_lse = torch.empty(size, dtype=torch.float32, device=query.device)
    masks: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    join = None
    if joins:
        assert arrivals is not None
        out = torch.empty((num_queries, num_q_heads, head_dim), dtype=dtype, device=query.device)
        join = Join(out, torch.empty_like(part_lse[0]), arrivals, size[0], tails, num_own)
    first = size[0] - num_own
    for place in reversed(range(len(pieces) if num_queries else 0)):  # the one that joins is the last
        piece, plan = pieces[place], plans[place]
        first -= plan.num_splits
        before = sum(other.num_tokens for other in pieces[:place])
        attend_prefix_parts(
            query, piece, part_out[first:], part_lse[first:], plan, **masks,
            positions=None if positions is None else positions - before, join=None if place else join,
        )  # fmt: skip
    if join is not None:
        return join.out.transpose(0, 1), join.lse
    if tails is not None and num_queries:
        own = part_out[size[0] - num_own :], part_lse[size[0] - num_own :]
        attend_tails_parts(query, tails, *own, **masks)
    return merge_parts(part_out, part_lse, dtype, tails, num_own)


def _plan(query: Tensor, piece: Prefix, num_processors: int, num_others: int = 0) -> SplitPlan:
    num_rows = query.shape[0] // piece[0].shape[0] * query.shape[1]
    return plan_splits(piece, num_rows, query.shape[2], num_processors, dtype=query.dtype, num_others=num_others)


def _can_join(query: Tensor, pieces: Sequence[Prefix], tails: PagedTails | None, num_processors: int) -> bool:
    """Whether the first piece is one of few rows over codes, and the tails are few and short."""
    if not launch_ways().joins or not pieces or not _plan(query, pieces[0], num_processors).warp_tokens:
        return False
    programs = 0 if tails is None else tails.lengths.shape[0] * num_tail_splits(tails, JOINED_SPLIT_TOKENS)
    return query.shape[0] // pieces[0][0].shape[0] * query.shape[1] <= MAX_ROWS and programs <= MAX_TAIL_PROGRAMS
