"""Codes as operands of a warp's own products, for `triton.few`: dequantized by the thread that multiplies them.

A thread is `(warp, row of 8, column of 4)`. Of an operand `[warps, inner, outer]` on the right of a product, or
`[warps, outer, inner]` on the left, it holds the inner numbers `8 i + 2 column + (0, 1)` and the outer ones `8 j + row`
(layout of `mma.m16n8k16`, PTX ISA 9.7.14). Loads are written as tensors `[..., row, column, bytes of a thread]`, which
is how the compiler deals them to threads, so that no number leaves the registers of its thread. That rests on two
liberties: channels of a product over channels, and tokens of one over tokens, may come in any order that both of its
sides share. Inlined; none is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from cag_kernels.triton.numbers import dequantized_bytes, dequantized_nibbles


@triton.jit
def key_channels(half: tl.constexpr):
    """The channel, of a half's, at each place of the products over channels; see `few_keys`."""
    place = tl.arange(0, half)
    column, low, high = place // 2 % 4, place % 2, place // 8
    return column_start(column, half) + high * 2 + low


@triton.jit
def column_start(column, half: tl.constexpr):
    """The first of the `half / 4` channels side by side that a column of threads has; 8 of 32 in an order that keeps
    the compiler from loading 16 at once."""
    return column % 2 * 16 + column // 2 * 8 if half == 32 else column * (half // 4)


@triton.jit
def both_halves(
    codes, at, shape: tl.constexpr, scale_low, scale_high, offset_low, offset_high, half: tl.constexpr,
    bits: tl.constexpr,
):  # fmt: skip
    """Both halves of the channels of the codes `at` these places as bfloat16 numbers of this shape."""
    if bits == 4:
        packed = tl.reshape(tl.load(codes + at), shape)
        low, high = dequantized_nibbles(packed, scale_low, scale_high, offset_low, offset_high)
    else:
        low = dequantized_bytes(tl.reshape(tl.load(codes + at), shape), scale_low, offset_low)
        high = dequantized_bytes(tl.reshape(tl.load(codes + half + at), shape), scale_high, offset_high)
    return low, high


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
def few_keys(
    codes, scales, offsets, start, last, stride, group_tokens, num_groups,
    half: tl.constexpr, bits: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr,
):  # fmt: skip
    """Both halves of each warp's keys behind `start`, `[warps, half, warp_tokens]`, channels as `key_channels` says."""
    row, place = tl.arange(0, warp_tokens * warps), tl.arange(0, half)
    token = start + row // 8 % warps * warp_tokens + row // (8 * warps) * 8 + row % 8
    byte = column_start(place // (half // 4), half) + place % (half // 4)
    at = tl.minimum(token, last - 1)[:, None] * stride + byte[None, :]
    row, place = tl.arange(0, half // 32 * warps * 8), tl.arange(0, 32)
    group = tl.minimum((start + row // 8 % warps * warp_tokens) // group_tokens, num_groups - 1)
    channel = (row // (8 * warps) * 8)[:, None] + (column_start(place // 8, half) + place % 8)[None, :]
    vector = group[:, None] * (2 * half) + channel
    low, high = both_halves(
        codes, at, (warp_tokens // 8, warps * 8, 4, half // 32, 8),
        key_vectors(scales, vector, half, warps), key_vectors(scales + half, vector, half, warps),
        key_vectors(offsets, vector, half, warps), key_vectors(offsets + half, vector, half, warps), half, bits,
    )  # fmt: skip
    return channels_inside(low, half, warps, warp_tokens), channels_inside(high, half, warps, warp_tokens)


@triton.jit
def value_tokens(place, start, columns: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """The token of each place of a load, `columns` places a row of threads: `[pairs, 2, warps, 8]` rows."""
    row = place // columns
    pair = row // (8 * warps)
    return start + row // 8 % warps * warp_tokens + pair // 2 * 8 + place // (columns // 4) % 4 * 2 + pair % 2


@triton.jit
def tokens_inside(tile, half: tl.constexpr, warps: tl.constexpr, warp_tokens: tl.constexpr):
    """`[warp_tokens / 4, warps * 8, 4, half / 8]`, as values are loaded, to `[warps, channels, tokens]`."""
    tile = tl.reshape(tile, (warp_tokens // 8, 2, warps, 8, 4, half // 8))
    return tl.reshape(tl.permute(tile, (2, 5, 3, 0, 4, 1)), (warps, half, warp_tokens))


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
    """Both halves of each warp's values behind `start`, `[warps, half, warp_tokens]`; of `in_order` channels, channel
    `i` is at `i % (half / 8) * 8 + i // (half / 8)`."""
    size: tl.constexpr = half // 8
    place = tl.arange(0, warp_tokens // 4 * warps * 8)[:, None] * (4 * size) + tl.arange(0, 4 * size)[None, :]
    token = tl.minimum(value_tokens(place, start, 4 * size, warps, warp_tokens), last - 1)
    at = token * stride + place // (4 * size) % 8 * size + place % size
    place = tl.arange(0, warp_tokens // 4 * warps * 32 * num_groups)
    token = tl.minimum(value_tokens(place, start, 4 * num_groups, warps, warp_tokens), last - 1)
    vector = token * num_groups + place % num_groups
    scale_low, scale_high = value_vectors(scales, vector, num_groups, warps, warp_tokens)
    offset_low, offset_high = value_vectors(offsets, vector, num_groups, warps, warp_tokens)
    low, high = both_halves(
        codes, at, (warp_tokens // 4, warps * 8, 4, size), scale_low, scale_high, offset_low, offset_high, half, bits
    )
    return tokens_inside(low, half, warps, warp_tokens), tokens_inside(high, half, warps, warp_tokens)


@triton.jit
def in_order(sums):
    """`[half, rows]`, channels as `few_values` has them, to `[rows, half]`."""
    sums = tl.reshape(sums, (sums.shape[0] // 8, 8, sums.shape[1]))
    return tl.reshape(tl.permute(sums, (2, 1, 0)), (sums.shape[2], sums.shape[0] * sums.shape[1]))
