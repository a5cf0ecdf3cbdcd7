"""A linear layer over a few rows by products of pairs (AVX512_BF16), over a bfloat16 weight as the checkpoint has it.

Rows are rounded to bfloat16 first. A vector holds 32 input features of an output feature and meets the same ones of up
to six rows; its 16 sums of pairs run over all input features, side by side, and are added up across the lanes in the
end. There is one such vector for each number out, whatever the number of rows, so a row has the same bits alone and in
company. Nothing is packed, so blocks of prefill keep the library's product on the same memory. Threads share the output
features out (`cpu.team`).
"""

from __future__ import annotations

import threading
from enum import IntEnum
from functools import cache

from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.dots import DEPTH, LANES, DotEmitter, has_dots, require_dots
from cag_kernels.cpu.emit import INT16, INT64, POINTER, Value, function_blocks
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.passes import emit_passes
from cag_kernels.cpu.products.plain import PlainProduct
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.tape import CompiledStep, Reads, new_call, scratch_memory
from cag_kernels.cpu.team import Share

MAX_ROWS = 6  # of a pass: with four features 24 sums, which leave registers for the features' numbers
FEATURES = 4  # output features of one turn
BLOCK_FEATURES = LANES  # whose sums are added up across lanes together
ROWS_AT_ONCE = 4 * MAX_ROWS  # whose sums are under way
LONG_ROW, STRETCH = 1024, 512  # input features from which on they are met in stretches, and of such a one
ASKED = (0, 1, 2, 4)  # of `FEATURES` lines of the weight that are read in a turn, those that are asked for

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; `BLOCK` to `OUT` are addresses."""

    NEXT_TASK = 0
    BLOCK = 1  # [num_rows, in_features] float32
    ROUNDED = 2  # the same in bfloat16
    WEIGHT = 3  # [out_features, in_features] bfloat16
    BIAS = 4  # [out_features] float32, anything where HAS_BIAS is 0
    OUT = 5  # [num_rows, out_features] float32
    NUM_ROWS = 6
    IN_FEATURES = 7  # a multiple of DEPTH
    OUT_FEATURES = 8  # at least BLOCK_FEATURES
    HAS_BIAS = 9  # 0 or 1


def serves(weight: Tensor) -> bool:
    """Whether `compiled_linear` takes this bfloat16 weight, on this processor."""
    large = weight.shape[0] >= BLOCK_FEATURES and weight.shape[1] % DEPTH == 0 and weight.shape[1] > 0
    return large and weight.is_contiguous() and has_dots()


def compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`rows [num_rows, in_features] @ weight.T + bias`, all contiguous, rows and bias float32, nothing empty; into
    `out [num_rows, out_features]` float32 if given."""
    num_rows, in_features = rows.shape
    out_features = weight.shape[0]
    out = rows.new_empty(num_rows, out_features) if out is None else out
    rounded = scratch_memory(num_rows * in_features // 2)
    parts = rows, rounded, weight, bias, out
    pointers = (0 if part is None else part.data_ptr() for part in parts)
    fields = (0, *pointers, num_rows, in_features, out_features, int(bias is not None))
    compiled_kernel().run(fields, tuple(part for part in parts if part is not None))
    return out


class DotProduct(PlainProduct):
    """`compiled_linear` with one weight and its bias."""

    def multiply(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `PlainProduct`."""
        return compiled_linear(rows, self.weight, self.bias, out)


class DotLinearKernel:
    """Machine code for every shape, run on several threads."""

    def __init__(self) -> None:
        require_dots()
        program = Program(dot_linear_module)
        self._round, self._multiply = (CompiledStep(program.address(name), program) for name in ("round", "multiply"))

    def run(self, fields: tuple[int, ...], memory: tuple[Tensor, ...]) -> None:
        """Serve one call; `fields` are `Field` in order, `memory` is what their addresses are of."""
        weight, in_features, out_features = (fields[i] for i in (Field.WEIGHT, Field.IN_FEATURES, Field.OUT_FEATURES))
        self._round.alone(new_call(fields, memory))
        reads = Reads(weight, out_features, 2 * in_features, BLOCK_FEATURES)
        self._multiply.shared(new_call(fields, memory), -(-out_features // BLOCK_FEATURES), reads)


def compiled_kernel() -> DotLinearKernel:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> DotLinearKernel:
    return DotLinearKernel()


def dot_linear_module() -> ir.Module:
    """Module with `round` and `multiply`, each of one pointer to the fields of a call."""
    module = ir.Module(name="dot_linear")
    _emit_round(_call(module, "round"))
    _Multiply(_call(module, "multiply"), [_Pass(module, rows).function for rows in range(1, MAX_ROWS + 1)])
    return module


def _call(module: ir.Module, name: str) -> Fields[DotEmitter]:
    """A function under construction and what it serves."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
    return Fields(DotEmitter(function), list(Field)[1:], range(Field.BLOCK, Field.OUT + 1))


def _emit_round(call: Fields[DotEmitter]) -> None:
    emit, builder = call.emit, call.emit.builder
    count = builder.mul(call[Field.NUM_ROWS], call[Field.IN_FEATURES])
    with emit.loop(emit.integer(0), count, DEPTH) as place:
        source = emit.at(call[Field.BLOCK], place.index)
        rounded = emit.narrowed_row(emit.load(source), emit.load(emit.at(source, LANES)))
        builder.store(rounded, emit.at(call[Field.ROUNDED], place.index, INT16), align=4)
    builder.ret_void()


class _Multiply:
    """The function that threads run: their share of the output features, a block at a time."""

    def __init__(self, call: Fields[DotEmitter], passes: list[ir.Function]) -> None:
        self.call, self.emit, self.passes = call, call.emit, passes
        self.sums = self.emit.scratch(ROWS_AT_ONCE * BLOCK_FEATURES * LANES)  # [rows, features, lanes]
        emit, builder = self.emit, self.emit.builder
        out_features, step = call[Field.OUT_FEATURES], emit.integer(BLOCK_FEATURES)
        self.num_passes = emit.rounded_up(call[Field.NUM_ROWS], emit.integer(MAX_ROWS))
        self.is_one = builder.icmp_signed("==", self.num_passes, emit.integer(1))
        is_short = builder.icmp_signed("<=", call[Field.IN_FEATURES], emit.integer(LONG_ROW))
        self.is_whole = builder.or_(is_short, self.is_one)
        self.stretch = builder.select(self.is_whole, call[Field.IN_FEATURES], emit.integer(STRETCH))
        of_pass = emit.rounded_up(call[Field.NUM_ROWS], self.num_passes)
        at_once = builder.select(self.is_whole, of_pass, emit.integer(ROWS_AT_ONCE))
        share = Share(emit, out_features, step)
        own_stop = emit.minimum(builder.mul(share.stop, share.size), out_features)
        with share.units(emit, call.place(Field.NEXT_TASK)) as unit:
            start = builder.mul(unit, share.size)
            stop = emit.minimum(builder.add(start, share.size), out_features)
            with emit.loop(start, stop, BLOCK_FEATURES) as block:
                # the last features begin early enough to be whole; what is computed again has the same bits
                feature = emit.minimum(block.index, builder.sub(out_features, step))
                is_last = builder.icmp_signed(">=", builder.add(feature, step), own_stop)
                with emit.loop(emit.integer(0), call[Field.NUM_ROWS], at_once) as rows:
                    left = builder.sub(call[Field.NUM_ROWS], rows.index)
                    self._emit_rows(feature, rows.index, emit.minimum(left, at_once), is_last)
        builder.ret_void()

    def _emit_rows(self, feature: Value, first_row: Value, num_rows: Value, is_last: Value) -> None:
        """Some rows by a block of features; `is_last`: there is none behind it."""
        emit, builder, in_features = self.emit, self.emit.builder, self.call[Field.IN_FEATURES]
        num_passes = builder.select(self.is_whole, self.num_passes, emit.rounded_up(num_rows, emit.integer(MAX_ROWS)))
        weight = emit.at(self.call[Field.WEIGHT], builder.mul(feature, in_features), INT16)
        block = emit.at(self.call[Field.ROUNDED], builder.mul(first_row, in_features), INT16)
        with emit.loop(emit.integer(0), in_features, self.stretch) as begin:
            left = builder.sub(in_features, begin.index)
            count = emit.minimum(left, self.stretch)
            ahead, asks = self._ahead(begin.index, is_last)

            def arguments(row: Value) -> list[Value]:
                place = builder.add(builder.mul(row, in_features), begin.index)
                sums = emit.at(self.sums, builder.mul(row, emit.integer(BLOCK_FEATURES * LANES)))
                shared = builder.select(self.is_whole, self.call[Field.NUM_ROWS], num_rows)
                place_of = builder.select(self.is_whole, builder.add(first_row, row), row)
                number = builder.udiv(builder.mul(place_of, num_passes), shared)
                skipped, asked = _asked(emit, num_passes, number, asks)
                from_row = emit.at(weight, builder.add(begin.index, builder.mul(skipped, in_features)), INT16)
                sides = emit.at(weight, begin.index, INT16), emit.at(block, place, INT16)
                return [*sides, sums, emit.at(from_row, ahead, INT16), in_features, count, begin.index, asked]

            emit_passes(emit, num_rows, self.passes, arguments)
        self._emit_end(feature, first_row, num_rows)

    def _ahead(self, begin: Value, is_last: Value) -> tuple[Value, Value]:
        """How far behind what is read the numbers lie that are asked for, and whether there are any: the next stretch,
        or of the next block the first; where a single pass reads whole rows, the next ones."""
        emit, builder, in_features = self.emit, self.emit.builder, self.call[Field.IN_FEATURES]
        following = builder.add(begin, self.stretch)
        ends = builder.icmp_signed(">=", following, in_features)
        features = builder.select(self.is_one, emit.integer(FEATURES), emit.integer(BLOCK_FEATURES))
        beyond = builder.sub(builder.mul(features, in_features), begin)
        ahead = builder.select(ends, beyond, self.stretch)
        return ahead, builder.not_(builder.and_(ends, is_last))

    def _emit_end(self, feature: Value, first_row: Value, num_rows: Value) -> None:
        """Add up across lanes, add the biases and write."""
        emit, builder, call = self.emit, self.emit.builder, self.call
        before, (some, behind) = builder.block, function_blocks(emit.function, "biases", "write")
        builder.cbranch(builder.icmp_signed("!=", call[Field.HAS_BIAS], emit.integer(0)), some, behind)
        builder.position_at_end(some)
        loaded = emit.load(emit.at(call[Field.BIAS], feature))
        builder.branch(behind)
        builder.position_at_end(behind)
        bias = builder.phi(emit.vector)
        bias.add_incoming(loaded, some)
        bias.add_incoming(emit.constant(0.0), before)
        with emit.loop(emit.integer(0), num_rows, 1) as row:
            first = emit.at(self.sums, builder.mul(row.index, emit.integer(BLOCK_FEATURES * LANES)))
            parts = [emit.load(emit.at(first, one * LANES)) for one in range(BLOCK_FEATURES)]
            line = builder.mul(builder.add(first_row, row.index), call[Field.OUT_FEATURES])
            place = emit.at(call[Field.OUT], builder.add(line, feature))
            emit.store(builder.fadd(emit.sums_across(parts), bias), place)


def _asked(emit: DotEmitter, num_passes: Value, number: Value, asks: Value) -> tuple[Value, Value]:
    """Of the `FEATURES` that are read in a turn of a pass, the first whose line behind is asked for, and of how many
    (`ASKED`): all passes together ask for each."""
    builder, four = emit.builder, emit.integer(FEATURES)
    few = builder.select(builder.icmp_signed("<", num_passes, four), emit.integer(2), emit.integer(1))
    lines = builder.select(builder.icmp_signed("==", num_passes, emit.integer(1)), four, few)
    first = builder.mul(lines, number)
    is_one_of_them = builder.icmp_signed("<", first, four)
    return first, builder.select(builder.and_(asks, is_one_of_them), lines, emit.integer(0))


class _Pass:
    """`rows` rows by `BLOCK_FEATURES` output features and some input features.

    Arguments: the features' weights, the rows' numbers, their sums `[rows, features, lanes]`, and what is asked for
    meanwhile; then numbers from one feature, or row, to the next, how many of them meet, how many have, and how many
    features are asked for in a turn.
    """

    def __init__(self, module: ir.Module, rows: int) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 4 + [INT64] * 4)
        self.function = ir.Function(module, kind, name=f"rows_{rows}")
        self.function.linkage = "internal"
        self.emit, self.rows = DotEmitter(self.function), range(rows)
        self.weight, self.block, self.sums, self.ahead = self.function.args[:4]
        self.apart, self.count, self.before, self.asked = self.function.args[4:]
        self._emit_features()

    def _emit_features(self) -> None:
        emit, builder = self.emit, self.emit.builder
        behind = self.function.append_basic_block("behind")
        switch = builder.switch(self.asked, behind)
        for asked in ASKED:
            (block,) = function_blocks(self.function, f"asking_{asked}")
            switch.add_case(emit.integer(asked), block)
            builder.position_at_end(block)
            with emit.loop(emit.integer(0), emit.integer(BLOCK_FEATURES), FEATURES) as feature:
                self._emit_sums(feature.index, asked)
            builder.branch(behind)
        builder.position_at_end(behind)
        builder.ret_void()

    def _emit_sums(self, feature: Value, asked: int) -> None:
        """Sums of some features for all rows, in registers meanwhile."""
        emit, builder = self.emit, self.emit.builder
        skipped = builder.mul(feature, self.apart)
        begin, ahead = emit.at(self.weight, skipped, INT16), emit.at(self.ahead, skipped, INT16)
        apart = [builder.mul(self.apart, emit.integer(number)) for number in range(max(FEATURES, len(self.rows)))]
        with emit.loop(emit.integer(0), self.count, DEPTH, self._emit_start(feature)) as depth:
            places = [builder.add(line, depth.index) for line in apart]
            turned = builder.mul(depth.index, emit.integer(FEATURES))
            weights = [emit.load_integers(emit.at(begin, place, INT16)) for place in places[:FEATURES]]
            asking = (
                [builder.add(turned, emit.integer(line * DEPTH)) for line in range(asked)]
                if asked == FEATURES
                else places[:asked]
            )
            for place in asking:
                emit.prefetch(emit.at(ahead, place, INT16))
            sums = list(depth.values)
            for row in self.rows:
                numbers = emit.load_integers(emit.at(self.block, places[row], INT16))
                for one, weight in enumerate(weights):
                    index = row * FEATURES + one
                    sums[index] = emit.add_pairs(sums[index], weight, numbers)
            depth.following = sums
        for place, value in zip(self._places(feature), depth.following, strict=True):
            emit.store(value, place)

    def _emit_start(self, feature: Value) -> list[Value]:
        """Sums of the input features before; nothing before the first."""
        emit, builder = self.emit, self.emit.builder
        first, (some, behind) = builder.block, function_blocks(self.function, "before", "sums")
        builder.cbranch(builder.icmp_signed("!=", self.before, emit.integer(0)), some, behind)
        builder.position_at_end(some)
        loaded = [emit.load(place) for place in self._places(feature)]
        builder.branch(behind)
        builder.position_at_end(behind)
        found = []
        for value in loaded:
            found.append(builder.phi(emit.vector))
            found[-1].add_incoming(value, some)
            found[-1].add_incoming(emit.constant(0.0), first)
        return found

    def _places(self, feature: Value) -> list[Value]:
        """Of the sums, row by row."""
        first = self.emit.at(self.sums, self.emit.builder.mul(feature, self.emit.integer(LANES)))
        shifts = [(row * BLOCK_FEATURES + one) * LANES for row in self.rows for one in range(FEATURES)]
        return [self.emit.at(first, shift) for shift in shifts]
