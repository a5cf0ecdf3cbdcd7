"""Products of a block's rows and rows of a weight in tiles (AMX): what a linear layer and a gated one have in common.

Sixteen output features are the rows of a tile straight from a bfloat16 weight, so nothing is packed beforehand. The
block's rows are rounded to bfloat16 and stand side by side. Sums are float32 in tiles; what becomes of them is the
caller's. Threads share the features out (`cpu.team`), and no number depends on which of them computes it. While a
thread multiplies some features it asks for the next ones, which lie right behind: tiles alone do not keep memory busy.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT8, INT32, INT64, LINE_BYTES, POINTER, SECOND_CACHE, Value, function_blocks
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.team import Share
from cag_kernels.cpu.tiles import DEPTH, TILE, TileEmitter

PARTS = 2  # tiles of features by up to two of rows: four tiles of sums under way hide the latency of a product
SHORT_ROW = 1024  # input features up to which rows are asked for; longer ones the processor finds by itself, and better
_OF_FEATURES, _OF_ROWS = 4, 6  # tiles 0 to 3 hold sums

EmitBlock = Callable[[Value, list[Value], Value | None], None]


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; `BLOCK` to `OUT` are addresses."""

    NEXT_TASK = 0
    BLOCK = 1  # [num_rows, in_features] float32
    PAIRS = 2  # [row tiles, in_features / 2, 16] pairs of bfloat16: the block turned
    WEIGHT = 3  # [features, in_features] bfloat16
    BIAS = 4  # [out_features] float32
    OUT = 5  # [num_rows, out_features] float32
    NUM_ROWS = 6
    IN_FEATURES = 7
    OUT_FEATURES = 8


