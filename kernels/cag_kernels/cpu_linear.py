"""A linear layer over a few rows, compiled for this processor: the weight is read once, in its own order.

A weight far larger than the caches costs what reading it costs, so nothing of it is packed or transposed. Eight rows of
the weight at a time meet a few rows of the block; vectors of partial sums over the input features stay in registers,
and the next rows of the weight are asked for meanwhile. Chunks of the output are shared out among torch's threads; no
number depends on which thread computes it.
"""

from __future__ import annotations

import ctypes
import threading
from enum import IntEnum
from functools import cache

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu import openmp_parallel, thread_pool
from cag_kernels.cpu_emit import INT32, INT64, POINTER, Emitter, Program, Value, function_blocks
from cag_kernels.cpu_panel import host_blocking

GROUP = 8  # rows of the weight that share a pass over rows of the block
CHUNK = 32  # rows of the weight that a thread takes at a time
TILE = 768  # input features after which sums go to memory: a group and rows of the block fit the first cache

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; all but counts are addresses."""

    NEXT_CHUNK = 0
    BLOCK = 1  # [num_rows, in_features] float32
    WEIGHT = 2  # [out_features, in_features] float32
    BIAS = 3  # [out_features] float32, anything where HAS_BIAS is 0
    OUT = 4  # [num_rows, out_features] float32
    NUM_ROWS = 5
    IN_FEATURES = 6  # a multiple of the lanes
    OUT_FEATURES = 7
    HAS_BIAS = 8  # 0 or 1


def compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`rows @ weight.T + bias` of contiguous float32 tensors, in_features a multiple of 16; nothing may be empty."""
    num_rows, in_features = rows.shape
    out_features = weight.shape[0]
    out = rows.new_empty(num_rows, out_features)
    start = 0 if bias is None else bias.data_ptr()
    pointers = (rows.data_ptr(), weight.data_ptr(), start, out.data_ptr())
    compiled_kernel().run((0, *pointers, num_rows, in_features, out_features, int(bias is not None)))
    return out


class LinearKernel:
    """Machine code for every shape, run on several threads."""

    def __init__(self) -> None:
        lanes = host_blocking().lanes
        self._program = Program(linear_module(lanes, max_rows=3 if lanes == 16 else 1))
        self._address = self._program.address("linear")
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def run(self, fields: tuple[int, ...]) -> None:
        """Serve one call; `fields` are `Field` in order."""
        call = (ctypes.c_int64 * len(Field))(*fields)
        num_threads = torch.get_num_threads()
        if num_threads == 1 or fields[Field.OUT_FEATURES] <= CHUNK:
            self._function(call)
        elif (parallel := openmp_parallel()) is not None:
            parallel(self._address, ctypes.addressof(call), num_threads, 0)
        else:
            list(thread_pool(num_threads).map(lambda _: self._function(call), range(num_threads)))


def compiled_kernel() -> LinearKernel:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> LinearKernel:
    return LinearKernel()


def linear_module(lanes: int, max_rows: int) -> ir.Module:
    """Module with `linear`, of one pointer to the fields of a call; up to `max_rows` rows meet a group at once."""
    module = ir.Module(name="linear")
    passes = [_emit_pass(module, lanes, rows) for rows in range(1, max_rows + 1)]
    _Linear(module, lanes, passes)
    return module


