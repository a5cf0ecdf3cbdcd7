"""The end of decoding as vector instructions: one row of sums to the bfloat16 numbers of a head.

Every step rounds as docs/format.md 5.4 says: one product, one sum, two products and one sum for a rotation.
"""

from __future__ import annotations

from typing import Any

from cag_store.codecs.emitting import (
    INT16,
    INT32,
    INT64,
    cgutils,
    constant,
    extending,
    ir,
    load,
    pointer,
    types,
)

WIDTH = 16
_SUMS = ir.VectorType(INT32, WIDTH)
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)
_NARROW = ir.VectorType(INT16, WIDTH)
_HALF, _SHIFT = 0x8000, 16


def _emit_row(builder: Any, arguments: Any) -> None:
    sums, scale, mean, cosines, sines, num_turned, num_vectors, out = arguments

    def value(index: Any) -> Any:
        at = builder.shl(index, INT64(6))
        number = builder.sitofp(load(builder, sums, at, _SUMS, 4), _FLOATS)
        product = builder.fmul(number, load(builder, scale, at, _FLOATS, 4))
        return builder.fadd(product, load(builder, mean, at, _FLOATS, 4))

    def put(index: Any, numbers: Any) -> None:
        bits = builder.add(builder.bitcast(numbers, _SUMS), constant(_SUMS, _HALF))
        narrow = builder.trunc(builder.lshr(bits, constant(_SUMS, _SHIFT)), _NARROW)
        builder.store(narrow, pointer(builder, out, builder.shl(index, INT64(5)), _NARROW), align=2)

    with cgutils.for_range(builder, num_turned, intp=INT64) as loop:
        at = builder.shl(loop.index, INT64(6))
        cosine, sine = load(builder, cosines, at, _FLOATS, 4), load(builder, sines, at, _FLOATS, 4)
        other = builder.add(loop.index, num_turned)
        first, second = value(loop.index), value(other)
        put(loop.index, builder.fsub(builder.fmul(first, cosine), builder.fmul(second, sine)))
        put(other, builder.fadd(builder.fmul(second, cosine), builder.fmul(first, sine)))
    plain = builder.shl(num_turned, INT64(1))
    with cgutils.for_range(builder, builder.sub(num_vectors, plain), intp=INT64) as loop:
        index = builder.add(loop.index, plain)
        put(index, value(index))


def _finish_row(
    typing_context: Any,  # noqa: ARG001
    sums: Any,
    scale: Any,
    mean: Any,
    cosines: Any,
    sines: Any,
    num_turned: Any,
    num_vectors: Any,
    out: Any,
) -> Any:
    """One token of a head, from addresses: sums int32, scale and mean float32, cosines and sines of the token, vectors
    of WIDTH pairs ("halves" pairing) and of channels, and where the bfloat16 numbers go."""
    del sums, scale, mean, cosines, sines, num_turned, num_vectors, out

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _emit_row(builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


finish_row = extending.intrinsic(_finish_row)
