"""Attention to quantized tiles inside Triton kernels; inlined into `triton.prefix`, none is launched.

A tile lies within one group of tokens of the keys. Codes of 4 bits for bfloat16 are dequantized two at a time in their
registers. Otherwise few rows take the keys' scales into the query and many rows dequantize the tile, whichever is less
work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton.numbers import (
    code_bias,
    code_middle,
    converted,
    dequantized_bytes,
    dequantized_nibbles,
    nibbles,
    product,
    rounded,
)
from cag_kernels.triton.tiles import halves, masked, row_scores, weighed


@triton.jit
def code_halves(
    places, is_token, half: tl.constexpr, block_half: tl.constexpr, bits: tl.constexpr, dtype: tl.constexpr
):
    """Both halves of a tile's codes as numbers of `dtype`, `code_bias` too large; `places` point to its tokens."""
    if bits == 4:
        channels = tl.arange(0, block_half)
        mask = is_token[:, None] & (channels < half)[None, :]
        low, high = nibbles(tl.load(places[:, None] + channels[None, :], mask=mask, other=0), dtype)
    else:
        low, high = halves(places, is_token, half, block_half, bits)
        low, high = converted(low, dtype), converted(high, dtype)
    return low, high


@triton.jit
def vectors(place, half: tl.constexpr, block_half: tl.constexpr):
    """Both halves of one vector of channels, float32."""
    channels = tl.arange(0, block_half)
    low = tl.load(place + channels, mask=channels < half, other=0.0)
    high = tl.load(place + half + channels, mask=channels < half, other=0.0)
    return converted(low, tl.float32), converted(high, tl.float32)


@triton.jit
def dequantized(codes, scale, offset, bits: tl.constexpr):
    """`code * scale + offset` of biased codes, in their dtype."""
    shifted = offset - code_bias(codes.dtype, bits) * scale
    return rounded(converted(codes, tl.float32) * scale + shifted, codes.dtype)


@triton.jit
def folded_half(query, codes, scale, offset, scores, constant, bits: tl.constexpr):
    """Half of the channels' part of the scores: `scores` from the product, `constant` for all tokens of a row.

    `query . (code * s + o) = (query * s) . (code - middle) + query . (o + middle * s)`: of these only `query * s` is
    rounded to the dtype of the product.
    """
    dtype: tl.constexpr = query.dtype
    wide, middle = converted(query, tl.float32), code_middle(bits)
    scaled = rounded(wide * scale[None, :], dtype)
    taken = (code_bias(dtype, bits) + middle) * converted(scaled, tl.float32)
    constant += tl.sum(wide * (offset + middle * scale)[None, :] - taken, 1)
    return product(scaled, tl.trans(codes), scores), constant


@triton.jit
def code_scores(
    low, high, codes, scales, offsets, is_token, half: tl.constexpr, bits: tl.constexpr, folded: tl.constexpr
):
    """`query @ keys.T` of a tile, float32; `scales`, `offsets` point to those of its group."""
    codes_low, codes_high = code_halves(codes, is_token, half, low.shape[1], bits, low.dtype)
    scale_low, scale_high = vectors(scales, half, low.shape[1])
    offset_low, offset_high = vectors(offsets, half, low.shape[1])
    if folded:
        scores = tl.zeros((low.shape[0], codes_low.shape[0]), tl.float32)
        constant = tl.zeros((low.shape[0],), tl.float32)
        scores, constant = folded_half(low, codes_low, scale_low, offset_low, scores, constant, bits)
        scores, constant = folded_half(high, codes_high, scale_high, offset_high, scores, constant, bits)
        scores += constant[:, None]
    else:
        keys_low = dequantized(codes_low, scale_low[None, :], offset_low[None, :], bits)
        keys_high = dequantized(codes_high, scale_high[None, :], offset_high[None, :], bits)
        scores = row_scores(low, high, keys_low, keys_high)
    return scores


