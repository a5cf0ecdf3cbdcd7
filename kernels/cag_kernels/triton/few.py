"""Triton kernel of `prefix.prefix_attention` for up to 16 rows over codes: nothing between memory and the products.

What it computes is in `triton.prefix`, whose launch this is for few rows. Each warp has tokens and a softmax of its
own, products are batches of one matrix a warp, and the warps' sums are joined once, behind the loop. Codes are loaded
so that a thread dequantizes exactly the numbers that its products take (`triton.operands`): they never leave the
thread's registers, and warps never wait for each other.

Scores are `query @ keys`, for 16 rows whatever their number, because that is what a product has. Sums stand on their
side, `values @ weights`, channels by rows: that product takes 8 rows, so up to 8 have half of the numbers to keep, to
scale and to multiply, and a score is where the second product takes it.
Grid: `(row blocks, key/value heads, splits)`; a last split has the exact tokens. Accumulates in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton.join import is_last, join_parts
from cag_kernels.triton.numbers import let_go, product, rounded, touched
from cag_kernels.triton.operands import few_keys, few_values, in_order, key_channels
from cag_kernels.triton.overlap import wait_for_launch
from cag_kernels.triton.paged import attend_tail
from cag_kernels.triton.tiles import between, halves, masked, program_rows, store_part, take_plain

EXACT_TOKENS = tl.constexpr(16)  # of a tile of exact tokens, which are a handful


@triton.jit
def first_rows(scores, block_rows: tl.constexpr):
    """The first `block_rows`, 8 or all, of `[warps, 16, tokens]`."""
    if block_rows == 8:
        pairs = tl.reshape(scores, (scores.shape[0], 2, 8, scores.shape[2]))
        scores, _ = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
    return scores


@triton.jit
def few_weighed(scores, maximum, denominator):
    """`triton.tiles.weighed` for each warp apart."""
    higher = tl.maximum(maximum, tl.max(scores, 2))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, :, None])
    factor = tl.exp2(maximum - base)
    return weights, factor[:, None, :], higher, denominator * factor + tl.sum(weights, 2)


@triton.jit
def joined(sums, share):
    """The sum over warps of `[warps, half, rows]`, `[rows, half]` with the channels in order."""
    return in_order(tl.sum(sums * share[:, None, :], 0))


@triton.jit
def attend_exact(
    places, is_row, exact_keys, exact_values, kv_head, hidden, part_out, part_lse, row_places, scale, softcap,
    num_exact, half: tl.constexpr, block_half: tl.constexpr, has_cap: tl.constexpr,
):  # fmt: skip
    """The part of the exact tokens, stored; `places` point to the rows' queries."""
    low, high = halves(places, is_row, half, block_half, 16)
    maximum = tl.full((low.shape[0],), float("-inf"), tl.float32)
    denominator = tl.zeros((low.shape[0],), tl.float32)
    low_sum, high_sum = tl.zeros(low.shape, tl.float32), tl.zeros(low.shape, tl.float32)
    for start in tl.range(0, num_exact, EXACT_TOKENS, num_stages=1):
        tokens = start + tl.arange(0, EXACT_TOKENS)
        is_token, at = tokens < num_exact, (kv_head * num_exact + tokens) * (2 * half)
        visible = is_token[None, :] & (tokens[None, :] > hidden[:, None])
        maximum, denominator, low_sum, high_sum = take_plain(
            low, high, exact_keys + at, exact_values + at, is_token, visible, scale, softcap,
            maximum, denominator, low_sum, high_sum, half, has_cap,
        )  # fmt: skip
    store_part(part_out, part_lse, row_places, is_row, maximum, denominator, low_sum, high_sum, half, block_half)


SECTOR_BYTES = tl.constexpr(32)  # what a cache loads at once


