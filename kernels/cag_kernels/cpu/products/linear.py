"""A linear layer over a few rows, compiled for this processor, over a weight that was packed for it once.

A panel of the packed weight holds 16 output features, for each input feature side by side. So the weight streams
through once in the order in which it lies, each number of it meets every row of the block in registers, and nothing is
added up across lanes. A weight in 16 bits is half as much to read and is widened on the way. Threads share panels out
(`cpu.team`); no number depends on which thread computes it, nor on how many rows there are: a row's sums take the same
turns alone and in company.

What a panel's first pass reads comes from memory, and is asked for some way ahead. Later passes find the panel in the
caches and ask for the next one, as memory would stand still meanwhile.

Where registers are many a pass has many rows, and `lay` copies these first, 64 features of all rows side by side. So a
pass finds them from one address, and in places of the first cache that do not push each other out, as those of rows of
4,096 numbers do. Of a long block as many rows are served at once as the second cache holds.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from functools import cache

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.attention.panel import host_blocking
from cag_kernels.cpu.emit import ELEMENTS, INT8, INT32, INT64, POINTER, Emitter, Value, function_blocks
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.passes import emit_passes
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.tape import CompiledStep, Reads, new_call, scratch_memory
from cag_kernels.cpu.team import Share
from cag_kernels.packed import PANEL

MAX_ROWS = {16: 24, 8: 6}  # lanes of a register -> rows whose sums fit the registers beside a panel's numbers
TILE = 64  # input features of one sum, a multiple of 16
FEATURES = 4  # input features of one turn of the loop
AHEAD_BYTES = 8192  # ahead of which a panel's first pass asks for the weight
LAYS = {16: True, 8: False}  # lanes -> whether a block is laid by tiles before it is multiplied
CACHED_BYTES = 1 << 19  # of laid rows that are served at once, if that is more than a pass has

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; all but counts are addresses."""

    NEXT_TASK = 0
    BLOCK = 1  # [num_rows, in_features] float32
    LAID = 2  # the same, where it is laid, as [tiles of TILE features, num_rows, TILE]; one row is that as it is
    WEIGHT = 3  # [num_panels, in_features, PANEL], of the type that the code was made for
    BIAS = 4  # [out_features] float32, anything where HAS_BIAS is 0
    OUT = 5  # [num_rows, out_features] float32
    NUM_ROWS = 6
    ROWS_AT_ONCE = 7
    IN_FEATURES = 8  # a multiple of 16
    OUT_FEATURES = 9
    HAS_BIAS = 10  # 0 or 1


