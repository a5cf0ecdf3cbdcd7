"""Triton kernel of `prefix.prefix_attention` for up to 16 rows over codes: nothing between memory and the products.

What it computes is in `triton_prefix`, whose launch this is for few rows. Each warp has tokens and a softmax of its
own, products are batches of one matrix a warp, and the warps' sums are joined once, behind the loop. Codes are loaded
so that a thread dequantizes exactly the numbers that its products take: they never leave the thread's registers, and
warps never wait for each other. That rests on two liberties: channels of a product over channels, and tokens of one
over tokens, may come in any order that both of its sides share.

A thread is `(warp, row of 8, column of 4)`. As part of the right side of a product, `[warps, inner, outer]`, it holds
the inner numbers `8 i + 2 column + (0, 1)` and the outer ones `8 j + row` (layout of `mma.m16n8k16`, PTX ISA 9.7.14).
Loads are written as tensors `[..., row, column, bytes of a thread]`, which is how the compiler deals them to threads.
Grid: `(row blocks, key/value heads, splits)`; a last split has the exact tokens. Accumulates in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton_numbers import (
    dequantized_bytes,
    dequantized_nibbles,
    fetched_ahead,
    product,
    rounded,
)
from cag_kernels.triton_tiles import between, halves, masked, store_part, take_plain

EXACT_TOKENS = tl.constexpr(16)  # of a tile of exact tokens, which are a handful


@triton.jit
def key_channels(half: tl.constexpr):
    """The channel, of a half's, at each place of the products over channels; see `key_bytes`."""
    place = tl.arange(0, half)
    column, low, high = place // 2 % 4, place % 2, place // 8
    return column_start(column, half) + high * 2 + low


@triton.jit
def column_start(column, half: tl.constexpr):
    """The first of the `half / 4` channels side by side that a column of threads has; 8 of 32 in an order that keeps
    the compiler from loading 16 at once."""
    return column % 2 * 16 + column // 2 * 8 if half == 32 else column * (half // 4)


