"""Triton kernel of `prefix.prefix_attention`: few rows of query over a long prefix, split over its tokens.

`s = scale * query . key`, `out = sum_t exp(s_t) value_t / sum_t exp(s_t)`, `lse = log sum_t exp(s_t)` over the tokens
of one split; `triton.merge` joins the splits.
Grid: `(row blocks, key/value heads, splits)`. All queries of the query heads that share a key/value head are its rows;
row blocks that read the same tile run side by side, so that the later ones find it in the second-level cache.
Accumulates in float32.
Source: flash-decoding, https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.prefixes import Prefix, QuantizedPrefix, code_bits
from cag_kernels.triton.codes import take_codes
from cag_kernels.triton.few import attend_few
from cag_kernels.triton.join import Join
from cag_kernels.triton.launch_ways import launch_ways
from cag_kernels.triton.many import attend_many
from cag_kernels.triton.overlap import launch_options, wait_for_launch
from cag_kernels.triton.tiles import BLOCK_TOKENS, halves, program_rows, store_part, take_plain, tile_tokens

MIN_SPLIT_TOKENS = 256  # below, a partial result costs as much as the tokens that it saves
FEW_ROWS, FEW_WARPS = 16, 4  # of `triton.few`
JOINED_SPLIT_TOKENS = 256  # of a tail that a launch of few rows over codes takes along
WARP_TOKENS = {8: 32, 16: 16}  # rows of its blocks -> tokens that a warp takes at once: what its registers hold
MAX_FOLDED_ROWS = 32  # up to which scaling the rows is less work than dequantizing a tile of 64 tokens


@triton.jit
def attend_prefix(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr, block_rows: tl.constexpr,
    block_tokens: tl.constexpr, group_tokens: tl.constexpr, group_channels: tl.constexpr, key_bits: tl.constexpr,
    value_bits: tl.constexpr, has_window: tl.constexpr, has_cap: tl.constexpr, folded: tl.constexpr,
    overlaps: tl.constexpr,
):  # fmt: skip
    """One split of the tokens for a block of rows of a key/value head; the first split takes the exact tokens too."""
    wait_for_launch(overlaps)
    kv_head, split, is_row, row_query, row_places, first, last, hidden = program_rows(
        query, positions, window, num_tokens, num_queries, split_tokens, query_head_stride, query_stride, group_size,
        block_rows, has_window,
    )  # fmt: skip
    low, high = halves(row_query, is_row, half, block_half, 16)
    if has_window:
        first = tl.maximum(first, (tl.min(hidden) + 1) // block_tokens * block_tokens)
    maximum = tl.full((block_rows,), float("-inf"), tl.float32)
    denominator = tl.zeros((block_rows,), tl.float32)
    low_sum, high_sum = tl.zeros(low.shape, tl.float32), tl.zeros(low.shape, tl.float32)
    places = tl.arange(0, block_tokens)
    for start in tl.range(0, tl.where(split == 0, num_exact, 0), block_tokens, num_stages=1):
        tokens = start + places
        is_token, at = tokens < num_exact, (kv_head * num_exact + tokens) * (2 * half)
        visible = is_token[None, :] & (tokens[None, :] > hidden[:, None])
        maximum, denominator, low_sum, high_sum = take_plain(
            low, high, exact_keys + at, exact_values + at, is_token, visible, scale, softcap,
            maximum, denominator, low_sum, high_sum, half, has_cap,
        )  # fmt: skip
    for start in range(first, last, block_tokens):
        tokens = start + places
        is_token = tokens < last
        visible = (is_token & (tokens >= num_exact))[None, :]
        if has_window:
            visible = visible & (tokens[None, :] > hidden[:, None])
        tile_keys = keys + kv_head * key_head_stride + tokens * key_stride
        tile_values = values + kv_head * value_head_stride + tokens * value_stride
        if key_bits == 16:
            maximum, denominator, low_sum, high_sum = take_plain(
                low, high, tile_keys, tile_values, is_token, visible, scale, softcap,
                maximum, denominator, low_sum, high_sum, half, has_cap,
            )  # fmt: skip
        else:
            group = (kv_head * num_groups + start // group_tokens) * (2 * half)
            at = (kv_head * num_tokens + tokens) * ((2 * half + group_channels - 1) // group_channels)
            maximum, denominator, low_sum, high_sum = take_codes(
                low, high, tile_keys, key_scales + group, key_offsets + group, tile_values, value_scales + at,
                value_offsets + at, is_token, visible, scale, softcap, maximum, denominator, low_sum, high_sum,
                half, group_channels, key_bits, value_bits, has_cap, folded,
            )  # fmt: skip
    store_part(part_out, part_lse, row_places, is_row, maximum, denominator, low_sum, high_sum, half, block_half)


class SplitPlan(NamedTuple):
    """How a launch is cut; it follows from sizes and the number of processors alone."""

    block_rows: int
    row_blocks: int
    block_tokens: int
    split_tokens: int
    num_splits: int  # a last one for the exact tokens included, if they have one of their own
    num_warps: int
    num_stages: int = 3
    warp_tokens: int = 0  # of a warp, in `triton.few`'s kernel, which serves if this is not 0
    tiles_ahead: int = 0  # of which `triton.many`'s kernel asks for the values' scales
    max_registers: int | None = None
    is_many: bool = False  # `triton.many`'s kernel serves
    touches: bool = False  # of `triton.few`: a program asks for its next tile while it computes one


def plan_splits(
    prefix: Prefix,
    num_rows: int,
    head_dim: int,
    num_processors: int,
    programs_a_processor: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    num_others: int = 0,
) -> SplitPlan:
    """Cut `num_rows` rows a key/value head of queries of `dtype`, and the tokens: all processors work, partial results
    stay few. `num_others`: further programs of a head in the launch of few rows over codes."""
    if isinstance(prefix, QuantizedPrefix) and dtype == torch.bfloat16:
        if num_rows <= FEW_ROWS and _few_serves(prefix, head_dim):
            return _plan_few(prefix, num_rows, num_processors, programs_a_processor, num_others)
        return _plan_many(prefix, num_rows, head_dim, num_processors, programs_a_processor)
    most_rows = (128 if head_dim <= 128 else 64) // (2 if dtype == torch.float32 else 1)
    block_rows = min(most_rows, max(16, triton.next_power_of_2(num_rows)))
    row_blocks = triton.cdiv(num_rows, block_rows)
    programs_at_once = num_processors * (programs_a_processor or {128: 1, 64: 2}.get(block_rows, 4))
    block_tokens = _block_tokens(prefix, dtype, head_dim)
    splits = _split(prefix, programs_at_once // (prefix[0].shape[0] * row_blocks), block_tokens)
    num_warps = 8 if head_dim > 128 or block_rows == most_rows else 4
    return SplitPlan(block_rows, row_blocks, block_tokens, *splits, num_warps)


def _block_tokens(prefix: Prefix, dtype: torch.dtype, head_dim: int) -> int:
    """Tokens of a tile, which lies within one group."""
    tokens = tile_tokens(dtype, prefix[0].dtype, head_dim)
    return math.gcd(prefix.group_tokens, tokens) if isinstance(prefix, QuantizedPrefix) else tokens


def _split(prefix: Prefix, wanted: int, block_tokens: int) -> tuple[int, int]:
    """Tokens of a split, whole blocks, and the number of splits, at most `wanted`."""
    most = max(1, min(wanted, prefix.num_tokens // MIN_SPLIT_TOKENS))
    split_tokens = max(1, triton.cdiv(prefix.num_tokens, most * block_tokens)) * block_tokens
    return split_tokens, max(1, triton.cdiv(prefix.num_tokens, split_tokens))


def _few_serves(prefix: QuantizedPrefix, head_dim: int) -> bool:
    """Whether `triton.few` takes this prefix."""
    if head_dim not in (64, 128) or prefix.group_tokens % max(WARP_TOKENS.values()):
        return False
    return prefix.group_channels in (head_dim, head_dim // 2)


def _plan_few(
    prefix: QuantizedPrefix, num_rows: int, num_processors: int, programs: int | None, num_others: int
) -> SplitPlan:
    """`programs` of 4 warps at once fit a processor; the registers of each thread are held down to that."""
    block_rows = 8 if num_rows <= 8 else FEW_ROWS
    has_exact = prefix.exact_keys.shape[1] > 0
    block_tokens = FEW_WARPS * WARP_TOKENS[block_rows]
    wanted = num_processors * (programs or 3) // prefix.key_codes.shape[0] - has_exact - num_others
    split_tokens, num_splits = _split(prefix, wanted, block_tokens)
    return SplitPlan(
        block_rows, 1, block_tokens, split_tokens, num_splits + has_exact, FEW_WARPS, num_stages=1,
        warp_tokens=WARP_TOKENS[block_rows], max_registers=168,
        touches=block_rows == 8 and launch_ways().touches,  # of 16 rows, registers would spill
    )  # fmt: skip


def _plan_many(
    prefix: QuantizedPrefix, num_rows: int, head_dim: int, num_processors: int, programs: int | None
) -> SplitPlan:
    """Blocks of 64 rows, three programs a processor, until rows fill blocks of 256, which dequantize a tile once."""
    blocks = triton.cdiv(num_rows, 64)
    block_rows, num_warps, usual, registers = 64, 4, 3, 168
    if head_dim > 128:
        num_warps, usual, registers = 8, 2, None
    elif blocks % 4 == 0:
        block_rows, num_warps, usual, registers = 256, 8, 1, None
    row_blocks = triton.cdiv(num_rows, block_rows)
    has_exact = prefix.exact_keys.shape[1] > 0
    wanted = num_processors * (programs or usual) // (prefix.key_codes.shape[0] * row_blocks) - has_exact
    block_tokens = _block_tokens(prefix, torch.bfloat16, head_dim)
    split_tokens, num_splits = _split(prefix, wanted, block_tokens)
    return SplitPlan(
        block_rows, row_blocks, block_tokens, split_tokens, num_splits + has_exact, num_warps, tiles_ahead=3,
        max_registers=registers, is_many=True,
    )  # fmt: skip


def attend_prefix_parts(
    query: Tensor,
    prefix: Prefix,
    part_out: Tensor,
    part_lse: Tensor,
    plan: SplitPlan,
    *,
    scale: float,
    positions: Tensor | None,
    window: int | None,
    softcap: float | None,
    join: Join | None = None,
) -> None:
    """Write the results of all splits: `part_out [num_splits, num_q_heads, num_queries, head_dim]`, `part_lse`.

    With `join`, for a plan of few rows over codes, both have the parts of all launches, and the last program of a head
    writes `join`'s `out` and `lse`.
    """
    num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, half = prefix[0].shape[0], head_dim // 2
    tensors, num_exact, sizes = _arguments(prefix, query)
    sizes |= {"group_size": num_q_heads // num_kv_heads, "half": half, "block_rows": plan.block_rows}
    sizes |= {"has_window": window is not None, "has_cap": softcap is not None}
    others: list[Any] = []
    if plan.warp_tokens:
        kernel: Any = attend_few
        sizes |= {"value_groups": head_dim // sizes.pop("group_channels"), "warps": plan.num_warps}
        sizes |= {"warp_tokens": plan.warp_tokens, "touches": plan.touches}
        others, joined = _join_arguments(join, query, plan, num_q_heads // num_kv_heads * num_queries)
        sizes |= joined
    else:
        kernel = attend_many if plan.is_many else attend_prefix
        sizes |= {"block_half": max(16, triton.next_power_of_2(half)), "block_tokens": plan.block_tokens}
        sizes |= {"tiles_ahead": plan.tiles_ahead} if plan.is_many else {"folded": plan.block_rows <= MAX_FOLDED_ROWS}
    num_programs = plan.num_splits + (0 if join is None else join.num_programs)
    kernel[(plan.row_blocks, num_kv_heads, num_programs)](
        query, *tensors, query if positions is None else positions, part_out, part_lse, scale, softcap or 0.0,
        window or 0, prefix.num_tokens, num_exact, tensors[1].shape[1], num_queries, plan.split_tokens,
        *query.stride()[:2], *tensors[0].stride()[:2], *tensors[3].stride()[:2], *others,
        num_warps=plan.num_warps, num_stages=plan.num_stages, maxnreg=plan.max_registers, **sizes,
        **launch_options(query.device),
    )  # fmt: skip


def _join_arguments(
    join: Join | None, query: Tensor, plan: SplitPlan, num_rows: int
) -> tuple[list[Any], dict[str, int]]:
    """What `attend_few` joins and the tails it takes, in its order (`query` for what there is not), and sizes."""
    tails = None if join is None else join.tails
    tensors, strides = [query] * 5, [0] * 7
    sizes = {"page_tokens": 0, "tail_split": JOINED_SPLIT_TOKENS, "joined_rows": 0}
    if tails is not None:
        tensors = [*tails[:5]]
        strides = [*tails.keys.stride()[:3], *tails.values.stride()[:3], tails.pages.stride(0)]
        sizes["page_tokens"] = tails.keys.shape[2]
    if join is None:
        return [*tensors, query, query, query, 0, 0, 0, 0, *strides], sizes
    sizes["joined_rows"] = triton.next_power_of_2(num_rows)
    num_sessions = 0 if tails is None else tails.lengths.shape[0]
    tail_part = join.num_parts - join.tail_splits
    numbers = [join.num_parts, tail_part, num_sessions, plan.num_splits]
    return [*tensors, join.out, join.lse, join.arrivals, *numbers, *strides], sizes


def _arguments(prefix: Prefix, query: Tensor) -> tuple[list[Tensor], int, dict[str, Any]]:
    """Tensors in the kernel's order (`query` for those that the prefix has not), exact tokens, compile-time sizes."""
    if isinstance(prefix, QuantizedPrefix):
        sizes: dict[str, Any] = {"key_bits": code_bits(prefix.key_codes), "value_bits": code_bits(prefix.value_codes)}
        sizes |= {"group_tokens": prefix.group_tokens, "group_channels": prefix.group_channels}
        return list(prefix[:8]), prefix.exact_keys.shape[1], sizes
    keys, values = prefix
    sizes = {"key_bits": 16, "value_bits": 16, "group_tokens": BLOCK_TOKENS, "group_channels": keys.shape[2]}
    return [keys, query, query, values, query, query, query, query], 0, sizes
