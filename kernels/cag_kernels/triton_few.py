"""Triton kernel of `prefix.prefix_attention` for up to 16 rows over codes: nothing between memory and the products.

What it computes is in `triton_prefix`, whose launch this is for few rows. Each warp has tokens and a softmax of its
own, products are batches of one matrix a warp, and the warps' sums are joined once, behind the loop. Codes are loaded
so that a thread dequantizes exactly the numbers that its products take (`triton_operands`): they never leave the
thread's registers, and warps never wait for each other.

Scores are `query @ keys`, for 16 rows whatever their number, because that is what a product has. Sums stand on their
side, `values @ weights`, channels by rows: that product takes 8 rows, so up to 8 have half of the numbers to keep, to
scale and to multiply, and a score is where the second product takes it.
Grid: `(row blocks, key/value heads, splits)`; a last split has the exact tokens. Accumulates in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton_numbers import product, rounded
from cag_kernels.triton_operands import few_keys, few_values, in_order, key_channels
from cag_kernels.triton_tiles import between, halves, masked, program_rows, store_part, take_plain

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
    """`triton_tiles.weighed` for each warp apart."""
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
def attend_few(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_rows: tl.constexpr, group_tokens: tl.constexpr,
    value_groups: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr,
):  # fmt: skip
    """One split of the tokens for a block of rows of a key/value head; the last one may have the exact tokens."""
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
        block: tl.constexpr = warps * warp_tokens
        low, high = wide_queries(
            query, kv_head, num_queries, query_head_stride, query_stride, group_size, half, block_rows, warps
        )
        if has_window:
            first = tl.maximum(first, (tl.min(hidden) + 1) // block * block)
        keys, values = keys + kv_head * key_head_stride, values + kv_head * value_head_stride
        key_at, value_at = kv_head * num_groups * (2 * half), kv_head * num_tokens * value_groups
        maximum = tl.full((warps, block_rows), float("-inf"), tl.float32)
        denominator = tl.zeros((warps, block_rows), tl.float32)
        low_sum = tl.zeros((warps, half, block_rows), tl.float32)
        high_sum = tl.zeros((warps, half, block_rows), tl.float32)
        columns = tl.arange(0, warps)[:, None] * warp_tokens + tl.arange(0, warp_tokens)[None, :]
        for start in range(first, last, block):
            keys_low, keys_high = few_keys(
                keys, key_scales + key_at, key_offsets + key_at, start, last, key_stride, group_tokens, num_groups,
                half, key_bits, warps, warp_tokens,
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
                values, value_scales + value_at, value_offsets + value_at, start, last, value_stride, half, value_bits,
                value_groups, warps, warp_tokens,
            )  # fmt: skip
            weights = tl.permute(rounded(weights, low.dtype), (0, 2, 1))
            low_sum = product(values_low, weights, low_sum * factor)
            high_sum = product(values_high, weights, high_sum * factor)
        highest = tl.max(maximum, 0)
        share = tl.exp2(maximum - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
        total = tl.sum(denominator * share, 0)
        low_whole, high_whole = joined(low_sum, share), joined(high_sum, share)
        store_part(part_out, part_lse, row_places, is_row, highest, total, low_whole, high_whole, half, half)