@triton.jit
def touched_rows(codes, start, last, stride, row_bytes: tl.constexpr, block: tl.constexpr):
    """Touches the codes of a block of tokens, `row_bytes` of each. Places behind the last token touch its."""
    sectors: tl.constexpr = row_bytes // SECTOR_BYTES
    place = tl.arange(0, block * sectors)
    token = tl.minimum(start + place // sectors, last - 1)
    return touched(codes + token * stride + place % sectors * SECTOR_BYTES)


@triton.jit
def no_touches(half: tl.constexpr, block: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr):
    """What `touched_rows` of keys and of values and `touched_vectors` found before anything was touched."""
    keys = tl.zeros((block * (half * key_bits // 4 // SECTOR_BYTES),), tl.int32)
    values = tl.zeros((block * (half * value_bits // 4 // SECTOR_BYTES),), tl.int32)
    return keys, values, tl.zeros((128,), tl.int32)


@triton.jit
def touched_vectors(key_scales, key_offsets, value_scales, value_offsets, key_start, key_end, value_start, value_end):
    """Touches a KiB of scales and of offsets of keys and of values, bfloat16, from these places to the ends."""
    place = tl.arange(0, 128)
    step = place % 32 * (SECTOR_BYTES // 2)
    at_key = tl.minimum(key_start + step, key_end - 1)
    at_value = tl.minimum(value_start + step, value_end - 1)
    of_keys = tl.where(place < 32, (key_scales + at_key).to(tl.int64), (key_offsets + at_key).to(tl.int64))
    of_values = tl.where(place < 96, (value_scales + at_value).to(tl.int64), (value_offsets + at_value).to(tl.int64))
    return touched(tl.where(place < 64, of_keys, of_values))


@triton.jit
def wide_queries(
    query, kv_head, num_queries, head_stride, stride, group_size: tl.constexpr, half: tl.constexpr,
    block_rows: tl.constexpr, warps: tl.constexpr,
):  # fmt: skip
    """Both halves of the block's queries, `[warps, 16, half]`, in the order of the products; zeros behind its rows."""
    place = tl.arange(0, 16)
    row = tl.program_id(0) * block_rows + place
    is_row = (place < block_rows) & (row < num_queries * group_size)
    at = query + (kv_head * group_size + row % group_size) * head_stride + row // group_size * stride
    at = at[:, None] + key_channels(half)[None, :]
    low = tl.load(at, mask=is_row[:, None], other=0.0)[None]
    high = tl.load(at + half, mask=is_row[:, None], other=0.0)[None]
    return tl.broadcast_to(low, (warps, 16, half)), tl.broadcast_to(high, (warps, 16, half))


@triton.jit
def attend_coded(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, part_out, part_lse, scale, softcap,
    num_tokens, num_exact, num_groups, num_queries, query_head_stride, query_stride, key_head_stride, key_stride,
    value_head_stride, value_stride, kv_head, is_row, row_places, first, last, hidden,
    group_size: tl.constexpr, half: tl.constexpr, block_rows: tl.constexpr, group_tokens: tl.constexpr,
    value_groups: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr, touches: tl.constexpr,
):  # fmt: skip
    """One split of the coded tokens, stored."""
    block: tl.constexpr = warps * warp_tokens
    low, high = wide_queries(
        query, kv_head, num_queries, query_head_stride, query_stride, group_size, half, block_rows, warps
    )
    if has_window:
        first = tl.maximum(first, (tl.min(hidden) + 1) // block * block)
    keys, values = keys + kv_head * key_head_stride, values + kv_head * value_head_stride
    key_at, value_at = kv_head * num_groups * (2 * half), kv_head * num_tokens * value_groups
    key_scales, key_offsets = key_scales + key_at, key_offsets + key_at
    value_scales, value_offsets = value_scales + value_at, value_offsets + value_at
    maximum = tl.full((warps, block_rows), float("-inf"), tl.float32)
    denominator = tl.zeros((warps, block_rows), tl.float32)
    low_sum = tl.zeros((warps, half, block_rows), tl.float32)
    high_sum = tl.zeros((warps, half, block_rows), tl.float32)
    columns = tl.arange(0, warps)[:, None] * warp_tokens + tl.arange(0, warp_tokens)[None, :]
    if touches:
        key_sectors, value_sectors, vector_sectors = no_touches(half, block, key_bits, value_bits)
    for start in range(first, last, block):
        keys_low, keys_high = few_keys(
            keys, key_scales, key_offsets, start, last, key_stride, group_tokens, num_groups,
            half, key_bits, warps, warp_tokens,
        )  # fmt: skip
        if touches:
            ahead = start + block
            touched_keys = touched_rows(keys, ahead, last, key_stride, half * key_bits // 4, block)
            if value_bits == 4:  # those of 8 bits would take registers that there are not
                touched_values = touched_rows(values, ahead, last, value_stride, half, block)
            touched_both = touched_vectors(
                key_scales, key_offsets, value_scales, value_offsets, ahead // group_tokens * (2 * half),
                num_groups * (2 * half), ahead * value_groups, last * value_groups,
            )  # fmt: skip
        scores = tl.zeros((warps, 16, warp_tokens), tl.float32)
        scores = product(high, keys_high, product(low, keys_low, scores))
        scores = first_rows(scores, block_rows)
        tokens = (start + columns)[:, None, :]
        visible = between(tokens, num_exact, last)
        if has_window:
            visible = visible & (tokens > hidden[None, :, None])
        scores = masked(scores, visible, scale, softcap, has_cap)
        weights, factor, maximum, denominator = few_weighed(scores, maximum, denominator)
        values_low, values_high = few_values(
            values, value_scales, value_offsets, start, last, value_stride, half, value_bits,
            value_groups, warps, warp_tokens,
        )  # fmt: skip
        weights = tl.permute(rounded(weights, low.dtype), (0, 2, 1))
        low_sum = product(values_low, weights, low_sum * factor)
        high_sum = product(values_high, weights, high_sum * factor)
        if touches:
            vector_sectors, key_sectors = vector_sectors | touched_both, key_sectors | touched_keys
            if value_bits == 4:
                value_sectors = value_sectors | touched_values
    if touches:
        let_go(key_sectors, num_tokens, keys)
        if value_bits == 4:
            let_go(value_sectors, num_tokens, values)
        let_go(vector_sectors, num_tokens, keys)
    highest = tl.max(maximum, 0)
    share = tl.exp2(maximum - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
    total = tl.sum(denominator * share, 0)
    low_whole, high_whole = joined(low_sum, share), joined(high_sum, share)
    store_part(part_out, part_lse, row_places, is_row, highest, total, low_whole, high_whole, half, half)


@triton.jit
def attend_split(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_rows: tl.constexpr, group_tokens: tl.constexpr,
    value_groups: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr, touches: tl.constexpr,
):  # fmt: skip
    """One split of the prefix for a block of rows of a key/value head; the last one may have the exact tokens."""
    kv_head, _, is_row, row_query, row_places, first, last, hidden = program_rows(
        query, positions, window, num_tokens, num_queries, split_tokens, query_head_stride, query_stride, group_size,
        block_rows, has_window,
    )  # fmt: skip
    if first >= num_tokens:
        attend_exact(
            row_query, is_row, exact_keys, exact_values, kv_head, hidden, part_out, part_lse, row_places, scale,
            softcap, num_exact, half, half, has_cap,
        )  # fmt: skip
    else:
        attend_coded(
            query, keys, key_scales, key_offsets, values, value_scales, value_offsets, part_out, part_lse, scale,
            softcap, num_tokens, num_exact, num_groups, num_queries, query_head_stride, query_stride,
            key_head_stride, key_stride, value_head_stride, value_stride, kv_head, is_row, row_places, first, last,
            hidden, group_size, half, block_rows, group_tokens, value_groups, key_bits, value_bits, has_window,
            has_cap, warps, warp_tokens, touches,
        )  # fmt: skip


@triton.jit
def attend_few(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    tail_keys, tail_values, pages, lengths, query_starts, out, lse, arrivals, num_parts, tail_part, num_sessions,
    first_tail, tail_key_page_stride, tail_key_head_stride, tail_key_stride, tail_value_page_stride,
    tail_value_head_stride, tail_value_stride, pages_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_rows: tl.constexpr, group_tokens: tl.constexpr,
    value_groups: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr, touches: tl.constexpr,
    page_tokens: tl.constexpr, tail_split: tl.constexpr, joined_rows: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """One split of the prefix, or of a session's tail, for a block of rows of a key/value head.

    With `page_tokens` programs from `first_tail` on have tails, whose parts are those from `tail_part` on. With
    `joined_rows` the last program of a head joins the parts of all.
    """
    wait_for_launch(overlaps)
    split, kv_head = tl.program_id(2), tl.program_id(1).to(tl.int64)
    if page_tokens > 0:
        if split >= first_tail:
            session, tail = (split - first_tail) % num_sessions, (split - first_tail) // num_sessions
            parts = tail_part * (tl.num_programs(1) * group_size * num_queries)
            attend_tail(
                query, tail_keys, tail_values, pages, lengths, query_starts, part_out + parts * (2 * half),
                part_lse + parts, scale, softcap, window, num_queries, query_head_stride, query_stride,
                tail_key_page_stride, tail_key_head_stride, tail_key_stride, tail_value_page_stride,
                tail_value_head_stride, tail_value_stride, pages_stride, session, tl.arange(0, 16), kv_head, tail,
                group_size, half, half, 16, EXACT_TOKENS, tail_split, page_tokens, has_window, has_cap,
            )  # fmt: skip
        else:
            attend_split(
                query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values,
                positions, part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries,
                split_tokens, query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride,
                value_stride, group_size, half, block_rows, group_tokens, value_groups, key_bits, value_bits,
                has_window, has_cap, warps, warp_tokens, touches,
            )  # fmt: skip
    else:
        attend_split(
            query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values,
            positions, part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries,
            split_tokens, query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride,
            value_stride, group_size, half, block_rows, group_tokens, value_groups, key_bits, value_bits,
            has_window, has_cap, warps, warp_tokens, touches,
        )  # fmt: skip
    if joined_rows > 0:  # noqa: SIM102 - a constant, which decides whether the rest is compiled
        if is_last(arrivals, kv_head):
            join_parts(
                part_out, part_lse, out, lse, arrivals, query_starts, num_parts, tail_part, num_sessions,
                num_queries, kv_head, group_size, 2 * half, joined_rows, page_tokens > 0,
            )  # fmt: skip
