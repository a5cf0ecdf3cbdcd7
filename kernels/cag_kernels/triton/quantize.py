"""Triton kernels of `quantize`: numbers to codes and back, to the bit as there.

`code = round((x - offset) / scale)`, `x = code * scale + offset`. Grids: `(groups of tokens, key/value heads)` for
codes over groups of tokens, `(blocks of tokens, key/value heads)` for the rest. Computes in float32;
products and sums are not fused.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.prefixes import code_bits
from cag_kernels.triton.numbers import converted
from cag_kernels.triton.tiles import halves

BLOCK_TOKENS = 32
ROUNDS = tl.constexpr(12582912.0)  # 1.5 * 2**23: a sum with it has no bits behind the point


@triton.jit
def _narrowed(numbers, addend):
    """float32 to bfloat16: `addend` to the bit patterns, of which the upper 16 stay."""
    bits = numbers.to(tl.int32, bitcast=True) + addend
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _parameters(high, low, bits: tl.constexpr):
    """Scale and offset of groups, bfloat16, and the same as float32."""
    none = high < low  # a group without numbers
    high, low = tl.where(none, 0.0, high), tl.where(none, 0.0, low)
    if bits == 8:
        offset = _narrowed(high * 0.5 + low * 0.5, 0x8000)
        wide = converted(offset, tl.float32)
        scale = _narrowed(tl.div_rn(tl.maximum(high - wide, wide - low), 127.0), 0xFFFF)
    else:
        offset = _narrowed(low, 0x8000)
        wide = converted(offset, tl.float32)
        scale = _narrowed(tl.div_rn(tl.maximum(high - wide, 0.0), 15.0), 0xFFFF)
    return scale, offset, converted(scale, tl.float32), wide


@triton.jit
def _codes(numbers, scale, offset, is_coded, bits: tl.constexpr):
    """Codes as int32."""
    steps = tl.div_rn(numbers - offset, tl.where(scale > 0, scale, 1.0) + tl.zeros_like(numbers))
    whole = (steps + ROUNDS) - ROUNDS
    lowest = -127.0 if bits == 8 else 0.0
    highest = 127.0 if bits == 8 else 15.0
    whole = tl.minimum(tl.maximum(whole, lowest), highest)
    return tl.where(is_coded, whole, 0.0).to(tl.int32)


@triton.jit
def _store_codes(codes, places, low, high, is_token, half: tl.constexpr, bits: tl.constexpr):
    """Both halves of the channels; `places` count tokens from the first of all heads."""
    channels = tl.arange(0, low.shape[1])
    mask = is_token[:, None] & (channels < half)[None, :]
    if bits == 8:
        targets = codes + places[:, None] * (2 * half) + channels[None, :]
        tl.store(targets, low.to(tl.int8), mask=mask)
        tl.store(targets + half, high.to(tl.int8), mask=mask)
    else:
        tl.store(codes + places[:, None] * half + channels[None, :], (low | (high << 4)).to(tl.uint8), mask=mask)


@triton.jit
def code_token_groups(
    numbers, codes, scales, offsets, num_tokens, num_exact, head_stride, token_stride,
    group_tokens: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr, block_tokens: tl.constexpr,
    bits: tl.constexpr,
):  # fmt: skip
    """One group of tokens of one head: a scale and an offset a channel."""
    group, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    places = tl.arange(0, block_tokens)
    tokens = group * group_tokens + places
    is_token = (places < group_tokens) & (tokens < num_tokens)
    is_coded = (is_token & (tokens >= num_exact))[:, None]
    low, high = halves(numbers + head * head_stride + tokens * token_stride, is_token, half, block_half, 16)
    low, high = converted(low, tl.float32), converted(high, tl.float32)
    scale, offset, wide_scale, wide_offset = _parameters(
        tl.max(tl.where(is_coded, low, float("-inf")), 0), tl.min(tl.where(is_coded, low, float("inf")), 0), bits
    )
    channels = tl.arange(0, block_half)
    at = (head * tl.num_programs(0) + group) * (2 * half) + channels
    tl.store(scales + at, scale, mask=channels < half)
    tl.store(offsets + at, offset, mask=channels < half)
    low_codes = _codes(low, wide_scale[None, :], wide_offset[None, :], is_coded, bits)
    scale, offset, wide_scale, wide_offset = _parameters(
        tl.max(tl.where(is_coded, high, float("-inf")), 0), tl.min(tl.where(is_coded, high, float("inf")), 0), bits
    )
    tl.store(scales + at + half, scale, mask=channels < half)
    tl.store(offsets + at + half, offset, mask=channels < half)
    high_codes = _codes(high, wide_scale[None, :], wide_offset[None, :], is_coded, bits)
    _store_codes(codes, head * num_tokens + tokens, low_codes, high_codes, is_token, half, bits)


@triton.jit
def code_channel_groups(
    numbers, codes, scales, offsets, num_tokens, num_exact, head_stride, token_stride,
    group_channels: tl.constexpr, num_groups: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr,
    block_tokens: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head: a scale and an offset for each token and group of channels."""
    head, tokens = tl.program_id(1).to(tl.int64), tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    is_token, channels = tokens < num_tokens, tl.arange(0, block_half)
    is_coded = is_token & (tokens >= num_exact)
    low, high = halves(numbers + head * head_stride + tokens * token_stride, is_token, half, block_half, 16)
    low, high = converted(low, tl.float32), converted(high, tl.float32)
    low_codes, high_codes = tl.zeros(low.shape, tl.int32), tl.zeros(low.shape, tl.int32)
    for group in range(num_groups):
        own_low = (channels < half) & (channels // group_channels == group)
        own_high = (channels < half) & ((half + channels) // group_channels == group)
        mask_low, mask_high = is_coded[:, None] & own_low[None, :], is_coded[:, None] & own_high[None, :]
        scale, offset, wide_scale, wide_offset = _parameters(
            tl.maximum(
                tl.max(tl.where(mask_low, low, float("-inf")), 1), tl.max(tl.where(mask_high, high, float("-inf")), 1)
            ),
            tl.minimum(
                tl.min(tl.where(mask_low, low, float("inf")), 1), tl.min(tl.where(mask_high, high, float("inf")), 1)
            ),
            bits,
        )
        at = (head * num_tokens + tokens) * num_groups + group
        tl.store(scales + at, scale, mask=is_token)
        tl.store(offsets + at, offset, mask=is_token)
        low_codes += _codes(low, wide_scale[:, None], wide_offset[:, None], mask_low, bits)
        high_codes += _codes(high, wide_scale[:, None], wide_offset[:, None], mask_high, bits)
    _store_codes(codes, head * num_tokens + tokens, low_codes, high_codes, is_token, half, bits)


@triton.jit
def decode(
    codes, scales, offsets, out, num_tokens, num_token_groups, head_stride, token_stride,
    group_tokens: tl.constexpr, group_channels: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr,
    block_tokens: tl.constexpr, bits: tl.constexpr,
):  # fmt: skip
    """A block of tokens of one head."""
    head, tokens = tl.program_id(1).to(tl.int64), tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    is_token, channels = tokens < num_tokens, tl.arange(0, block_half)
    low, high = halves(codes + head * head_stride + tokens * token_stride, is_token, half, block_half, bits)
    mask = is_token[:, None] & (channels < half)[None, :]
    num_groups: tl.constexpr = (2 * half + group_channels - 1) // group_channels
    rows = (head * num_token_groups + tokens // group_tokens)[:, None] * num_groups
    targets = out + (head * num_tokens + tokens)[:, None] * (2 * half) + channels[None, :]
    at = rows + (channels // group_channels)[None, :]
    tl.store(targets, _decoded(low, scales, offsets, at, mask, out.dtype.element_ty), mask=mask)
    at = rows + ((half + channels) // group_channels)[None, :]
    tl.store(targets + half, _decoded(high, scales, offsets, at, mask, out.dtype.element_ty), mask=mask)


@triton.jit
def _decoded(codes, scales, offsets, at, mask, dtype: tl.constexpr):
    scale = converted(tl.load(scales + at, mask=mask, other=0.0), tl.float32)
    offset = converted(tl.load(offsets + at, mask=mask, other=0.0), tl.float32)
    return narrow_to(codes.to(tl.float32) * scale + offset, dtype)


@triton.jit
def narrow_to(numbers, dtype: tl.constexpr):
    """float32 to a storage dtype as the store rounds: bfloat16 halves away from zero, float16 without infinities."""
    if dtype == tl.bfloat16:
        numbers = _narrowed(numbers, 0x8000)
    elif dtype == tl.float16:
        numbers = tl.minimum(tl.maximum(numbers, -65504.0), 65504.0).to(tl.float16)
    return numbers


def quantize_on_device(
    numbers: Tensor, *, bits: int, group_tokens: int, group_channels: int, num_exact: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and offsets as `quantize.quantize_reference` gives them."""
    num_heads, num_tokens, head_dim = numbers.shape
    numbers = numbers if numbers.stride(2) == 1 else numbers.contiguous()
    half = head_dim // 2
    dtype, width = (torch.int8, head_dim) if bits == 8 else (torch.uint8, half)
    codes = torch.empty((num_heads, num_tokens, width), dtype=dtype, device=numbers.device)
    groups = (num_heads, triton.cdiv(num_tokens, group_tokens), triton.cdiv(head_dim, group_channels))
    scales, offsets = (torch.empty(groups, dtype=torch.bfloat16, device=numbers.device) for _ in range(2))
    if not numbers.numel():
        return codes, scales, offsets
    tensors = (numbers, codes, scales, offsets, num_tokens, num_exact, *numbers.stride()[:2])
    sizes = {"half": half, "block_half": triton.next_power_of_2(half), "bits": bits, "enable_fp_fusion": False}
    if group_tokens > 1 or group_channels == 1:
        block_tokens = triton.next_power_of_2(group_tokens)
        code_token_groups[(groups[1], num_heads)](
            *tensors, group_tokens=group_tokens, block_tokens=block_tokens, **sizes
        )
    else:
        code_channel_groups[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_heads)](
            *tensors, group_channels=group_channels, num_groups=groups[2], block_tokens=BLOCK_TOKENS, **sizes
        )
    return codes, scales, offsets


def dequantize_on_device(
    codes: Tensor, scales: Tensor, offsets: Tensor, *, group_tokens: int, group_channels: int, dtype: torch.dtype
) -> Tensor:
    """Numbers as `quantize.dequantize_reference` gives them."""
    num_heads, num_tokens, width = codes.shape
    head_dim = width if code_bits(codes) == 8 else 2 * width
    out = torch.empty((num_heads, num_tokens, head_dim), dtype=dtype, device=codes.device)
    if num_tokens:
        decode[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_heads)](
            codes, scales, offsets, out, num_tokens, scales.shape[1], *codes.stride()[:2],
            group_tokens=group_tokens, group_channels=group_channels, half=head_dim // 2,
            block_half=triton.next_power_of_2(head_dim // 2), block_tokens=BLOCK_TOKENS, bits=code_bits(codes),
            enable_fp_fusion=False,
        )  # fmt: skip
    return out
