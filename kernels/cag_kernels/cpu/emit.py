"""Emitting vector code: a thin layer over llvmlite's builder with loops, widening loads and an exponential.

Knows LLVM and the width of this processor's registers, not what is computed with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]

Value = Any  # llvmlite's values carry no types for a checker
POINTER = ir.PointerType()
FLOAT = ir.FloatType()
HALF = ir.HalfType()
INT1 = ir.IntType(1)
INT8 = ir.IntType(8)
INT16 = ir.IntType(16)
INT32 = ir.IntType(32)
INT64 = ir.IntType(64)
LINE_BYTES = 64  # of a processor's cache
SECOND_CACHE = 2  # see `Emitter.prefetch`
UNSEEN = -3.0e38  # below every score of finite inputs: the running maximum before the first key
ELEMENTS = {torch.bfloat16: INT16, torch.float16: INT16, torch.float32: FLOAT}  # of their size in memory
_LEAST_EXPONENT, _NO_EXPONENT = -126.0, -127.0  # of a float32 above 0; the bits of the other are those of 0
ROUNDING = 1.5 * 2.0**23  # a number of up to 22 bits plus this: the lowest bits of the sum are the nearest integer
# of 2**f for |f| <= 1/2, exactly 1 at 0, elsewhere to 3e-6: five terms with the least largest error (Lawson's weights)
_SHORT_TERMS = (1.0, 0.693124193, 0.240240986, 0.055906426, 0.009582853)
_TAYLOR_TERMS = 8  # of 2**f for |f| <= 1/2: the rest is below 2**-27, an eighth of float32's spacing


class Loop:
    """One loop under construction: its counter, the values carried into an iteration and those that leave it."""

    def __init__(self, index: Value, values: list[Value]) -> None:
        self.index = index
        self.values = values
        self.following: Sequence[Value] = values


class Emitter:
    """Instructions of one function on vectors of `lanes` float32.

    Every loop runs at least once; callers see to it that no range is empty.
    """

    def __init__(self, function: ir.Function, lanes: int, builder: ir.IRBuilder | None = None) -> None:
        """Of a new function, or with the builder of one that is under construction."""
        self.function = function
        self.lanes = lanes
        self.vector = ir.VectorType(FLOAT, lanes)
        self.integers = ir.VectorType(INT32, lanes)
        self.builder = ir.IRBuilder(function.append_basic_block("entry")) if builder is None else builder

    def beside(self, lanes: int) -> Emitter:
        """For vectors of another width in the same place of the same function."""
        return Emitter(self.function, lanes, self.builder)

    @contextmanager
    def loop(self, start: Value, stop: Value, step: int | Value, carried: Sequence[Value] = ()) -> Iterator[Loop]:
        """Loop from `start` up to `stop`; set `following` inside, read it behind the loop."""
        builder = self.builder
        before = builder.block
        body, behind = function_blocks(self.function, "body", "behind")
        builder.branch(body)
        builder.position_at_end(body)
        index = builder.phi(INT64)
        values = [builder.phi(value.type) for value in carried]
        loop = Loop(index, values)
        yield loop
        advanced = builder.add(index, self.integer(step) if isinstance(step, int) else step)
        builder.cbranch(builder.icmp_signed("<", advanced, stop), body, behind)
        for phi, first, then in zip([index, *values], [start, *carried], [advanced, *loop.following], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(then, body if builder.block is body else builder.block)
        builder.position_at_end(behind)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Instructions that run where `condition` holds; nothing of them is used behind."""
        inside, behind = function_blocks(self.function, "inside", "behind")
        self.builder.cbranch(condition, inside, behind)
        self.builder.position_at_end(inside)
        yield
        self.builder.branch(behind)
        self.builder.position_at_end(behind)

    @contextmanager
    def bits(self, mask: Value) -> Iterator[Value]:
        """Instructions for each bit that is set in an int64, with its number, from the lowest on."""
        builder = self.builder
        zero = self.integer(0)
        with self.when(builder.icmp_unsigned("!=", mask, zero)):
            before, (body, behind) = builder.block, function_blocks(self.function, "bit", "behind")
            builder.branch(body)
            builder.position_at_end(body)
            left = builder.phi(INT64)
            yield builder.cttz(left, ir.Constant(INT1, 1))
            fewer = builder.and_(left, builder.sub(left, self.integer(1)))
            builder.cbranch(builder.icmp_unsigned("!=", fewer, zero), body, behind)
            left.add_incoming(mask, before)
            left.add_incoming(fewer, builder.block)
            builder.position_at_end(behind)

    def integer(self, value: int) -> Value:
        """An index."""
        return ir.Constant(INT64, value)

    def minimum(self, left: Value, right: Value) -> Value:
        """The smaller of two indices."""
        return self.builder.select(self.builder.icmp_signed("<", left, right), left, right)

    def rounded_up(self, count: Value, size: Value) -> Value:
        """How many of `size` hold `count`, both above 0."""
        return self.builder.udiv(self.builder.add(count, self.builder.sub(size, self.integer(1))), size)

    def variable(self, value: Value) -> Value:
        """Address of an int64 on the stack that begins with a value."""
        memory = self.builder.alloca(INT64)
        memory.type = POINTER  # llvmlite still gives it a typed pointer
        self.builder.store(value, memory)
        return memory

    def scratch(self, count: int) -> Value:
        """`count` float32 on the stack."""
        memory = self.builder.alloca(FLOAT, size=count)
        memory.align = 64
        memory.type = POINTER  # llvmlite still gives it a typed pointer
        return memory

    def bytes_on_stack(self, count: int) -> Value:
        """Uninitialized memory of the calling function."""
        memory = self.builder.alloca(INT8, size=count)
        memory.align = 64
        memory.type = POINTER
        return memory

    def at(self, pointer: Value, index: Value | int, element: Any = FLOAT) -> Value:
        """Address of an element."""
        index = self.integer(index) if isinstance(index, int) else index
        return self.builder.gep(pointer, [index], source_etype=element)

    def opaque(self, pointer: Value) -> Value:
        """The same address, of which the compiler knows nothing: it has a register of its own, and what lies near is
        found from there. Addresses of two registers, which it would take for loops, are no part of an instruction that
        computes on some processors, and take a place beside it."""
        kind = ir.FunctionType(POINTER, [POINTER])
        return self.builder.call(ir.InlineAsm(kind, "", "=r,0", side_effect=False), [pointer])

    def constant(self, value: float) -> Value:
        """A vector of one number."""
        return ir.Constant(self.vector, [value] * self.lanes)

    def load(self, pointer: Value) -> Value:
        """A vector from anywhere in memory."""
        return self.builder.load(pointer, typ=self.vector, align=4)

    def store(self, value: Value, pointer: Value) -> None:
        """A vector to anywhere in memory."""
        self.builder.store(value, pointer, align=4)

    def load_integers(self, pointer: Value) -> Value:
        """A vector of int32 from anywhere in memory."""
        return self.builder.load(pointer, typ=self.integers, align=4)

    def load_bfloat16(self, pointer: Value) -> Value:
        """A vector of bfloat16, widened: its bits are the upper half of a float32's."""
        return self.widened(self.builder.load(pointer, typ=ir.VectorType(INT16, self.lanes), align=2))

    def load_bfloat16_pairs(self, pointer: Value) -> tuple[Value, Value]:
        """Twice as many bfloat16 as a vector has lanes, widened: those at even places, and those at odd ones."""
        return self.widened_pair(self.builder.load(pointer, typ=self.integers, align=2))

    def load_float(self, pointer: Value, kind: torch.dtype) -> Value:
        """A vector of numbers of a type, as float32."""
        if kind is torch.float32:
            return self.load(pointer)
        if kind is torch.bfloat16:
            return self.load_bfloat16(pointer)
        halves = self.builder.load(pointer, typ=ir.VectorType(HALF, self.lanes), align=2)
        return self.builder.fpext(halves, self.vector)

    def load_transposed(self, pointers: Sequence[Value], kind: torch.dtype) -> list[Value]:
        """Of as many rows of numbers of a type as a vector has lanes, from each pointer on: vectors of one column
        each, as float32, `columns_at_once` of them."""
        if kind is not torch.bfloat16:
            return self.transposed([self.load_float(pointer, kind) for pointer in pointers])
        pairs = self.transposed([self.builder.load(pointer, typ=self.integers, align=2) for pointer in pointers])
        return [column for pair in pairs for column in self.widened_pair(pair)]

    def columns_at_once(self, kind: torch.dtype) -> int:
        """How many `load_transposed` gives: bfloat16 is turned in pairs, before it is widened."""
        return 2 * self.lanes if kind is torch.bfloat16 else self.lanes

    def widened(self, halves: Value) -> Value:
        """Int16 that are bfloat16, as float32."""
        wide = self.builder.zext(halves, self.integers)
        return self.builder.bitcast(self.builder.shl(wide, self._integers(16)), self.vector)

    def load_one_bfloat16(self, pointer: Value) -> Value:
        """A single one, as float32."""
        half = self.builder.load(pointer, typ=INT16, align=2)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(half, INT32), ir.Constant(INT32, 16)), FLOAT)

    def prefetch(self, pointer: Value, *, near: int = 3) -> None:
        """Ask for the cache line at an address that is soon read; harmless where there is none. near: 3 for the first
        cache, 2 for the second."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, INT32, INT32, INT32])
        function = self.function.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
        read, data = 0, 1
        self.builder.call(function, [pointer, *(ir.Constant(INT32, option) for option in (read, near, data))])

    def spread(self, pointer: Value) -> Value:
        """One number from memory in every lane."""
        return self.spread_number(self.builder.load(pointer, typ=FLOAT, align=4))

    def spread_number(self, number: Value) -> Value:
        """A float32 in every lane."""
        return self._spread_lanes(number, self.vector)

    def spread_integer(self, number: Value) -> Value:
        """An int32 in every lane."""
        return self._spread_lanes(number, self.integers)

    def multiply_add(self, left: Value, right: Value, addend: Value) -> Value:
        """`left * right + addend`, fused where the processor has it."""
        return self._intrinsic("llvm.fmuladd", left, right, addend)

    def magnitude(self, value: Value) -> Value:
        """Absolute values, lane by lane."""
        return self._intrinsic("llvm.fabs", value)

    def larger(self, left: Value, right: Value) -> Value:
        """Lane by lane; `right` where one is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", left, right), left, right)

    def larger_integer(self, left: Value, right: Value) -> Value:
        """Lane by lane, of int32."""
        return self.builder.select(self.builder.icmp_signed(">", left, right), left, right)

    def larger_magnitude(self, value: Value, pattern: Value) -> Value:
        """Lane by lane the larger bits of a magnitude, as int32; those of what is no number are above all others."""
        return self.larger_integer(self.builder.bitcast(self.magnitude(value), self.integers), pattern)

    def across(self, value: Value, join: Callable[[Value, Value], Value]) -> Value:
        """The lanes joined by `join`, the result in every lane."""
        distance = self.lanes // 2
        while distance:
            value = join(value, self._shuffle(value, value, [lane ^ distance for lane in range(self.lanes)]))
            distance //= 2
        return value

    def transposed(self, vectors: Sequence[Value]) -> list[Value]:
        """Lane `i` of vector `j` becomes lane `j` of vector `i`: of as many vectors as lanes, of numbers of four bytes,
        or of fewer, a power of two, within each so many lanes."""
        found = list(vectors)
        distance = len(found) // 2
        while distance:
            for index in range(len(found)):
                if not index & distance:
                    first, second = found[index], found[index + distance]
                    # the lane of the pair (first, second) that belongs into each lane
                    upper = [lane + self.lanes - distance if lane & distance else lane for lane in range(self.lanes)]
                    lower = [lane + self.lanes if lane & distance else lane + distance for lane in range(self.lanes)]
                    found[index] = self._shuffle(first, second, upper)
                    found[index + distance] = self._shuffle(first, second, lower)
            distance //= 2
        return found

    def widened_pair(self, pairs: Value) -> tuple[Value, Value]:
        """The lower and the upper bfloat16 of each int32, as float32."""
        low = self.builder.shl(pairs, self._integers(16))
        high = self.builder.and_(pairs, self._integers(0xFFFF0000))
        return self.builder.bitcast(low, self.vector), self.builder.bitcast(high, self.vector)

    def reordered(self, first: Value, second: Value, numbers: Sequence[int]) -> list[Value]:
        """Two vectors whose lanes, one behind the other, hold what `numbers` says: two with lane `i` holding `i`."""
        lanes = [list(numbers).index(number) for number in range(2 * self.lanes)]
        return [self._shuffle(first, second, lanes[part : part + self.lanes]) for part in (0, self.lanes)]

    def first_lane(self, value: Value) -> Value:
        """The number in lane 0."""
        return self.builder.extract_element(value, ir.Constant(INT32, 0))

    def _spread_lanes(self, number: Value, kind: Any) -> Value:
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), number, ir.Constant(INT32, 0))
        return self._shuffle(first, first, [0] * self.lanes)

    def _shuffle(self, left: Value, right: Value, lanes: Sequence[int]) -> Value:
        return self.builder.shuffle_vector(left, right, ir.Constant(self.integers, list(lanes)))

    def exponential(self, value: Value) -> Value:
        """`exp(value)` for values up to 0, to about 1e-7; below -87.3 exactly 0. NaN stays NaN."""
        return self.power_of_two(self.builder.fmul(value, self.constant(1 / math.log(2))), _TAYLOR_TERMS)

    def power_of_two(self, exponent: Value, num_terms: int) -> Value:
        """`2 ** exponent` for exponents up to 127, by a polynomial of `num_terms` terms: 5 give 4e-5, 8 give 1e-8.
        Exactly 0 for exponents below -126."""
        builder = self.builder
        low = builder.fcmp_ordered("<", exponent, self.constant(_LEAST_EXPONENT))
        exponent = builder.select(low, self.constant(_NO_EXPONENT), exponent)
        whole = self._intrinsic("llvm.rint", exponent)
        fraction = builder.fsub(exponent, whole)
        coefficients = [math.log(2) ** power / math.factorial(power) for power in range(num_terms)]
        result = self.constant(coefficients[-1])
        for coefficient in reversed(coefficients[:-1]):
            result = self.multiply_add(result, fraction, self.constant(coefficient))
        power = builder.shl(builder.fptosi(whole, self.integers), self._integers(23))
        return builder.bitcast(builder.add(builder.bitcast(result, self.integers), power), self.vector)

    def short_exponential(self, value: Value) -> Value:
        """`exp(value)` for values up to 0, to 4e-6. Below -88 exactly 0; from there to -87.3 less than a normal number.
        NaN stays NaN."""
        builder, rounding = self.builder, self.constant(ROUNDING)
        exponent = self.larger(self.constant(_NO_EXPONENT), builder.fmul(value, self.constant(1 / math.log(2))))
        whole = builder.fadd(exponent, rounding)
        fraction = builder.fsub(exponent, builder.fsub(whole, rounding))
        result = self.constant(_SHORT_TERMS[-1])
        for coefficient in reversed(_SHORT_TERMS[:-1]):
            result = self.multiply_add(result, fraction, self.constant(coefficient))
        power = builder.shl(builder.bitcast(whole, self.integers), self._integers(23))
        return builder.bitcast(builder.add(builder.bitcast(result, self.integers), power), self.vector)

    def _integers(self, value: int) -> Value:
        return ir.Constant(self.integers, [value] * self.lanes)

    def _intrinsic(self, name: str, *arguments: Value) -> Value:
        function = self.function.module.declare_intrinsic(
            f"{name}.v{self.lanes}f32", fnty=ir.FunctionType(self.vector, [self.vector] * len(arguments))
        )
        return self.builder.call(function, arguments)


def function_blocks(function: ir.Function, *names: str) -> list[ir.Block]:
    """New basic blocks at the end of `function`."""
    return [function.append_basic_block(name) for name in names]
