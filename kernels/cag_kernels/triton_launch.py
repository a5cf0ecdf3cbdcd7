"""One batched attention on the device: partial results of the prefix's splits and of the tails, then one merge.

A query in, `(out, lse)` out; the checks are in `prefix`. Nothing here waits for the device, so a call can be part of a
CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.prefixes import PagedTails, Prefixes, pieces_of
from cag_kernels.triton_merge import merge_parts
from cag_kernels.triton_paged import attend_tails_parts, num_tail_splits
from cag_kernels.triton_prefix import attend_prefix_parts, plan_splits


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
) -> tuple[Tensor, Tensor]:
    """Attention over a prefix, in any number of pieces, and over paged tails; `out` in `dtype`, `lse` in float32.

    Arguments as in `prefix_reference`; `num_processors` decides how finely the prefix is split.
    """
    num_q_heads, num_queries, head_dim = query.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    pieces = pieces_of(prefix)
    plans = [
        plan_splits(piece, num_q_heads // piece[0].shape[0] * num_queries, head_dim, num_processors, dtype=query.dtype)
        for piece in pieces
    ]
    num_shared = sum(plan.num_splits for plan in plans)
    num_own = 0 if tails is None else num_tail_splits(tails)
    size = (num_shared + num_own, num_q_heads, num_queries)
    part_out = torch.empty((*size, head_dim), dtype=torch.float32, device=query.device)
    part_lse = torch.empty(size, dtype=torch.float32, device=query.device)
    part_lse[num_shared:] = -torch.inf  # tails do not write queries of no session
    first = 0
    for piece, plan in zip(pieces, plans, strict=True):
        parts = slice(first, first + plan.num_splits)
        if num_queries:
            attend_prefix_parts(
                query, piece, part_out[parts], part_lse[parts], plan,
                scale=scale, positions=positions, window=window, softcap=softcap,
            )  # fmt: skip
        positions = None if positions is None else positions - piece.num_tokens
        first = parts.stop
    if tails is not None and num_queries:
        own = part_out[num_shared:], part_lse[num_shared:]
        attend_tails_parts(query, tails, *own, scale=scale, window=window, softcap=softcap)
    return merge_parts(part_out, part_lse, dtype)
