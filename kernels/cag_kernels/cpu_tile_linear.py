"""A linear layer over a few rows by tile products (AMX), over a bfloat16 weight as it lies in the checkpoint.

Sixteen output features are the rows of a tile straight from the weight, so nothing is packed beforehand and blocks of
prefill keep the library's product on the same memory. The block's rows are rounded to bfloat16 and stand side by side.
Sums are float32. Threads share the features out (`cpu_team`), and no number depends on which of them computes it. While
a thread multiplies 32 features it asks for the next 32, which lie right behind: tiles alone do not keep memory busy.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from functools import cache

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu_emit import INT8, INT32, INT64, POINTER, Program, Value, function_blocks
from cag_kernels.cpu_tape import CompiledStep, Reads, new_call, scratch_memory
from cag_kernels.cpu_team import Share
from cag_kernels.cpu_tiles import DEPTH, ROW_BYTES, TILE, TileEmitter, has_tiles

BLOCK_FEATURES = 32  # by up to 32 rows: four tiles of sums under way hide the latency of a product
SHORT_ROW = 1024  # input features up to which rows are asked for; longer ones the processor finds by itself, and better
_PARTS = BLOCK_FEATURES // TILE
_OF_FEATURES, _OF_ROWS = 4, 6  # tiles 0 to 3 hold sums
_SECOND_CACHE = 2

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; `BLOCK` to `OUT` are addresses."""

    NEXT_TASK = 0
    BLOCK = 1  # [num_rows, in_features] float32
    PAIRS = 2  # [row tiles, in_features / 2, 16] pairs of bfloat16: the block turned
    WEIGHT = 3  # [out_features, in_features] bfloat16
    BIAS = 4  # [out_features] float32
    OUT = 5  # [num_rows, out_features] float32
    NUM_ROWS = 6
    IN_FEATURES = 7
    OUT_FEATURES = 8


def serves(weight: Tensor) -> bool:
    """Whether `compiled_linear` takes this bfloat16 weight, on this processor."""
    large = weight.shape[0] >= BLOCK_FEATURES and weight.shape[1] % DEPTH == 0
    return large and weight.is_contiguous() and has_tiles()


def compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`rows [num_rows, in_features] @ weight.T + bias`, all contiguous, rows and bias float32, nothing empty; into
    `out [num_rows, out_features]` float32 if given."""
    num_rows, in_features = rows.shape
    out_features = weight.shape[0]
    out = rows.new_empty(num_rows, out_features) if out is None else out
    pairs = scratch_memory(-(-num_rows // TILE) * TILE * in_features // 2)  # two bfloat16 in the place of a float32
    bias = _zeros(out_features) if bias is None else bias
    memory = (rows, pairs, weight, bias, out)
    pointers = [tensor.data_ptr() for tensor in memory]
    compiled_kernel().run((0, *pointers, num_rows, in_features, out_features), memory)
    return out


class TileProduct:
    """`compiled_linear` with one weight, made ready once."""

    is_recordable = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, _zeros(self.out_features) if bias is None else bias.contiguous()

    def __call__(self, rows: Tensor) -> Tensor:
        """`[num_rows, in_features]` float32, contiguous and not empty, to `[num_rows, out_features]`."""
        return compiled_linear(rows, self._weight, self._bias)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The same, to `out`."""
        compiled_linear(rows, self._weight, self._bias, out)