@triton.jit
def dequantized_half(
    codes, scales, offsets, is_token, first_channel, half: tl.constexpr,
    group_channels: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Half of the channels of a tile of values; `scales`, `offsets` point to its tokens."""
    channels = tl.arange(0, codes.shape[1])
    groups = (first_channel + channels) // group_channels
    mask = is_token[:, None] & (channels < half)[None, :]
    scale = converted(tl.load(scales[:, None] + groups[None, :], mask=mask, other=0.0), tl.float32)
    offset = converted(tl.load(offsets[:, None] + groups[None, :], mask=mask, other=0.0), tl.float32)
    return dequantized(codes, scale, offset, bits)


@triton.jit
def weights_half(weights, scales, offsets, is_token, dtype: tl.constexpr, bits: tl.constexpr):
    """Weights with the scales of half of the channels taken in, and what the offsets add to each of its channels.

    `sum_t w (code s + o) = sum_t (w s) (code - middle) + sum_t w (o + middle s)`; `scales`, `offsets` point to those of
    the tile's tokens.
    """
    scale = converted(tl.load(scales, mask=is_token, other=0.0), tl.float32)
    offset = converted(tl.load(offsets, mask=is_token, other=0.0), tl.float32)
    scaled = rounded(weights * scale[None, :], dtype)
    middle = code_middle(bits)
    taken = (code_bias(dtype, bits) + middle) * converted(scaled, tl.float32)
    common = tl.sum(weights * (offset + middle * scale)[None, :] - taken, 1)
    return scaled, common[:, None]


@triton.jit
def take_code_values(
    weights, factor, low_sum, high_sum, codes, scales, offsets, is_token,
    dtype: tl.constexpr, half: tl.constexpr, group_channels: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """The weighted sums with a tile of values taken in; `codes`, `scales`, `offsets` point to its tokens."""
    low, high = code_halves(codes, is_token, half, low_sum.shape[1], bits, dtype)
    low_sum, high_sum = low_sum * factor[:, None], high_sum * factor[:, None]
    if group_channels == 2 * half or group_channels == half:
        low_weights, added = weights_half(weights, scales, offsets, is_token, dtype, bits)
        low_sum = product(low_weights, low, low_sum + added)
        if group_channels == half:
            scales, offsets = scales + 1, offsets + 1
        high_weights, added = weights_half(weights, scales, offsets, is_token, dtype, bits)
        high_sum = product(high_weights, high, high_sum + added)
    else:
        weights = rounded(weights, dtype)
        low = dequantized_half(low, scales, offsets, is_token, 0, half, group_channels, bits)
        high = dequantized_half(high, scales, offsets, is_token, half, half, group_channels, bits)
        low_sum, high_sum = product(weights, low, low_sum), product(weights, high, high_sum)
    return low_sum, high_sum


@triton.jit
def value_vectors(vectors, is_token, first_channel, half: tl.constexpr, block_half: tl.constexpr, group: tl.constexpr):
    """Scales or offsets of half of the channels of a tile of values, as they are; `vectors` point to its tokens."""
    if group == 2 * half or group == half:
        found = tl.load(vectors + first_channel // group, mask=is_token, other=0.0)[:, None]
    else:
        channels = tl.arange(0, block_half)
        groups = (first_channel + channels) // group
        mask = is_token[:, None] & (channels < half)[None, :]
        found = tl.load(vectors[:, None] + groups[None, :], mask=mask, other=0.0)
    return found


@triton.jit
def key_vectors(vectors, first_channel, half: tl.constexpr, block_half: tl.constexpr):
    """Scales or offsets of half of the channels of a group of keys, as they are kept."""
    channels = tl.arange(0, block_half)
    return tl.load(vectors + first_channel + channels, mask=channels < half, other=0.0)[None, :]


@triton.jit
def packed_tile(places, is_token, half: tl.constexpr, block_half: tl.constexpr):
    """The bytes of a tile of 4-bit codes; `places` point to its tokens."""
    channels = tl.arange(0, block_half)
    mask = is_token[:, None] & (channels < half)[None, :]
    return tl.load(places[:, None] + channels[None, :], mask=mask, other=0)


@triton.jit
def numbers_of(
    codes, is_token, scale_low, scale_high, offset_low, offset_high,
    half: tl.constexpr, block_half: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """Both halves of a tile of codes as bfloat16 numbers; `codes` point to its tokens."""
    if bits == 4:
        packed = packed_tile(codes, is_token, half, block_half)
        low, high = dequantized_nibbles(packed, scale_low, scale_high, offset_low, offset_high)
    else:
        low, high = halves(codes, is_token, half, block_half, bits)
        low, high = dequantized_bytes(low, scale_low, offset_low), dequantized_bytes(high, scale_high, offset_high)
    return low, high


@triton.jit
def take_codes(
    low, high, keys, key_scales, key_offsets, values, value_scales, value_offsets, is_token, visible, scale, softcap,
    maximum, denominator, low_sum, high_sum, half: tl.constexpr, group_channels: tl.constexpr, key_bits: tl.constexpr,
    value_bits: tl.constexpr, has_cap: tl.constexpr, folded: tl.constexpr,
):  # fmt: skip
    """A tile of codes; pointers lead to its tokens, those of key scales to its group. The new state of the rows."""
    tl.static_assert(low.dtype != tl.bfloat16)  # those are `triton.few`'s and `triton.many`'s
    scores = code_scores(low, high, keys, key_scales, key_offsets, is_token, half, key_bits, folded)
    scores = masked(scores, visible, scale, softcap, has_cap)
    weights, factor, maximum, denominator = weighed(scores, maximum, denominator)
    low_sum, high_sum = take_code_values(
        weights, factor, low_sum, high_sum, values, value_scales, value_offsets, is_token, low.dtype, half,
        group_channels, value_bits,
    )  # fmt: skip
    return maximum, denominator, low_sum, high_sum