class ProductCall(Fields[TileEmitter]):
    """A function under construction and the fields of the call that it serves."""

    def __init__(self, module: ir.Module, name: str) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
        super().__init__(TileEmitter(self.function), list(Field)[1:], range(Field.BLOCK, Field.OUT + 1))

    @property
    def row_tiles(self) -> Value:
        """Tiles of 16 rows, the last one not always whole."""
        return self.emit.rounded_up(self[Field.NUM_ROWS], self.emit.integer(TILE))

    @property
    def weight_row_bytes(self) -> Value:
        """Of one output feature."""
        return self.emit.builder.mul(self[Field.IN_FEATURES], self.emit.integer(2))

    def weight_row(self, feature: Value) -> Value:
        """Address of a feature's weights."""
        return self.emit.at(self[Field.WEIGHT], self.emit.builder.mul(feature, self.weight_row_bytes), INT8)

    def pairs(self, row_tile: Value, feature: Value) -> Value:
        """Address of the first pair of an input feature."""
        builder = self.emit.builder
        first = builder.add(builder.mul(row_tile, self[Field.IN_FEATURES]), feature)
        return self.emit.at(self[Field.PAIRS], builder.mul(first, self.emit.integer(TILE // 2)), INT32)


def emit_prepare(call: ProductCall) -> None:
    """Turn 16 rows by 32 features at a time; rows behind the last repeat it."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    last = builder.sub(call[Field.NUM_ROWS], emit.integer(1))
    with (
        emit.loop(zero, call.row_tiles, 1) as tile,
        emit.loop(zero, call[Field.IN_FEATURES], DEPTH) as feature,
    ):
        turned = []
        for row in range(TILE):
            index = emit.minimum(builder.add(builder.mul(tile.index, emit.integer(TILE)), emit.integer(row)), last)
            source = emit.at(call[Field.BLOCK], builder.add(builder.mul(index, call[Field.IN_FEATURES]), feature.index))
            turned.append(emit.narrowed_row(emit.load(source), emit.load(emit.at(source, TILE))))
        target = call.pairs(tile.index, feature.index)
        for pair, vector in enumerate(emit.transposed(turned)):
            builder.store(vector, emit.at(target, pair * TILE, INT32), align=4)
    builder.ret_void()


def emit_blocks(call: ProductCall, step: int, emit_block: EmitBlock) -> None:
    """This thread's share of the output features, `step` at a time, and of these all rows, two tiles at a time.

    `emit_block` takes the first of the features, one or two tiles of rows, and which features are to be asked for
    meanwhile: those behind them, if they are this thread's and their rows are short, and with the first rows only.
    """
    emit, builder, out_features = call.emit, call.emit.builder, call[Field.OUT_FEATURES]
    share = Share(emit, out_features, emit.integer(step))
    own_stop = emit.minimum(builder.mul(share.stop, share.size), out_features)
    is_short = builder.icmp_signed("<=", call[Field.IN_FEATURES], emit.integer(SHORT_ROW))
    with share.units(emit, call.place(Field.NEXT_TASK)) as unit:
        start = builder.mul(unit, share.size)
        stop = emit.minimum(builder.add(start, share.size), out_features)
        with emit.loop(start, stop, step) as block:
            # the last features begin early enough to be whole; what is computed again has the same bits
            feature = emit.minimum(block.index, builder.sub(out_features, emit.integer(step)))
            following = builder.add(feature, emit.integer(step))
            asks = builder.and_(is_short, builder.icmp_signed("<", following, own_stop))
            _emit_rows(call, feature, builder.select(asks, following, feature), emit_block)


def _emit_rows(call: ProductCall, feature: Value, following: Value, emit_block: EmitBlock) -> None:
    """All rows of some features; nothing is asked for where the features that follow are these."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    last = builder.sub(call.row_tiles, emit.integer(1))
    with emit.loop(zero, call.row_tiles, 2) as tile:
        row_tiles = [tile.index, builder.add(tile.index, emit.integer(1))]
        is_first = builder.icmp_signed("==", tile.index, zero)
        asks = builder.and_(is_first, builder.icmp_signed("!=", following, feature))
        has_two = builder.icmp_signed("<", tile.index, last)
        kind = builder.add(builder.zext(asks, INT64), builder.mul(builder.zext(has_two, INT64), emit.integer(2)))
        joined = call.function.append_basic_block("joined")
        switch = builder.switch(kind, joined)
        for number, (count, ahead) in enumerate(((1, None), (1, following), (2, None), (2, following))):
            (case,) = function_blocks(call.function, f"kind_{number}")
            switch.add_case(emit.integer(number), case)
            builder.position_at_end(case)
            emit_block(feature, row_tiles[:count], ahead)
            builder.branch(joined)
        builder.position_at_end(joined)


def emit_sums(
    call: ProductCall, features: list[Value], row_tiles: list[Value], ahead: list[Value] | None
) -> list[list[int]]:
    """Two times 16 features, each from one of `features` on, by one or two tiles of rows: sums in tiles, which are
    returned for each of the features and tiles of rows. `ahead`: features whose weights are asked for meanwhile."""
    emit, builder = call.emit, call.emit.builder
    columns = range(len(row_tiles))
    sums = [[part * len(row_tiles) + column for column in columns] for part in range(PARTS)]
    rows = [call.weight_row(feature) for feature in features]
    for total in range(PARTS * len(row_tiles)):
        emit.zero(total)
    with emit.loop(emit.integer(0), call[Field.IN_FEATURES], DEPTH) as feature:
        for column, row_tile in enumerate(row_tiles):
            emit.load_tile(_OF_ROWS + column, call.pairs(row_tile, feature.index))
        for part, row in enumerate(rows):
            if ahead is not None:
                # 16 lines a round, as many as are read, in the order in which they lie
                asked = emit.at(call.weight_row(ahead[part]), builder.mul(feature.index, emit.integer(2 * TILE)), INT8)
                for line in range(TILE):
                    emit.prefetch(emit.at(asked, line * LINE_BYTES, INT8), near=SECOND_CACHE)
            place = emit.at(row, builder.mul(feature.index, emit.integer(2)), INT8)
            emit.load_tile(_OF_FEATURES + part, place, call.weight_row_bytes)
            for column, total in enumerate(sums[part]):
                emit.add_product(total, _OF_FEATURES + part, _OF_ROWS + column)
    return sums