@triton.jit
def key_vectors(vectors, at, half: tl.constexpr, warps: tl.constexpr):
    """Scales or offsets of half of the channels for each warp's keys, `[1, warps * 8, 4, half / 32, 8]`."""
    found = tl.reshape(tl.load(vectors + at), (half // 32, warps * 8, 4, 8))
    return tl.permute(found, (1, 2, 0, 3))[None]


@triton.jit
def channels_inside(tile, half: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """`[warp_tokens / 8, warps * 8, 4, half / 32, 8]`, as keys are loaded, to `[warps, channels, tokens]`."""
    tile = tl.reshape(tile, (warp_tokens // 8, warps, 8, 4, half // 8, 2))
    return tl.reshape(tl.permute(tile, (1, 4, 3, 5, 0, 2)), (warps, half, warp_tokens))


@triton.jit
def few_scores(
    low, high, codes, scales, offsets, start, last, stride, group_tokens, num_groups,
    half: tl.constexpr, bits: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr,
):  # fmt: skip
    """`query @ keys.T` of each warp's tokens behind `start`, float32 `[warps, rows, warp_tokens]`."""
    row, place = tl.arange(0, warp_tokens * warps), tl.arange(0, half)
    token = start + row // 8 % warps * warp_tokens + row // (8 * warps) * 8 + row % 8
    byte = column_start(place // (half // 4), half) + place % (half // 4)
    at = tl.minimum(token, last - 1)[:, None] * stride + byte[None, :]
    row, place = tl.arange(0, half // 32 * warps * 8), tl.arange(0, 32)
    group = tl.minimum((start + row // 8 % warps * warp_tokens) // group_tokens, num_groups - 1)
    channel = (row // (8 * warps) * 8)[:, None] + (column_start(place // 8, half) + place % 8)[None, :]
    vector = group[:, None] * (2 * half) + channel
    scale_low, scale_high = key_vectors(scales, vector, half, warps), key_vectors(scales + half, vector, half, warps)
    offset_low, offset_high = (
        key_vectors(offsets, vector, half, warps),
        key_vectors(offsets + half, vector, half, warps),
    )
    shape: tl.constexpr = (warp_tokens // 8, warps * 8, 4, half // 32, 8)
    if bits == 4:
        packed = tl.reshape(tl.load(codes + at), shape)
        keys_low, keys_high = dequantized_nibbles(packed, scale_low, scale_high, offset_low, offset_high)
    else:
        keys_low = dequantized_bytes(tl.reshape(tl.load(codes + at), shape), scale_low, offset_low)
        keys_high = dequantized_bytes(tl.reshape(tl.load(codes + half + at), shape), scale_high, offset_high)
    scores = tl.zeros((warps, low.shape[1], warp_tokens), tl.float32)
    scores = product(low, channels_inside(keys_low, half, warps, warp_tokens), scores)
    return product(high, channels_inside(keys_high, half, warps, warp_tokens), scores)


@triton.jit
def value_tokens(place, start, columns: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """The token of each place of a load, `columns` places a row of threads: `[pairs, 2, warps, 8]` rows."""
    row = place // columns
    pair = row // (8 * warps)
    return start + row // 8 % warps * warp_tokens + pair // 2 * 8 + place // (columns // 4) % 4 * 2 + pair % 2


@triton.jit
def tokens_inside(tile, half: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """`[warp_tokens / 4, warps * 8, 4, half / 8]`, as values are loaded, to `[warps, tokens, channels]`."""
    tile = tl.reshape(tile, (warp_tokens // 8, 2, warps, 8, 4, half // 8))
    return tl.reshape(tl.permute(tile, (2, 0, 4, 1, 5, 3)), (warps, warp_tokens, half))


@triton.jit
def value_vectors(vectors, at, num_groups: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """Scales or offsets of each warp's values for both halves of the channels, `[warp_tokens / 4, warps * 8, 4, 1]`."""
    found = tl.load(vectors + at)
    if num_groups == 2:
        low, high = tl.split(tl.reshape(found, (warp_tokens // 4, warps * 8, 4, 1, 2)))
    else:
        low = tl.reshape(found, (warp_tokens // 4, warps * 8, 4, 1))
        high = low
    return low, high


@triton.jit
def few_values(
    codes, scales, offsets, start, last, stride, half: tl.constexpr, bits: tl.constexpr, num_groups: tl.constexpr,
    warps: tl.constexpr, warp_tokens: tl.constexpr,
):  # fmt: skip
    """Both halves of each warp's values behind `start`, `[warps, warp_tokens, half]`, channel `i` at `order(i)`."""
    size: tl.constexpr = half // 8
    place = tl.arange(0, warp_tokens // 4 * warps * 8)[:, None] * (4 * size) + tl.arange(0, 4 * size)[None, :]
    token = tl.minimum(value_tokens(place, start, 4 * size, warps, warp_tokens), last - 1)
    at = token * stride + place // (4 * size) % 8 * size + place % size
    place = tl.arange(0, warp_tokens // 4 * warps * 32 * num_groups)
    token = tl.minimum(value_tokens(place, start, 4 * num_groups, warps, warp_tokens), last - 1)
    vector = token * num_groups + place % num_groups
    scale_low, scale_high = value_vectors(scales, vector, num_groups, warps, warp_tokens)
    offset_low, offset_high = value_vectors(offsets, vector, num_groups, warps, warp_tokens)
    shape: tl.constexpr = (warp_tokens // 4, warps * 8, 4, size)
    if bits == 4:
        packed = tl.reshape(tl.load(codes + at), shape)
        low, high = dequantized_nibbles(packed, scale_low, scale_high, offset_low, offset_high)
    else:
        low = dequantized_bytes(tl.reshape(tl.load(codes + at), shape), scale_low, offset_low)
        high = dequantized_bytes(tl.reshape(tl.load(codes + half + at), shape), scale_high, offset_high)
    return tokens_inside(low, half, warps, warp_tokens), tokens_inside(high, half, warps, warp_tokens)


@triton.jit
def few_weighed(scores, maximum, denominator):
    """`triton_tiles.weighed` for each warp apart."""
    higher = tl.maximum(maximum, tl.max(scores, 2))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, :, None])
    factor = tl.exp2(maximum - base)
    return weights, factor[:, :, None], higher, denominator * factor + tl.sum(weights, 2)


@triton.jit
def joined(sums, share):
    """The sum over warps of `[warps, rows, half]`, channels in order again, `[rows, half]`."""
    whole = tl.sum(sums * share[:, :, None], 0)
    whole = tl.reshape(whole, (sums.shape[1], sums.shape[2] // 8, 8))
    return tl.reshape(tl.permute(whole, (0, 2, 1)), (sums.shape[1], sums.shape[2]))


@triton.jit
def rows_ahead(places, start, last, stride, num_tokens: tl.constexpr):
    """Calls what `places` point to at `num_tokens` tokens from `start` into the second-level cache."""
    fetched_ahead(places + tl.minimum(start + tl.arange(0, num_tokens), last - 1) * stride)


@triton.jit
def groups_ahead(scales, start, last, group_tokens, half: tl.constexpr, num_tokens: tl.constexpr):
    """The same for the keys' scales or offsets, 128 bytes each."""
    place = tl.arange(0, num_tokens // 32 * (half // 32))
    token = tl.minimum(start + place // (half // 32) * 32, last - 1)
    fetched_ahead(scales + token // group_tokens * (2 * half) + place % (half // 32) * 64)


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
def attend_few(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_rows: tl.constexpr, group_tokens: tl.constexpr,
    value_groups: tl.constexpr, key_bits: tl.constexpr, value_bits: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr, tiles_ahead: tl.constexpr,
):  # fmt: skip
    """One split of the tokens for a block of rows of a key/value head; the last one may have the exact tokens."""
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row = rows < num_queries * group_size
    queries, heads = rows // group_size, kv_head * group_size + rows % group_size
    places = query + heads * query_head_stride + queries * query_stride
    row_places = (split * tl.num_programs(1) * group_size + heads) * num_queries + queries
    first, last = split * split_tokens, tl.minimum((split + 1) * split_tokens, num_tokens)
    hidden = tl.full((block_rows,), -1, tl.int32)  # the last token that is too far back for a row
    if has_window:
        hidden = tl.load(positions + queries, mask=is_row, other=1 << 30) - window
    if first >= num_tokens:
        attend_exact(
            places, is_row, exact_keys, exact_values, kv_head, hidden, part_out, part_lse, row_places, scale, softcap,
            num_exact, half, half, has_cap,
        )  # fmt: skip
    else:
        block: tl.constexpr = warps * warp_tokens
        at = places[:, None] + key_channels(half)[None, :]
        low = tl.broadcast_to(tl.load(at, mask=is_row[:, None], other=0.0)[None], (warps, block_rows, half))
        high = tl.broadcast_to(tl.load(at + half, mask=is_row[:, None], other=0.0)[None], (warps, block_rows, half))
        if has_window:
            first = tl.maximum(first, (tl.min(hidden) + 1) // block * block)
        keys, values = keys + kv_head * key_head_stride, values + kv_head * value_head_stride
        key_at, value_at = kv_head * num_groups * (2 * half), kv_head * num_tokens * value_groups
        maximum = tl.full((warps, block_rows), float("-inf"), tl.float32)
        denominator = tl.zeros((warps, block_rows), tl.float32)
        low_sum = tl.zeros((warps, block_rows, half), tl.float32)
        high_sum = tl.zeros((warps, block_rows, half), tl.float32)
        columns = tl.arange(0, warps)[:, None] * warp_tokens + tl.arange(0, warp_tokens)[None, :]
        for start in tl.range(first, last, block, num_stages=1):
            if tiles_ahead > 0:
                soon = start + tiles_ahead * block
                rows_ahead(keys, soon, last, key_stride, block)
                rows_ahead(values, soon, last, value_stride, block)
                rows_ahead(value_scales + value_at, soon, last, value_groups, block)
                rows_ahead(value_offsets + value_at, soon, last, value_groups, block)
                groups_ahead(key_scales + key_at, soon, last, group_tokens, half, block)
                groups_ahead(key_offsets + key_at, soon, last, group_tokens, half, block)
            scores = few_scores(
                low, high, keys, key_scales + key_at, key_offsets + key_at, start, last, key_stride, group_tokens,
                num_groups, half, key_bits, warps, warp_tokens,
            )  # fmt: skip
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
            weights = rounded(weights, low.dtype)
            low_sum = product(weights, values_low, low_sum * factor)
            high_sum = product(weights, values_high, high_sum * factor)
        highest = tl.max(maximum, 0)
        share = tl.exp2(maximum - tl.where(highest == float("-inf"), 0.0, highest)[None, :])
        total = tl.sum(denominator * share, 0)
        low_whole, high_whole = joined(low_sum, share), joined(high_sum, share)
        store_part(part_out, part_lse, row_places, is_row, highest, total, low_whole, high_whole, half, half)