def _emit_pass(module: ir.Module, lanes: int, rows: int) -> ir.Function:
    """`rows` rows of the block by a group of the weight over one tile.

    Arguments: the group's rows of the weight, two rows to ask for, the first row of the block, start values, and out;
    then features from a row of the block to the next, the same of start values and of out, the tile's features, how
    many start values there are, and the group's rows that exist.
    """
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [POINTER] * (GROUP + 5) + [INT64] * 6), name=f"rows_{rows}"
    )
    function.linkage = "internal"
    emit = Emitter(function, lanes)
    weights, ahead = function.args[:GROUP], function.args[GROUP : GROUP + 2]
    block, start, out, stride, start_stride, out_stride, count, num_start, num_out = function.args[GROUP + 2 :]
    builder = emit.builder
    places = [emit.at(block, builder.mul(stride, emit.integer(row))) for row in range(rows)]
    with emit.loop(emit.integer(0), count, lanes, [emit.constant(0.0)] * (rows * GROUP)) as feature:
        for place in ahead:
            _ask_for(emit, emit.at(place, feature.index))
        group = [emit.load(emit.at(weight, feature.index)) for weight in weights]
        vectors = [emit.load(emit.at(place, feature.index)) for place in places]
        products = [(vector, weight) for vector in vectors for weight in group]
        feature.following = [
            emit.multiply_add(*product, total) for product, total in zip(products, feature.values, strict=True)
        ]
    for row in range(rows):
        sums = emit.sums_of(list(feature.following[row * GROUP : (row + 1) * GROUP]) * (lanes // GROUP))
        index = emit.integer(row)
        first = _load_some(emit, emit.at(start, builder.mul(start_stride, index)), num_start)
        _store_some(emit, builder.fadd(sums, first), emit.at(out, builder.mul(out_stride, index)), num_out)
    builder.ret_void()
    return function


def _ask_for(emit: Emitter, pointer: Value) -> None:
    """Bring a cache line into the second cache; the first has no room beside the block."""
    kind = ir.FunctionType(ir.VoidType(), [POINTER, INT32, INT32, INT32])
    function = emit.function.module.declare_intrinsic("llvm.prefetch.p0", fnty=kind)
    read, second_cache, data = 0, 2, 1
    emit.builder.call(function, [pointer, *(ir.Constant(INT32, option) for option in (read, second_cache, data))])


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


class _Linear:
    """The function that threads run: chunk by chunk, tile by tile, group by group, pass by pass."""

    def __init__(self, module: ir.Module, lanes: int, passes: list[ir.Function]) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name="linear")
        self.emit = Emitter(self.function, lanes)
        self.passes = passes
        fields = {field: self._read(field) for field in list(Field)[1:]}
        self.block, self.weight, self.bias, self.out = (fields[field] for field in list(Field)[1:5])
        self.num_rows, self.in_features, self.out_features, self.has_bias = (fields[field] for field in list(Field)[5:])
        self._emit_chunks()

    def _read(self, field: Field) -> Value:
        value = self.emit.builder.load(self.emit.at(self.function.args[0], int(field), INT64), typ=INT64, align=8)
        return self.emit.builder.inttoptr(value, POINTER) if Field.BLOCK <= field <= Field.OUT else value

    def _emit_chunks(self) -> None:
        emit, builder = self.emit, self.emit.builder
        take, work, done = function_blocks(self.function, "take", "work", "done")
        builder.branch(take)
        builder.position_at_end(take)
        counter = emit.at(self.function.args[0], int(Field.NEXT_CHUNK), INT64)
        chunk = builder.atomic_rmw("add", counter, emit.integer(1), "monotonic")
        first = builder.mul(chunk, emit.integer(CHUNK))
        builder.cbranch(builder.icmp_signed("<", first, self.out_features), work, done)
        builder.position_at_end(work)
        stop = emit.minimum(builder.add(first, emit.integer(CHUNK)), self.out_features)
        with (
            emit.loop(emit.integer(0), self.in_features, TILE) as tile,
            emit.loop(first, stop, GROUP) as group,
        ):
            self._emit_group(tile.index, group.index)
        builder.branch(take)
        builder.position_at_end(done)
        builder.ret_void()

    def _weight_row(self, row: Value, feature: Value) -> Value:
        """Address in the weight; rows behind the last are the last."""
        builder = self.emit.builder
        row = self.emit.minimum(row, builder.sub(self.out_features, self.emit.integer(1)))
        return self.emit.at(self.weight, builder.add(builder.mul(row, self.in_features), feature))

    def _emit_group(self, feature: Value, first: Value) -> None:
        """All rows of the block by a group of the weight over one tile, in passes of about equal numbers of rows."""
        emit, builder, one = self.emit, self.emit.builder, self.emit.integer(1)
        most = emit.integer(len(self.passes))
        count = emit.minimum(builder.sub(self.in_features, feature), emit.integer(TILE))
        num_out = emit.minimum(builder.sub(self.out_features, first), emit.integer(GROUP))
        weights = [self._weight_row(builder.add(first, emit.integer(row)), feature) for row in range(GROUP)]
        is_first = builder.icmp_signed("==", feature, emit.integer(0))
        num_start = builder.select(is_first, builder.mul(self.has_bias, num_out), num_out)
        start_stride = builder.select(is_first, emit.integer(0), self.out_features)
        num_passes = builder.sdiv(builder.add(self.num_rows, builder.sub(most, one)), most)
        test, behind = function_blocks(self.function, "passes", "served")
        before = builder.block
        builder.branch(test)
        builder.position_at_end(test)
        row, left = builder.phi(INT64), builder.phi(INT64)
        rows = builder.sdiv(builder.add(builder.sub(self.num_rows, row), builder.sub(left, one)), left)
        asked = builder.and_(builder.mul(builder.sub(num_passes, left), emit.integer(2)), emit.integer(GROUP - 1))
        asked = builder.add(builder.add(first, emit.integer(GROUP)), asked)
        ahead = [self._weight_row(builder.add(asked, emit.integer(index)), feature) for index in range(2)]
        out = emit.at(self.out, builder.add(builder.mul(row, self.out_features), first))
        start = builder.select(is_first, emit.at(self.bias, first), out)
        block = emit.at(self.block, builder.add(builder.mul(row, self.in_features), feature))
        sizes = [self.in_features, start_stride, self.out_features, count, num_start, num_out]
        self._emit_switch(rows, [*weights, *ahead, block, start, out, *sizes])
        following, remaining = builder.add(row, rows), builder.sub(left, one)
        row.add_incoming(emit.integer(0), before)
        row.add_incoming(following, builder.block)
        left.add_incoming(num_passes, before)
        left.add_incoming(remaining, builder.block)
        builder.cbranch(builder.icmp_signed(">", remaining, emit.integer(0)), test, behind)
        builder.position_at_end(behind)

    def _emit_switch(self, rows: Value, arguments: list[Value]) -> None:
        """Call the pass made for that many rows."""
        builder = self.emit.builder
        joined = self.function.append_basic_block("joined")
        switch = builder.switch(rows, joined)
        for index, function in enumerate(self.passes):
            (block,) = function_blocks(self.function, f"rows_{index + 1}")
            switch.add_case(self.emit.integer(index + 1), block)
            builder.position_at_end(block)
            builder.call(function, arguments)
            builder.branch(joined)
        builder.position_at_end(joined)
