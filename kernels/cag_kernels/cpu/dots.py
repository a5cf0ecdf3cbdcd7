"""Vectors of bfloat16 (AVX512_BF16): products of pairs, summed in float32, twice as many as fused multiply-adds.

In: vectors of int32, each lane a pair of bfloat16. Out: in each lane the sum so far and both products; what is too
small for a normal number counts as 0. Knows nothing of attention or linear layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir

from cag_kernels.cpu.emit import INT16, INT32, Emitter, Value

LANES = 16  # of a vector of float32
DEPTH = 32  # numbers of the summed axis in one product
FEW_TERMS = 4  # of 2 ** f for 0 <= f < 1

_POLYNOMIAL = (0.99992519, 0.69583363, 0.22606727, 0.07802428)  # of least relative error, 7.5e-5
_HALVES = ir.VectorType(INT16, DEPTH)
_FLOOR, _CURRENT_DIRECTION = 1, 4  # of vreduceps and of vscalefps
_HALF_LANE = 4  # numbers of 16 bits in half of the 128 bits within which the cheap permutations work


@cache
def has_dots() -> bool:
    """Whether this processor has such products."""
    features = llvm.get_host_cpu_features()
    return all(features.get(name, False) for name in ("avx512f", "avx512bw", "avx512dq", "avx512bf16"))


def require_dots() -> None:
    """Raises: RuntimeError on a processor without them."""
    if not has_dots():
        raise RuntimeError("this processor has no products of bfloat16 (AVX512_BF16)")


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class DotEmitter(Emitter):
    """Instructions on vectors of 16 float32 and of 32 bfloat16, as 16 int32."""

    def __init__(self, function: ir.Function) -> None:
        require_dots()
        super().__init__(function, LANES)

    def add_pairs(self, total: Value, left: Value, right: Value) -> Value:
        """`total` and the products of both numbers of each lane; vectors of 16 int32."""
        pairs = ir.VectorType(_BFloat(), DEPTH)
        kind = ir.FunctionType(self.vector, [self.vector, pairs, pairs])
        function = self.function.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", fnty=kind)
        return self.builder.call(function, [total, *(self.builder.bitcast(part, pairs) for part in (left, right))])

    def sums_across(self, vectors: Sequence[Value]) -> Value:
        """Of 16 vectors: lane `i` holds the sum of the lanes of vector `i`."""
        found, distance = list(vectors), LANES // 2
        assert len(found) == LANES
        while distance:
            # of two vectors the parts with the bit of `distance`, and those without, are added side by side
            halves = []
            for first, second in zip(found[:distance], found[distance:], strict=True):
                low = [lane if not lane & distance else LANES + lane - distance for lane in range(LANES)]
                high = [lane + distance if not lane & distance else LANES + lane for lane in range(LANES)]
                halves.append(self.builder.fadd(self._shuffle(first, second, low), self._shuffle(first, second, high)))
            found, distance = halves, distance // 2
        return found[0]

    def pairs(self, even: Value, odd: Value) -> Value:
        """Two vectors of finite float32, rounded to the nearest bfloat16 (ties away from zero), lane by lane side by
        side: vector of 16 int32."""
        builder, half = self.builder, self._integers(1 << 15)
        low, high = (builder.add(builder.bitcast(value, self.integers), half) for value in (even, odd))
        rows = [builder.bitcast(value, _HALVES) for value in (builder.lshr(low, self._integers(16)), high)]
        numbers = builder.shuffle_vector(*rows, self._both([i if i % 2 == 0 else i + DEPTH for i in range(DEPTH)]))
        return builder.bitcast(numbers, self.integers)

    def load_pairs(self, even: Value, odd: Value) -> list[Value]:
        """Two places in memory that hold 32 bfloat16 each, number by number side by side: two vectors of 16 int32, of
        the lower and of the upper four numbers of each eight."""
        rows = [self.builder.load(place, typ=_HALVES, align=2) for place in (even, odd)]
        found = []
        for upper in (0, _HALF_LANE):
            near = [2 * lane - lane % _HALF_LANE + upper for lane in range(LANES)]
            lanes = [number + odd for number in near for odd in (0, DEPTH)]
            found.append(self.builder.bitcast(self.builder.shuffle_vector(*rows, self._both(lanes)), self.integers))
        return found

    def narrowed_pairs(self, even: Value, odd: Value) -> Value:
        """Two vectors of float32, rounded to the nearest bfloat16 (ties to even), lane by lane side by side: vector of
        16 int32."""
        both = self._narrowed_both(even, odd)
        lanes = [lane // 2 + LANES * (lane % 2) for lane in range(DEPTH)]
        return self.builder.bitcast(self.builder.shuffle_vector(both, both, self._both(lanes)), self.integers)

    def narrowed_row(self, low: Value, high: Value) -> Value:
        """32 float32 in order, rounded to bfloat16: vector of 16 int32."""
        return self.builder.bitcast(self._narrowed_both(low, high), self.integers)

    def power_of_two(self, exponent: Value, num_terms: int) -> Value:
        """As `Emitter.power_of_two`; `FEW_TERMS` use what the processor has for it, and give 8e-5."""
        if num_terms != FEW_TERMS:
            return super().power_of_two(exponent, num_terms)
        # 2 ** x = 2 ** floor(x) * 2 ** (x - floor(x)), the second by a polynomial
        fraction = self._masked("reduce.ps.512", exponent, ir.Constant(INT32, _FLOOR))
        result = self.constant(_POLYNOMIAL[-1])
        for coefficient in reversed(_POLYNOMIAL[:-1]):
            result = self.multiply_add(result, fraction, self.constant(coefficient))
        return self._masked("scalef.ps.512", result, exponent)

    def _narrowed_both(self, low: Value, high: Value) -> Value:
        """One behind the other, vector of 32 int16."""
        numbers = self.builder.shuffle_vector(low, high, self._both(range(DEPTH)))
        narrow = self.builder.fptrunc(numbers, ir.VectorType(_BFloat(), DEPTH))
        return self.builder.bitcast(narrow, _HALVES)

    def _both(self, lanes: Sequence[int]) -> Value:
        return ir.Constant(ir.VectorType(INT32, DEPTH), list(lanes))

    def _masked(self, name: str, *arguments: Value) -> Value:
        """An instruction of AVX-512 for all lanes, rounding as the thread does."""
        everything, nearest = ir.Constant(INT16, -1), ir.Constant(INT32, _CURRENT_DIRECTION)
        operands = [*arguments, self.constant(0.0), everything, nearest]
        kind = ir.FunctionType(self.vector, [value.type for value in operands])
        function = self.function.module.declare_intrinsic(f"llvm.x86.avx512.mask.{name}", fnty=kind)
        return self.builder.call(function, operands)
