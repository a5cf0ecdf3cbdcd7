"""Triton kernel of `inverse.inverse_transform`.

`sum = codes @ rows modulo 2**32` in 8-bit products, as no processor multiplies matrices of 16-bit integers: with
`c = 256 c1 + c0 + 128`, `r = 256 r1 + r0 + 128` and all of `c1, c0, r1, r0` signed bytes,
`sum c r = 2**16 (c1 r1) + 2**8 (c1 r0 + c0 r1) + c0 r0 + 128 (sum c + sum r) - 2**14 n`. Sums are int32 and wrap.
Then `sum * scale + mean` and the rotation in float32, nothing fused.
Grid: `(blocks of tokens, key/value heads)`. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.triton_quantize import narrow_to


class Blocks(NamedTuple):
    """How a launch is cut."""

    tokens: int = 32
    components: int = 64
    num_warps: int | None = None


@triton.jit
def _bytes(numbers):
    """Upper and lower signed byte of 16-bit numbers, the lower one 128 less than it is."""
    return (numbers >> 8).to(tl.int8), ((numbers & 0xFF) - 128).to(tl.int8)


@triton.jit
def _add_products(codes_high, codes_low, code_sums, rows, high, middle, low):
    """The sums with a tile of components taken in; `low` takes everything that is not shifted."""
    rows_high, rows_low = _bytes(rows)
    high += tl.dot(codes_high, rows_high, out_dtype=tl.int32)
    middle += tl.dot(codes_high, rows_low, out_dtype=tl.int32) + tl.dot(codes_low, rows_high, out_dtype=tl.int32)
    low += tl.dot(codes_low, rows_low, out_dtype=tl.int32)
    low += 128 * (code_sums[:, None] + tl.sum(rows.to(tl.int32), 0)[None, :])
    return high, middle, low


@triton.jit
def _finished(high, middle, low, scale, mean, channels, mask):
    """float32 values of some channels of a block of tokens."""
    sums = (high << 16) + (middle << 8) + low
    factor, shift = tl.load(scale + channels, mask=mask, other=0.0), tl.load(mean + channels, mask=mask, other=0.0)
    return sums.to(tl.float32) * factor[None, :] + shift[None, :]


@triton.jit
def invert_block(
    codes, rows, scale, mean, cosines, sines, out, num_tokens, num_components, token_stride, component_stride,
    row_stride, half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr, block_half: tl.constexpr,
    block_tokens: tl.constexpr, block_components: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head; pair `i` is channels `firsts[i]` and `seconds[i]`, those behind are not turned."""
    head, tokens = tl.program_id(1), tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    is_token, places = tokens < num_tokens, tl.arange(0, block_half)
    is_pair = places < half
    if adjacent:
        firsts, seconds = 2 * places, 2 * places + 1
    else:
        firsts = tl.where(places < num_pairs, places, num_pairs + places)
        seconds = firsts + tl.where(places < num_pairs, num_pairs, half - num_pairs)
    zeros = tl.zeros((block_tokens, block_half), tl.int32)
    high, middle, low = zeros, zeros, zeros
    other_high, other_middle, other_low = zeros, zeros, zeros
    channels = head * 2 * half
    for start in range(0, num_components, block_components):
        components = start + tl.arange(0, block_components)
        is_component = components < num_components
        at = codes + tokens.to(tl.int64)[:, None] * token_stride
        at += components.to(tl.int64)[None, :] * component_stride
        tile = tl.load(at, mask=is_token[:, None] & is_component[None, :], other=0)
        codes_high, codes_low = _bytes(tile)
        code_sums = tl.sum(tile.to(tl.int32), 1)
        at = rows + components[:, None] * row_stride + channels
        mask = is_component[:, None] & is_pair[None, :]
        row_tile = tl.load(at + firsts[None, :], mask=mask, other=0)
        high, middle, low = _add_products(codes_high, codes_low, code_sums, row_tile, high, middle, low)
        row_tile = tl.load(at + seconds[None, :], mask=mask, other=0)
        other_high, other_middle, other_low = _add_products(
            codes_high, codes_low, code_sums, row_tile, other_high, other_middle, other_low
        )
    counted = (num_components + block_components - 1) // block_components * block_components * 16384
    first = _finished(high, middle, low - counted, scale, mean, channels + firsts, is_pair)
    second = _finished(other_high, other_middle, other_low - counted, scale, mean, channels + seconds, is_pair)
    at = tokens[:, None] * num_pairs + places[None, :]
    mask = is_token[:, None] & (places < num_pairs)[None, :]
    cosine, sine = tl.load(cosines + at, mask=mask, other=1.0), tl.load(sines + at, mask=mask, other=0.0)
    target = out + (head.to(tl.int64) * num_tokens + tokens)[:, None] * (2 * half)
    mask = is_token[:, None] & is_pair[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    tl.store(target + firsts[None, :], narrow_to(first * cosine - second * sine, dtype), mask=mask)
    tl.store(target + seconds[None, :], narrow_to(second * cosine + first * sine, dtype), mask=mask)


def invert(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    head_dim: int,
    dtype: torch.dtype,
    pairing: str,
    blocks: Blocks = Blocks(),
) -> Tensor:
    """`[num_kv_heads, num_tokens, head_dim]` as `inverse.inverse_transform_reference` gives it."""
    num_tokens, num_kv_heads, half = codes.shape[0], rows.shape[1] // head_dim, head_dim // 2
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    cosines, sines = (scale, scale) if angles is None else (part.contiguous() for part in angles)
    out = torch.empty((num_kv_heads, num_tokens, head_dim), dtype=dtype, device=codes.device)
    if num_tokens:
        invert_block[(triton.cdiv(num_tokens, blocks.tokens), num_kv_heads)](
            codes, rows, scale.contiguous(), mean.contiguous(), cosines, sines, out, num_tokens, codes.shape[1],
            *codes.stride(), rows.stride(0), half=half, num_pairs=0 if angles is None else cosines.shape[1],
            adjacent=pairing == "adjacent", block_half=max(16, triton.next_power_of_2(half)),
            block_tokens=blocks.tokens, block_components=blocks.components,
            num_warps=blocks.num_warps or (8 if half > 64 else 4),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
