"""Products of pairs of int16, summed in int32: what x86 processors without tiles do most of in a cycle.

In: vectors of int32, each lane two int16. Out: in each lane the sum of both products, exact if it fits.
"""

from __future__ import annotations

from functools import cache

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir

from cag_kernels.cpu.emit import INT16, INT32, Emitter, Value

_HALF = 8  # lanes of a vector of AVX2


def has_pairs() -> bool:
    """Whether this processor multiplies pairs."""
    return bool(llvm.get_host_cpu_features().get("avx2", False))


@cache
def pairs_win(lanes: int) -> bool:
    """Whether it multiplies pairs in vectors of so many lanes, twice as many numbers as fused multiply-adds do. Asked
    for each call, and LLVM takes a third of a millisecond to tell what a processor has."""
    features = llvm.get_host_cpu_features()
    if lanes == 2 * _HALF:
        return bool(features.get("avx512bw", False) and features.get("avx512vnni", False))
    return has_pairs()


def emit_pairs(emit: Emitter, left: Value, right: Value) -> Value:
    """The products of a vector of 8 or 16 lanes; in halves where vectors are wider than the processor's."""
    if emit.lanes == _HALF or llvm.get_host_cpu_features().get("avx512bw", False):
        return _multiply(emit, left, right, emit.lanes)
    builder = emit.builder
    halves = []
    for first in range(0, emit.lanes, _HALF):
        lanes = ir.Constant(ir.VectorType(INT32, _HALF), list(range(first, first + _HALF)))
        own_left, own_right = (builder.shuffle_vector(part, part, lanes) for part in (left, right))
        halves.append(_multiply(emit, own_left, own_right, _HALF))
    return builder.shuffle_vector(*halves, ir.Constant(emit.integers, list(range(emit.lanes))))


def _multiply(emit: Emitter, left: Value, right: Value, lanes: int) -> Value:
    builder = emit.builder
    pairs, whole = ir.VectorType(INT16, 2 * lanes), ir.VectorType(INT32, lanes)
    name = "llvm.x86.avx512.pmaddw.d.512" if lanes == 2 * _HALF else "llvm.x86.avx2.pmadd.wd"
    function = emit.function.module.declare_intrinsic(name, fnty=ir.FunctionType(whole, [pairs, pairs]))
    return builder.call(function, [builder.bitcast(part, pairs) for part in (left, right)])
