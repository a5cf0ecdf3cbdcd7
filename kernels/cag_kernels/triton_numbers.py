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
def biased(codes, dtype: tl.constexpr, bits: tl.constexpr):
    """Codes as numbers of `dtype` that are `code_bias(dtype, bits)` too large.

    A 4-bit code becomes the low bits of a float's mantissa, which takes one instruction and no conversion.
    """
    if bits == 4 and dtype == tl.bfloat16:
        numbers = (codes.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
    elif bits == 4 and dtype == tl.float16:
        numbers = (codes.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
    else:
        numbers = converted(codes, dtype)
    return numbers


@triton.jit
def code_bias(dtype: tl.constexpr, bits: tl.constexpr):
    """What `biased` adds."""
    if bits == 4 and dtype == tl.bfloat16:
        bias = 128.0
    elif bits == 4 and dtype == tl.float16:
        bias = 1024.0
    else:
        bias = 0.0
    return bias


@triton.jit
def code_middle(bits: tl.constexpr):
    """The middle of the codes' range: what is rounded should be multiplied by small numbers only."""
    return 7.5 if bits == 4 else 0.0


@triton.jit
def widened(codes, bits: tl.constexpr):
    """Codes as float32, exact."""
    if bits == 4:
        numbers = ((codes.to(tl.int32) << 16) | 0x43000000).to(tl.float32, bitcast=True) - 128.0
    else:
        numbers = codes.to(tl.float32)
    return numbers
