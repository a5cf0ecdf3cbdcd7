"""Numbers inside Triton kernels: rounding, products and codes that mean the same compiled and in the interpreter.

The interpreter keeps bfloat16 as bit patterns: it cuts off where a processor rounds, and multiplies the patterns. What
goes through these functions is right in both. They are inlined; none is launched.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

EMULATED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 4 bytes to 4 + 4 floats: $0, $1 from the low nibbles, $2, $3 from the high ones, under the exponent of 1,024
_NIBBLES = """{
    .reg .b32 low, high;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 $0, low, 0x64646464, 0x4140;
    prmt.b32 $1, low, 0x64646464, 0x4342;
    prmt.b32 $2, high, 0x64646464, 0x4140;
    prmt.b32 $3, high, 0x64646464, 0x4342;
}"""
# the same for bfloat16, and then `(number - 128) * scale + offset` with one rounding: $5 to $8 are the scales of the
# low and of the high nibbles' numbers, $9 to $12 their offsets, two in a register
_DEQUANTIZED = """{
    .reg .b32 low, high, n0, n1, n2, n3, one, bias;
    and.b32 low, $4, 0x0F0F0F0F;
    shr.u32 high, $4, 4;
    and.b32 high, high, 0x0F0F0F0F;
    prmt.b32 n0, low, 0x43434343, 0x4140;
    prmt.b32 n1, low, 0x43434343, 0x4342;
    prmt.b32 n2, high, 0x43434343, 0x4140;
    prmt.b32 n3, high, 0x43434343, 0x4342;
    mov.b32 one, 0x3F803F80;
    mov.b32 bias, 0xC300C300;
    fma.rn.bf16x2 n0, n0, one, bias;
    fma.rn.bf16x2 n1, n1, one, bias;
    fma.rn.bf16x2 n2, n2, one, bias;
    fma.rn.bf16x2 n3, n3, one, bias;
    fma.rn.bf16x2 $0, n0, $5, $9;
    fma.rn.bf16x2 $1, n1, $6, $10;
    fma.rn.bf16x2 $2, n2, $7, $11;
    fma.rn.bf16x2 $3, n3, $8, $12;
}"""
# 4 signed bytes to 4 bfloat16 `byte * scale + offset`: 7 bits under the exponent of 128, minus 128 or, for a negative
# one, 256; $3, $4 are the scales, $5, $6 the offsets, two in a register
_DEQUANTIZED_BYTES = """{
    .reg .b32 seven, sign, n0, n1, b0, b1, one;
    and.b32 seven, $2, 0x7F7F7F7F;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 n0, seven, 0x43434343, 0x4140;
    prmt.b32 n1, seven, 0x43434343, 0x4342;
    prmt.b32 b0, sign, 0xC3C3C3C3, 0x4140;
    prmt.b32 b1, sign, 0xC3C3C3C3, 0x4342;
    mov.b32 one, 0x3F803F80;
    fma.rn.bf16x2 n0, n0, one, b0;
    fma.rn.bf16x2 n1, n1, one, b1;
    fma.rn.bf16x2 $0, n0, $3, $5;
    fma.rn.bf16x2 $1, n1, $4, $6;
}"""
DEQUANTIZED = tl.constexpr(_DEQUANTIZED)
DEQUANTIZED_BYTES = tl.constexpr(_DEQUANTIZED_BYTES)
FLOAT16_NIBBLES = tl.constexpr(_NIBBLES)


@triton.jit
def rounded(numbers, dtype: tl.constexpr):
    """float32 `numbers` in `dtype`, to nearest even."""
    if EMULATED and dtype == tl.bfloat16:
        bits = numbers.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        narrow = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = numbers.to(dtype)
    return narrow


@triton.jit
def converted(numbers, dtype: tl.constexpr):
    """Integers or floats in another floating dtype, to nearest even."""
    if numbers.dtype == dtype:
        result = numbers
    elif EMULATED:
        result = rounded(numbers.to(tl.float32), dtype)
    else:
        result = numbers.to(dtype)
    return result


@triton.jit
def product(left, right, total):
    """`total + left @ right`, operands of one dtype, summed in float32; float32 operands are not shortened."""
    if EMULATED:
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def nibbles(packed, dtype: tl.constexpr):
    """The two 4-bit codes of each byte, low and high nibble, as numbers of `dtype` (float16, float32) that are
    `code_bias` too large.

    A code becomes the low bits of a mantissa: no conversion, and one instruction moves two codes into their floats.
    It is called impure, which it is not: the compiler would else do it in the layout of the product, byte by byte.
    """
    if dtype == tl.float32:
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
    elif EMULATED:
        low = ((packed & 15).to(tl.int16) | 0x6400).to(dtype, bitcast=True)
        high = ((packed >> 4).to(tl.int16) | 0x6400).to(dtype, bitcast=True)
    else:
        low, high = tl.inline_asm_elementwise(
            FLOAT16_NIBBLES, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=False, pack=4
        )
    return low, high


@triton.jit
def dequantized_nibbles(packed, scale_low, scale_high, offset_low, offset_high):
    """`code * scale + offset` of the two 4-bit codes of each byte, low and high nibble, rounded once to bfloat16.

    Scales and offsets are bfloat16 and broadcast to `packed`. It is called impure for the reason that `nibbles` is.
    """
    if EMULATED:
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        low = rounded(low * scale_low.to(tl.float32) + offset_low.to(tl.float32), tl.bfloat16)
        high = rounded(high * scale_high.to(tl.float32) + offset_high.to(tl.float32), tl.bfloat16)
    else:
        low, high = tl.inline_asm_elementwise(
            DEQUANTIZED, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r", [packed, scale_low, scale_high, offset_low, offset_high],
            dtype=(tl.bfloat16, tl.bfloat16), is_pure=False, pack=4,
        )  # fmt: skip
    return low, high


@triton.jit
def dequantized_bytes(codes, scale, offset):
    """`code * scale + offset` of 8-bit codes, rounded once to bfloat16; otherwise as `dequantized_nibbles`."""
    if EMULATED:
        result = rounded(codes.to(tl.float32) * scale.to(tl.float32) + offset.to(tl.float32), tl.bfloat16)
    else:
        result = tl.inline_asm_elementwise(
            DEQUANTIZED_BYTES, "=r,=r,r,r,r,r,r", [codes, scale, offset], dtype=tl.bfloat16, is_pure=False, pack=4
        )
    return result


@triton.jit
def fetched_ahead(places):
    """Asks for memory at some places, so that a later load finds it in the second-level cache. Waits for nothing."""
    if not EMULATED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit
def touched(places):
    """Loads a byte at each of some places for nobody, so that the 32 around it lie in the first-level cache; waits for
    nothing until its result goes to `let_go`."""
    if EMULATED:
        found = tl.load(places.to(tl.int64).to(tl.pointer_type(tl.uint8))).to(tl.int32)
    else:
        found = tl.inline_asm_elementwise(
            "ld.global.u8 $0, [$1];", "=r,l", [places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )
    return found


@triton.jit
def let_go(found, number, place):
    """The end of what `touched` found: a use that an assembler cannot leave out, and which changes nothing."""
    if not EMULATED:
        places = place + tl.zeros(found.shape, tl.int32)
        tl.inline_asm_elementwise(
            "{ .reg .pred same; setp.eq.s32 same, $1, $2; @same prefetch.global.L2 [$3]; mov.b32 $0, 0; }",
            "=r,r,r,l", [found, number, places.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def code_bias(dtype: tl.constexpr, bits: tl.constexpr):
    """What `nibbles` adds."""
    return 1024.0 if bits == 4 and dtype == tl.float16 else 0.0


@triton.jit
def code_middle(bits: tl.constexpr):
    """The middle of the codes' range: what is rounded should be multiplied by small numbers only."""
    return 7.5 if bits == 4 else 0.0