@cache
def _zeros(count: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(count)


class TileLinearKernel:
    """Machine code for every shape, run on several threads."""

    def __init__(self) -> None:
        program = Program(tile_linear_module())
        self._prepare, self._multiply = (
            CompiledStep(program.address(name), program) for name in ("prepare", "multiply")
        )

    def run(self, fields: tuple[int, ...], memory: tuple[Tensor, ...]) -> None:
        """Serve one call; `fields` are `Field` in order, `memory` is what their addresses are of."""
        call = new_call(fields, memory)
        self._prepare.alone(call)
        weight, in_features, out_features = (fields[i] for i in (Field.WEIGHT, Field.IN_FEATURES, Field.OUT_FEATURES))
        reads = Reads(weight, out_features, 2 * in_features, BLOCK_FEATURES)
        self._multiply.shared(call, -(-out_features // BLOCK_FEATURES), reads)


def compiled_kernel() -> TileLinearKernel:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> TileLinearKernel:
    return TileLinearKernel()


def tile_linear_module() -> ir.Module:
    """Module with `prepare` and `multiply`, each of one pointer to the fields of a call."""
    module = ir.Module(name="tile_linear")
    _emit_prepare(_Call(module, "prepare"))
    _emit_multiply(_Call(module, "multiply"))
    return module


class _Call:
    """A function under construction and the fields of the call that it serves."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
        self.emit = TileEmitter(self.function)
        self._fields = {field: self._read(field) for field in list(Field)[1:]}

    def _read(self, field: Field) -> Value:
        value = self.emit.builder.load(self.place(field), typ=INT64, align=8)
        return self.emit.builder.inttoptr(value, POINTER) if Field.BLOCK <= field <= Field.OUT else value

    def place(self, field: Field) -> Value:
        """Address of a field."""
        return self.emit.at(self.function.args[0], int(field), INT64)

    def __getitem__(self, field: Field) -> Value:
        return self._fields[field]


def _row_tiles(call: _Call) -> Value:
    builder = call.emit.builder
    return builder.udiv(builder.add(call[Field.NUM_ROWS], call.emit.integer(TILE - 1)), call.emit.integer(TILE))


def _emit_prepare(call: _Call) -> None:
    """Turn 16 rows by 32 features at a time; rows behind the last repeat it."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    last = builder.sub(call[Field.NUM_ROWS], emit.integer(1))
    with (
        emit.loop(zero, _row_tiles(call), 1) as tile,
        emit.loop(zero, call[Field.IN_FEATURES], DEPTH) as feature,
    ):
        turned = []
        for row in range(TILE):
            index = emit.minimum(builder.add(builder.mul(tile.index, emit.integer(TILE)), emit.integer(row)), last)
            source = emit.at(call[Field.BLOCK], builder.add(builder.mul(index, call[Field.IN_FEATURES]), feature.index))
            turned.append(emit.narrowed_row(emit.load(source), emit.load(emit.at(source, TILE))))
        target = emit.at(call[Field.PAIRS], _pairs_index(call, tile.index, feature.index), INT32)
        for pair, vector in enumerate(emit.transposed(turned)):
            builder.store(vector, emit.at(target, pair * TILE, INT32), align=4)
    builder.ret_void()


def _pairs_index(call: _Call, tile: Value, feature: Value) -> Value:
    """Of the first pair of a feature: `(tile * in_features + feature) / 2 * 16`."""
    emit, builder = call.emit, call.emit.builder
    return builder.mul(builder.add(builder.mul(tile, call[Field.IN_FEATURES]), feature), emit.integer(TILE // 2))


def _emit_multiply(call: _Call) -> None:
    emit, builder = call.emit, call.emit.builder
    out_features = call[Field.OUT_FEATURES]
    share = Share(emit, out_features, emit.integer(BLOCK_FEATURES))
    own_stop = emit.minimum(builder.mul(share.stop, share.size), out_features)
    with emit.configured():
        turned = emit.bytes_on_stack(4 * TILE * TILE)
        with share.units(emit, call.place(Field.NEXT_TASK)) as unit:
            start = builder.mul(unit, share.size)
            stop = emit.minimum(builder.add(start, share.size), out_features)
            with emit.loop(start, stop, BLOCK_FEATURES) as feature:
                _emit_features(call, feature.index, own_stop, turned)
    builder.ret_void()


def _emit_features(call: _Call, feature: Value, own_stop: Value, turned: Value) -> None:
    """32 features for all rows, 32 rows at a time; with the first of these the next features are asked for, if they are
    this thread's and their rows are short."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    # the last ones begin early enough to be whole; what is computed again has the same bits
    feature = emit.minimum(feature, builder.sub(call[Field.OUT_FEATURES], emit.integer(BLOCK_FEATURES)))
    following = builder.add(feature, emit.integer(BLOCK_FEATURES))
    is_short = builder.icmp_signed("<=", call[Field.IN_FEATURES], emit.integer(SHORT_ROW))
    asks = builder.and_(is_short, builder.icmp_signed("<", following, own_stop))
    num_tiles = _row_tiles(call)
    last = builder.sub(num_tiles, emit.integer(1))
    with emit.loop(zero, num_tiles, 2) as tile:
        row_tiles = [tile.index, builder.add(tile.index, emit.integer(1))]
        asks_now = builder.and_(asks, builder.icmp_signed("==", tile.index, zero))
        has_two = builder.icmp_signed("<", tile.index, last)
        kind = builder.add(builder.zext(asks_now, INT64), builder.mul(builder.zext(has_two, INT64), emit.integer(2)))
        joined = call.function.append_basic_block("joined")
        switch = builder.switch(kind, joined)
        for number, (count, ahead) in enumerate(((1, None), (1, following), (2, None), (2, following))):
            (block,) = function_blocks(call.function, f"kind_{number}")
            switch.add_case(emit.integer(number), block)
            builder.position_at_end(block)
            _emit_block(call, feature, row_tiles[:count], ahead, turned)
            builder.branch(joined)
        builder.position_at_end(joined)


def _weight_row(call: _Call, feature: Value) -> Value:
    """Address of a feature's weights."""
    return call.emit.at(call[Field.WEIGHT], call.emit.builder.mul(feature, _weight_row_bytes(call)), INT8)


def _weight_row_bytes(call: _Call) -> Value:
    return call.emit.builder.mul(call[Field.IN_FEATURES], call.emit.integer(2))


def _emit_block(call: _Call, first: Value, row_tiles: list[Value], following: Value | None, turned: Value) -> None:
    """32 features by one or two tiles of rows, from zero to their places in out. `following`: feature from which on as
    many weights are asked for as are read here, in the order in which they lie."""
    emit, builder = call.emit, call.emit.builder
    features = [builder.add(first, emit.integer(part * TILE)) for part in range(_PARTS)]
    rows = [_weight_row(call, feature) for feature in features]
    sums = [[part * len(row_tiles) + column for column in range(len(row_tiles))] for part in range(_PARTS)]
    for total in sum(sums, []):
        emit.zero(total)
    with emit.loop(emit.integer(0), call[Field.IN_FEATURES], DEPTH) as feature:
        for column, row_tile in enumerate(row_tiles):
            source = emit.at(call[Field.PAIRS], _pairs_index(call, row_tile, feature.index), INT32)
            emit.load_tile(_OF_ROWS + column, source)
        for part, row in enumerate(rows):
            if following is not None:
                line = builder.mul(feature.index, emit.integer(2 * BLOCK_FEATURES))  # as many bytes as a round reads
                asked = emit.at(_weight_row(call, following), line, INT8)
                for number in range(part * TILE, (part + 1) * TILE):
                    emit.prefetch(emit.at(asked, number * ROW_BYTES, INT8), near=_SECOND_CACHE)
            place = emit.at(row, builder.mul(feature.index, emit.integer(2)), INT8)
            emit.load_tile(_OF_FEATURES + part, place, _weight_row_bytes(call))
            for column, total in enumerate(sums[part]):
                emit.add_product(total, _OF_FEATURES + part, _OF_ROWS + column)
    for part, start in enumerate(features):
        for column, row_tile in enumerate(row_tiles):
            emit.store_tile(sums[part][column], turned)
            _emit_rows(call, start, row_tile, turned)


def _emit_rows(call: _Call, feature: Value, row_tile: Value, turned: Value) -> None:
    """A tile of sums, `[16 features, 16 rows]` in `turned`, to rows of out with the features' bias."""
    emit, builder = call.emit, call.emit.builder
    rows = emit.transposed([emit.load(emit.at(turned, row * TILE)) for row in range(TILE)])
    bias = emit.load(emit.at(call[Field.BIAS], feature))
    for row, vector in enumerate(rows):
        emit.store(builder.fadd(vector, bias), emit.at(turned, row * TILE))
    begin = builder.mul(row_tile, emit.integer(TILE))
    count = emit.minimum(builder.sub(call[Field.NUM_ROWS], begin), emit.integer(TILE))
    with emit.loop(emit.integer(0), count, 1) as place:
        line = builder.mul(builder.add(begin, place.index), call[Field.OUT_FEATURES])
        vector = emit.load(emit.at(turned, builder.mul(place.index, emit.integer(TILE))))
        emit.store(vector, emit.at(call[Field.OUT], builder.add(line, feature)))