class LinearKernel:
    """Machine code for every shape and one type of weight, run on several threads."""

    def __init__(self, dtype: torch.dtype) -> None:
        program = Program(linear_module, host_blocking().lanes, dtype)
        self._number_bytes = dtype.itemsize
        self._lay, self._multiply = (CompiledStep(program.address(name), program) for name in ("lay", "linear"))

    def run(self, fields: tuple[int, ...], memory: tuple[Tensor, ...]) -> None:
        """Serve one call; `fields` are `Field` in order, `memory` is what their addresses are of."""
        weight, in_features, out_features = (fields[i] for i in (Field.WEIGHT, Field.IN_FEATURES, Field.OUT_FEATURES))
        reads = Reads(weight, out_features, self._number_bytes * in_features, PANEL)
        if fields[Field.LAID] != fields[Field.BLOCK]:
            self._lay.shared(new_call(fields, memory), -(-in_features // TILE))
        self._multiply.shared(new_call(fields, memory), -(-out_features // PANEL), reads)


def compiled_linear(
    rows: Tensor, panels: Tensor, bias: Tensor | None, out_features: int, out: Tensor | None = None
) -> Tensor:
    """`rows [num_rows, in_features] @ weight.T + bias`, all contiguous, rows and bias float32, nothing empty; into
    `out [num_rows, out_features]` float32 if given."""
    num_rows, in_features = rows.shape
    out = rows.new_empty(num_rows, out_features) if out is None else out
    laid, at_once, lanes = rows, num_rows, host_blocking().lanes
    if num_rows > 1 and LAYS[lanes]:
        size = -(-in_features // TILE) * TILE
        laid, at_once = scratch_memory(num_rows * size), _rows_at_once(num_rows, 4 * size, MAX_ROWS[lanes])
    parts = rows, laid, panels, bias, out
    pointers = (0 if part is None else part.data_ptr() for part in parts)
    fields = (0, *pointers, num_rows, at_once, in_features, out_features, int(bias is not None))
    compiled_kernel(panels.dtype).run(fields, tuple(part for part in parts if part is not None))
    return out


def _rows_at_once(num_rows: int, row_bytes: int, pass_rows: int) -> int:
    """Of whole passes that the second cache holds, at least one; about the same number each time."""
    most = max(1, CACHED_BYTES // (row_bytes * pass_rows)) * pass_rows
    return -(-num_rows // -(-num_rows // most))


def compiled_kernel(dtype: torch.dtype) -> LinearKernel:
    """The kernel for a type of weight, compiled once a process."""
    with _lock:
        return _compile(dtype)


@cache
def _compile(dtype: torch.dtype) -> LinearKernel:
    return LinearKernel(dtype)


def linear_module(lanes: int, kept: torch.dtype) -> ir.Module:
    """Module with `lay` and `linear`, each of one pointer to the fields of a call."""
    module = ir.Module(name="linear")
    _Lay(module, lanes)
    passes = [_Pass(module, lanes, rows, kept).function for rows in range(1, MAX_ROWS[lanes] + 1)]
    _Linear(module, lanes, passes, kept)
    return module


class _Pass:
    """`rows` rows of the block by one panel.

    Arguments: the panel, the first row of the block, the panel's first bias and its first number out; then input
    features, rows of the block, numbers from a row of out to the next, biases, features of the panel, and how many
    bytes ahead the weight is asked for. Where two vectors hold a panel of bfloat16, they are those of its even and its
    odd features until the sums are done, as widening them so takes fewer instructions.
    """

    def __init__(self, module: ir.Module, lanes: int, rows: int, kept: torch.dtype) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 4 + [INT64] * 6)
        self.function = ir.Function(module, kind, name=f"rows_{rows}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, lanes)
        self.rows = range(rows)
        self.vectors = range(PANEL // lanes)
        self.kept, self.is_laid = kept, LAYS[lanes]
        self.panel, self.block, self.bias, self.out = self.function.args[:4]
        self.in_features, self.num_rows, self.out_stride, self.num_bias, self.num_out = self.function.args[4:9]
        self.ahead = self.function.args[9]
        self.in_pairs = kept is torch.bfloat16 and len(self.vectors) == 2
        self._emit_features()

    def _emit_features(self) -> None:
        """Sum tile by tile: one long sum would round each addition against all before it."""
        emit, builder = self.emit, self.emit.builder
        totals = [emit.scratch(emit.lanes) for _ in self.rows for _ in self.vectors]
        for total in totals:
            emit.store(emit.constant(0.0), total)
        with emit.loop(emit.integer(0), self.in_features, TILE) as tile:
            stop = emit.minimum(builder.add(tile.index, emit.integer(TILE)), self.in_features)
            for total, value in zip(totals, self._emit_tile(tile.index, stop), strict=True):
                emit.store(builder.fadd(emit.load(total), value), total)
        self._emit_end(self._in_order([emit.load(total) for total in totals]))

    def _emit_tile(self, start: Value, stop: Value) -> list[Value]:
        """Sums stay in registers, one for each vector out. With few of them additions wait for each other, which
        reading the weight hides. Rows that are laid are found from one address, others from one each."""
        emit, builder = self.emit, self.emit.builder
        begin = builder.sub(builder.mul(start, self.num_rows), start) if self.is_laid else emit.integer(0)
        block = emit.at(self.block, begin)
        nothing = [emit.constant(0.0)] * (len(self.rows) * len(self.vectors))
        with emit.loop(start, stop, FEATURES, nothing) as feature:
            first, apart = emit.at(block, feature.index), self.in_features
            if self.is_laid:
                first, apart = emit.opaque(first), emit.integer(TILE)
            places = [emit.at(first, builder.mul(apart, emit.integer(row))) for row in self.rows]
            sums = feature.values
            for step in range(FEATURES):
                weights = self._weights(builder.add(feature.index, emit.integer(step)))
                numbers = [emit.spread(emit.at(place, step)) for place in places]
                products = [(number, weight) for number in numbers for weight in weights]
                sums = [emit.multiply_add(*product, total) for product, total in zip(products, sums, strict=True)]
            feature.following = sums
        return list(sums)

    def _weights(self, feature: Value) -> list[Value]:
        """A panel's numbers for one input feature; those some way ahead are asked for."""
        emit, element = self.emit, ELEMENTS[self.kept]
        place = emit.at(self.panel, emit.builder.mul(feature, emit.integer(PANEL)), element)
        emit.prefetch(emit.at(place, self.ahead, INT8))
        if self.in_pairs:
            return list(emit.load_bfloat16_pairs(place))
        places = [emit.at(place, vector * emit.lanes, element) for vector in self.vectors]
        return [emit.load_float(place, self.kept) for place in places]

    def _in_order(self, sums: list[Value]) -> list[Value]:
        """The sums with the panel's features one behind the other."""
        if not self.in_pairs:
            return sums
        features = [*range(0, PANEL, 2), *range(1, PANEL, 2)]
        rows = zip(sums[::2], sums[1::2], strict=True)
        return [vector for even, odd in rows for vector in self.emit.reordered(even, odd, features)]

    def _emit_end(self, sums: list[Value]) -> None:
        """Add the biases and write. A whole panel is written plainly: stores by a mask are slow on some processors."""
        emit, builder = self.emit, self.emit.builder
        biases = self._biases()
        results = [
            (row, vector, builder.fadd(sums[row * len(self.vectors) + vector], biases[vector]))
            for vector in self.vectors
            for row in self.rows
        ]
        whole, part = function_blocks(self.function, "whole", "part")
        builder.cbranch(builder.icmp_signed("==", self.num_out, emit.integer(PANEL)), whole, part)
        for block in (whole, part):
            builder.position_at_end(block)
            for row, vector, result in results:
                first = emit.integer(vector * emit.lanes)
                place = emit.at(self.out, builder.add(builder.mul(self.out_stride, emit.integer(row)), first))
                if block is whole:
                    emit.store(result, place)
                else:
                    _store_some(emit, result, place, builder.sub(self.num_out, first))
            builder.ret_void()

    def _biases(self) -> list[Value]:
        """Of each vector of the panel. Where there are none nothing is asked for: a processor takes long to find out
        that no lane of a load from nowhere was wanted."""
        emit, builder = self.emit, self.emit.builder
        before = builder.block
        some, behind = function_blocks(self.function, "biases", "summed")
        builder.cbranch(builder.icmp_signed(">", self.num_bias, emit.integer(0)), some, behind)
        builder.position_at_end(some)
        places = [emit.integer(vector * emit.lanes) for vector in self.vectors]
        loads = [_load_some(emit, emit.at(self.bias, at), builder.sub(self.num_bias, at)) for at in places]
        builder.branch(behind)
        builder.position_at_end(behind)
        found = [builder.phi(emit.vector) for _ in loads]
        for phi, load in zip(found, loads, strict=True):
            phi.add_incoming(load, some)
            phi.add_incoming(emit.constant(0.0), before)
        return found


def _inside(emit: Emitter, count: Value) -> Value:
    """Lanes below `count`."""
    builder, undefined = emit.builder, ir.Constant(emit.integers, ir.Undefined)
    first = builder.insert_element(undefined, builder.trunc(count, INT32), ir.Constant(INT32, 0))
    spread = builder.shuffle_vector(first, first, ir.Constant(emit.integers, [0] * emit.lanes))
    return builder.icmp_signed("<", ir.Constant(emit.integers, list(range(emit.lanes))), spread)


def _load_some(emit: Emitter, pointer: Value, count: Value) -> Value:
    """The first `count` numbers from memory, zeros behind them."""
    mask = ir.VectorType(ir.IntType(1), emit.lanes)
    kind = ir.FunctionType(emit.vector, [POINTER, INT32, mask, emit.vector])
    name = f"llvm.masked.load.v{emit.lanes}f32.p0"
    function = emit.function.module.declare_intrinsic(name, fnty=kind)
    return emit.builder.call(function, [pointer, ir.Constant(INT32, 4), _inside(emit, count), emit.constant(0.0)])


def _store_some(emit: Emitter, value: Value, pointer: Value, count: Value) -> None:
    """The first `count` numbers to memory."""
    mask = ir.VectorType(ir.IntType(1), emit.lanes)
    kind = ir.FunctionType(ir.VoidType(), [emit.vector, POINTER, INT32, mask])
    name = f"llvm.masked.store.v{emit.lanes}f32.p0"
    function = emit.function.module.declare_intrinsic(name, fnty=kind)
    emit.builder.call(function, [value, pointer, ir.Constant(INT32, 4), _inside(emit, count)])


def _fields(module: ir.Module, name: str, lanes: int) -> Fields[Emitter]:
    """Of a new function of one pointer to a call."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
    return Fields(Emitter(function, lanes), list(Field)[1:], range(Field.BLOCK, Field.OUT + 1))


class _Lay:
    """Copies the block tile by tile. What is behind the last feature stays as it is: nobody reads it."""

    def __init__(self, module: ir.Module, lanes: int) -> None:
        self.fields = _fields(module, "lay", lanes)
        self.emit = self.fields.emit
        emit, builder, in_features = self.emit, self.emit.builder, self.fields[Field.IN_FEATURES]
        share = Share(emit, in_features, emit.integer(TILE))
        with share.units(emit, self.fields.place(Field.NEXT_TASK)) as unit:
            first = builder.mul(unit, share.size)
            stop = emit.minimum(builder.add(first, share.size), in_features)
            with emit.loop(first, stop, TILE) as tile:
                self._emit_tile(tile.index, emit.minimum(builder.add(tile.index, emit.integer(TILE)), stop))
        builder.ret_void()

    def _emit_tile(self, start: Value, stop: Value) -> None:
        emit, builder, num_rows = self.emit, self.emit.builder, self.fields[Field.NUM_ROWS]
        begin = emit.at(self.fields[Field.LAID], builder.sub(builder.mul(start, num_rows), start))
        with emit.loop(emit.integer(0), num_rows, 1) as row:
            source = emit.at(self.fields[Field.BLOCK], builder.mul(row.index, self.fields[Field.IN_FEATURES]))
            target = emit.at(begin, builder.mul(row.index, emit.integer(TILE)))
            with emit.loop(start, stop, emit.lanes) as feature:
                emit.store(emit.load(emit.at(source, feature.index)), emit.at(target, feature.index))


class _Linear:
    """The function that threads run: task by task, rows that are served at once, panel by panel, pass by pass."""

    def __init__(self, module: ir.Module, lanes: int, passes: list[ir.Function], kept: torch.dtype) -> None:
        self.fields = _fields(module, "linear", lanes)
        self.emit = self.fields.emit
        self.passes = passes
        self.element, self.number_bytes = ELEMENTS[kept], kept.itemsize
        self._emit_tasks()

    def _emit_tasks(self) -> None:
        emit, builder, fields = self.emit, self.emit.builder, self.fields
        share = Share(emit, fields[Field.OUT_FEATURES], emit.integer(PANEL))
        with share.units(emit, self.fields.place(Field.NEXT_TASK)) as unit:
            first = builder.mul(unit, share.size)
            stop = emit.minimum(builder.add(first, share.size), fields[Field.OUT_FEATURES])
            with emit.loop(emit.integer(0), fields[Field.NUM_ROWS], fields[Field.ROWS_AT_ONCE]) as rows:
                left = builder.sub(fields[Field.NUM_ROWS], rows.index)
                num_rows = emit.minimum(left, fields[Field.ROWS_AT_ONCE])
                with emit.loop(first, stop, PANEL) as feature:
                    self._emit_panel(feature.index, rows.index, num_rows)
        builder.ret_void()

    def _emit_panel(self, first: Value, first_row: Value, num_rows: Value) -> None:
        """Some rows of the block by one panel."""
        emit, builder, fields = self.emit, self.emit.builder, self.fields
        in_features, out_features = fields[Field.IN_FEATURES], fields[Field.OUT_FEATURES]
        num_out = emit.minimum(builder.sub(out_features, first), emit.integer(PANEL))
        panel = emit.at(fields[Field.WEIGHT], builder.mul(first, in_features), self.element)
        bias, num_bias = emit.at(fields[Field.BIAS], first), builder.mul(fields[Field.HAS_BIAS], num_out)
        block, step = (Field.LAID, emit.integer(TILE)) if LAYS[emit.lanes] else (Field.BLOCK, in_features)
        panel_bytes = builder.mul(in_features, emit.integer(PANEL * self.number_bytes))

        def arguments(row: Value) -> list[Value]:
            is_first = builder.icmp_signed("==", row, emit.integer(0))
            ahead = builder.select(is_first, emit.integer(AHEAD_BYTES), panel_bytes)
            row = builder.add(first_row, row)
            begin = emit.at(fields[block], builder.mul(row, step))
            out = emit.at(fields[Field.OUT], builder.add(builder.mul(row, out_features), first))
            numbers = [in_features, fields[Field.NUM_ROWS], out_features, num_bias, num_out, ahead]
            return [panel, begin, bias, out, *numbers]

        emit_passes(emit, num_rows, self.passes, arguments)
