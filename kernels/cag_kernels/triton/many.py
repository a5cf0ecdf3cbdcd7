"""Triton kernel of `prefix.prefix_attention` for many rows in bfloat16 over codes: a tile is dequantized once for all.

What it computes is in `triton.prefix`, whose launch this is for codes. A tile's numbers are written to shared memory,
from where the products of all warps read them; both halves of the channels stand side by side there, low nibbles first,
so that a tile takes two products. What the loop reads by itself, the values' scales, is asked for ahead.
Grid: `(row blocks, key/value heads, splits)`; a last split has the exact tokens. Accumulates in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton.codes import key_vectors, numbers_of, value_vectors
from cag_kernels.triton.few import attend_exact
from cag_kernels.triton.numbers import LN_2, fetched_ahead, product, rounded
from cag_kernels.triton.overlap import wait_for_launch
from cag_kernels.triton.tiles import between, masked, program_rows, weighed


@triton.jit
def rows_ahead(places, start, last, stride, num_tokens: tl.constexpr):
    """Calls what `places` point to at `num_tokens` tokens from `start` into the second-level cache."""
    fetched_ahead(places + tl.minimum(start + tl.arange(0, num_tokens), last - 1) * stride)


@triton.jit
def side_by_side(low, high):
    """Both halves of the channels of a tile in one, `[tokens, 2 * block_half]`."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (low.shape[0], 2 * low.shape[1]))


@triton.jit
def keys_of(codes, scales, offsets, is_token, half: tl.constexpr, block_half: tl.constexpr, bits: tl.constexpr):
    """The keys of a tile; `codes` point to its tokens, `scales` and `offsets` to those of its group."""
    low, high = numbers_of(
        codes, is_token, key_vectors(scales, 0, half, block_half), key_vectors(scales, half, half, block_half),
        key_vectors(offsets, 0, half, block_half), key_vectors(offsets, half, half, block_half),
        half, block_half, bits,
    )  # fmt: skip
    return side_by_side(low, high)


@triton.jit
def attend_many(
    query, keys, key_scales, key_offsets, values, value_scales, value_offsets, exact_keys, exact_values, positions,
    part_out, part_lse, scale, softcap, window, num_tokens, num_exact, num_groups, num_queries, split_tokens,
    query_head_stride, query_stride, key_head_stride, key_stride, value_head_stride, value_stride,
    group_size: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr, block_rows: tl.constexpr,
    block_tokens: tl.constexpr, group_tokens: tl.constexpr, group_channels: tl.constexpr, key_bits: tl.constexpr,
    value_bits: tl.constexpr, has_window: tl.constexpr, has_cap: tl.constexpr, tiles_ahead: tl.constexpr,
    overlaps: tl.constexpr,
):  # fmt: skip
    """One split of the tokens for a block of rows of a key/value head; the last one may have the exact tokens."""
    wait_for_launch(overlaps)
    kv_head, _, is_row, row_query, row_places, first, last, hidden = program_rows(
        query, positions, window, num_tokens, num_queries, split_tokens, query_head_stride, query_stride, group_size,
        block_rows, has_window,
    )  # fmt: skip
    if first >= num_tokens:
        attend_exact(
            row_query, is_row, exact_keys, exact_values, kv_head, hidden, part_out, part_lse, row_places, scale,
            softcap, num_exact, half, block_half, has_cap,
        )  # fmt: skip
    else:
        if has_window:
            first = tl.maximum(first, (tl.min(hidden) + 1) // block_tokens * block_tokens)
        place = tl.arange(0, 2 * block_half)
        channels, is_channel = place // block_half * half + place % block_half, place % block_half < half
        mask = is_row[:, None] & is_channel[None, :]
        tile_query = tl.load(row_query[:, None] + channels[None, :], mask=mask, other=0.0)
        num_vectors: tl.constexpr = (2 * half + group_channels - 1) // group_channels
        value_scales += kv_head * num_tokens * num_vectors
        value_offsets += kv_head * num_tokens * num_vectors
        maximum = tl.full((block_rows,), float("-inf"), tl.float32)
        denominator = tl.zeros((block_rows,), tl.float32)
        total = tl.zeros((block_rows, 2 * block_half), tl.float32)
        for start in range(first, last, block_tokens):
            tokens = start + tl.arange(0, block_tokens)
            is_token = tokens < last
            if tiles_ahead > 0:
                rows_ahead(value_scales, start + tiles_ahead * block_tokens, last, num_vectors, block_tokens)
                rows_ahead(value_offsets, start + tiles_ahead * block_tokens, last, num_vectors, block_tokens)
            vectors = tokens * num_vectors
            scales_low = value_vectors(value_scales + vectors, is_token, 0, half, block_half, group_channels)
            scales_high = value_vectors(value_scales + vectors, is_token, half, half, block_half, group_channels)
            offsets_low = value_vectors(value_offsets + vectors, is_token, 0, half, block_half, group_channels)
            offsets_high = value_vectors(value_offsets + vectors, is_token, half, half, block_half, group_channels)
            group = (kv_head * num_groups + start // group_tokens) * (2 * half)
            tile_keys = keys_of(
                keys + kv_head * key_head_stride + tokens * key_stride, key_scales + group, key_offsets + group,
                is_token, half, block_half, key_bits,
            )  # fmt: skip
            scores = product(tile_query, tl.trans(tile_keys), tl.zeros((block_rows, block_tokens), tl.float32))
            visible = between(tokens, num_exact, last)[None, :]
            if has_window:
                visible = visible & (tokens[None, :] > hidden[:, None])
            scores = masked(scores, visible, scale, softcap, has_cap)
            weights, factor, maximum, denominator = weighed(scores, maximum, denominator)
            low, high = numbers_of(
                values + kv_head * value_head_stride + tokens * value_stride, is_token, scales_low, scales_high,
                offsets_low, offsets_high, half, block_half, value_bits,
            )  # fmt: skip
            total = product(rounded(weights, tile_query.dtype), side_by_side(low, high), total * factor[:, None])
        saw = denominator > 0.0
        divisor = tl.where(saw, denominator, 1.0)
        target = part_out + row_places[:, None] * (2 * half) + channels[None, :]
        tl.store(target, total / divisor[:, None], mask=mask)
        tl.store(part_lse + row_places, tl.where(saw, (maximum + tl.log2(divisor)) * LN_2, float("-inf")), mask=is_row)
