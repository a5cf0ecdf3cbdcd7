"""Segment attention by tile products (AMX): a question's rows, rounded to bfloat16, over bfloat16 keys and values.

As in `cpu_panel`, scores stand transposed, `[key, row]`: keys are tiles as they lie in memory, the query is turned once
a call, and the softmax has rows in its lanes. Weights, rounded to bfloat16, are turned for the second product, which
costs less than turning the values: those only have pairs of keys put side by side, once for all rows. Weighted sums are
`[row, head_dim]`. Scores, maxima and sums are float32.
"""

from __future__ import annotations

import math

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_call import Call, Field
from cag_kernels.cpu_dequantize import Dequantizer
from cag_kernels.cpu_emit import FLOAT, INT8, INT16, INT32, INT64, POINTER, UNSEEN, Emitter, Value, function_blocks
from cag_kernels.cpu_loops import emit_factors, emit_logsumexps, emit_tasks
from cag_kernels.cpu_panel import MAX_WIDTH, Blocking
from cag_kernels.cpu_tiles import DEPTH, FEW_TERMS, TILE, TileEmitter
from cag_kernels.prefixes import Codes

PIECE = 128  # keys of one softmax step: scores, turned values and weights of them stay in the first two caches
TILE_BLOCKING = Blocking(TILE, TILE, tile=PIECE, range_tokens=1024)
_LOG2_E = 1 / math.log(2)
_OF_ROWS, _SHARED = 3, 6  # tiles 0 to 2 hold sums, 3 to 5 operands of rows, 6 the one that all rows meet


def tile_attention_module(head_dim: int, codes: Codes | None = None) -> ir.Module:
    """Module with `prepare`, `attend` and `finish`, each of one pointer to the fields of a call (`cpu_loops.Field`).

    `SCALED` holds the query turned but not scaled, `[num_kv_heads, head_dim / 2, num_lanes]` pairs of bfloat16;
    `WEIGHTED` is `[num_kv_heads, num_ranges, num_lanes, head_dim]`.
    """
    module = ir.Module(name=f"tile_attention_{head_dim}")
    pieces = [_Piece(module, head_dim, width).function for width in range(1, MAX_WIDTH + 1)]
    _emit_prepare(_TileCall(module, "prepare", head_dim, TILE_BLOCKING))
    attend = _TileCall(module, "attend", head_dim, TILE_BLOCKING, has_codes=codes is not None)
    with attend.emit.configured():
        task = _Task(attend, pieces, codes)
        emit_tasks(attend, task.emit_range)
    attend.emit.builder.ret_void()
    _emit_finish(Call(module, "finish", head_dim, TILE_BLOCKING))
    return module


class _TileCall(Call):
    emit: TileEmitter

    def make_emitter(self) -> Emitter:
        return TileEmitter(self.function)


def _emit_prepare(call: _TileCall) -> None:
    """Turn 16 rows by 32 channels at a time; rows behind the last repeat it."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    last = builder.sub(call[Field.NUM_ROWS], emit.integer(1))
    with (
        emit.loop(zero, call[Field.NUM_KV_HEADS], 1) as head,
        emit.loop(zero, call[Field.NUM_LANES], TILE) as first,
        emit.loop(zero, emit.integer(call.head_dim), DEPTH) as channel,
    ):
        rows = []
        for row in range(TILE):
            place = emit.minimum(builder.add(first.index, emit.integer(row)), last)
            index = call.index(head.index, (call[Field.NUM_ROWS], place), (call.head_dim, channel.index))
            source = emit.at(call[Field.QUERY], index, INT16)
            rows.append(emit.load_integers(source))
        pair = builder.udiv(channel.index, emit.integer(2))
        index = call.index(head.index, (call.head_dim // 2, pair), (call[Field.NUM_LANES], first.index))
        for step, vector in enumerate(emit.transposed(rows)):
            shift = builder.mul(call[Field.NUM_LANES], emit.integer(step))
            builder.store(vector, emit.at(call[Field.SCALED], builder.add(index, shift), INT32), align=4)
    builder.ret_void()


class _Task:
    """One range of keys of one head: piece by piece, and within a piece by panels of rows."""

    def __init__(self, call: _TileCall, pieces: list[ir.Function], codes: Codes | None) -> None:
        self.call, self.emit, self.pieces = call, call.emit, pieces
        self.head_dim = call.head_dim
        self.paired = self.emit.bytes_on_stack(2 * PIECE * self.head_dim)
        self.numbers = None if codes is None else Dequantizer(call, codes, PIECE)
        if self.numbers is None:
            self.padded = [self.emit.bytes_on_stack(2 * PIECE * self.head_dim) for _ in range(2)]

    def emit_range(self, task: Value) -> None:
        """The keys of a task; results of rows go to their places for the task."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        num_ranges, lanes = call[Field.NUM_RANGES], call[Field.NUM_LANES]
        head, part = builder.sdiv(task, num_ranges), builder.srem(task, num_ranges)
        first = builder.mul(part, emit.integer(call.blocking.range_tokens))
        stop = emit.minimum(builder.add(first, emit.integer(call.blocking.range_tokens)), call[Field.NUM_KEYS])
        query_index = builder.mul(builder.mul(head, emit.integer(self.head_dim // 2)), lanes)
        query = emit.at(call[Field.SCALED], query_index, INT32)
        sums = [
            emit.at(call[field], builder.mul(builder.mul(task, emit.integer(size)), lanes))
            for field, size in ((Field.MAXIMUM, 1), (Field.DENOMINATOR, 1), (Field.WEIGHTED, self.head_dim))
        ]
        self._emit_start(sums, lanes)
        with emit.loop(first, stop, PIECE) as piece:
            count = emit.minimum(builder.sub(stop, piece.index), emit.integer(PIECE))
            keys, values = (self._emit_whole(side, head, piece.index, count) for side in range(2))
            self._emit_paired(values, count)
            self._emit_panels(query, [keys, self.paired], sums, count)
        scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
        with emit.loop(emit.integer(0), lanes, TILE) as lane:
            place = emit.at(sums[0], lane.index)
            emit.store(builder.fmul(emit.load(place), scale), place)

    def _emit_start(self, sums: list[Value], lanes: Value) -> None:
        emit, builder = self.emit, self.emit.builder
        maximum, denominator, weighted = sums
        with emit.loop(emit.integer(0), lanes, TILE) as lane:
            emit.store(emit.constant(UNSEEN), emit.at(maximum, lane.index))
            emit.store(emit.constant(0.0), emit.at(denominator, lane.index))
        with emit.loop(emit.integer(0), builder.mul(lanes, emit.integer(self.head_dim)), TILE) as element:
            emit.store(emit.constant(0.0), emit.at(weighted, element.index))

    def _emit_whole(self, side: int, head: Value, token: Value, count: Value) -> Value:
        """Where a piece's keys (0) or values (1) lie: a copy when they are codes, or with zeros behind it when it is
        not whole."""
        if self.numbers is not None:
            return self.numbers.emit_side(side, head, token, count)
        call, emit, builder = self.call, self.emit, self.emit.builder
        field, stride = ((Field.KEYS, Field.KEYS_STRIDE), (Field.VALUES, Field.VALUES_STRIDE))[side]
        index = call.index(head, (call[stride], builder.mul(token, emit.integer(self.head_dim))))
        source, copy = emit.at(call[field], index, INT16), self.padded[side]
        before, (partly, behind) = builder.block, function_blocks(call.function, "partly", "behind")
        builder.cbranch(builder.icmp_signed("<", count, emit.integer(PIECE)), partly, behind)
        builder.position_at_end(partly)
        present = builder.mul(count, emit.integer(self.head_dim))
        vector = ir.VectorType(INT16, TILE)
        with emit.loop(emit.integer(0), present, TILE) as element:
            numbers = builder.load(emit.at(source, element.index, INT16), typ=vector, align=2)
            builder.store(numbers, emit.at(copy, element.index, INT16), align=2)
        with emit.loop(present, emit.integer(PIECE * self.head_dim), TILE) as element:
            zeros = ir.Constant(vector, [0] * TILE)
            builder.store(zeros, emit.at(copy, element.index, INT16), align=2)
        end = builder.block
        builder.branch(behind)
        builder.position_at_end(behind)
        found = builder.phi(POINTER)
        found.add_incoming(source, before)
        found.add_incoming(copy, end)
        return found

    def _emit_paired(self, values: Value, count: Value) -> None:
        """Values of a piece as right operands: `[blocks of 32 keys, head_dim / 16, 16 pairs of keys, 16 channels]`."""
        emit, builder = self.emit, self.emit.builder
        with (
            emit.loop(emit.integer(0), count, DEPTH) as key,
            emit.loop(emit.integer(0), emit.integer(self.head_dim), TILE) as channel,
        ):
            first = builder.mul(key.index, emit.integer(self.head_dim))
            source = emit.at(values, builder.add(first, channel.index), INT16)
            target = emit.at(
                self.paired, emit.builder.add(first, builder.mul(channel.index, emit.integer(DEPTH))), INT16
            )
            for pair in range(TILE):
                even = emit.at(source, 2 * pair * self.head_dim, INT16)
                pairs = emit.load_pairs(even, emit.at(even, self.head_dim, INT16))
                builder.store(pairs, emit.at(target, pair * DEPTH, INT16), align=4)

    def _emit_panels(self, query: Value, sides: list[Value], sums: list[Value], count: Value) -> None:
        """All rows, as many vectors of them at a time as there are tiles for."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        lanes, scale = call[Field.NUM_LANES], call[Field.SCALE]
        with emit.loop(emit.integer(0), lanes, TILE * MAX_WIDTH) as column:
            left = builder.sub(lanes, column.index)
            width = emit.minimum(builder.sdiv(left, emit.integer(TILE)), emit.integer(MAX_WIDTH))
            channels = builder.mul(column.index, emit.integer(self.head_dim))
            shifted = [
                emit.at(place, index) for place, index in zip(sums, (column.index, column.index, channels), strict=True)
            ]
            arguments = [emit.at(query, column.index, INT32), *sides, *shifted, count, lanes, scale]
            joined = call.function.append_basic_block("joined")
            switch = builder.switch(width, joined)
            for index, piece in enumerate(self.pieces):
                (block,) = function_blocks(call.function, f"width_{index + 1}")
                switch.add_case(emit.integer(index + 1), block)
                builder.position_at_end(block)
                builder.call(piece, arguments)
                builder.branch(joined)
            builder.position_at_end(joined)


class _Piece:
    """Up to `PIECE` keys for `width` vectors of rows. The maximum is of scores that are not scaled yet.

    Arguments: the turned query, keys, paired values; maximum, denominator and weighted sums so far; then the number of
    keys, rows from one channel of the query to the next, and the bits of the scale.
    """

    def __init__(self, module: ir.Module, head_dim: int, width: int) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 6 + [INT64] * 3)
        self.function = ir.Function(module, kind, name=f"piece_{width}")
        self.function.linkage = "internal"
        self.emit = TileEmitter(self.function)
        self.head_dim, self.width, self.row_floats = head_dim, width, width * TILE
        arguments = self.function.args
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = arguments[:6]
        self.count, self.lanes, scale = arguments[6:]
        emit, builder = self.emit, self.emit.builder
        self.scores = emit.scratch(PIECE * self.row_floats)
        self.weights = emit.bytes_on_stack(2 * PIECE * self.row_floats)
        self.corrections = emit.scratch(self.row_floats)
        factor = builder.bitcast(builder.trunc(scale, INT32), FLOAT)
        self.factor = builder.fmul(emit.spread_number(factor), emit.constant(_LOG2_E))  # of scores, to powers of two
        blocks = builder.sdiv(builder.add(self.count, emit.integer(DEPTH - 1)), emit.integer(DEPTH))
        self.num_keys = builder.mul(blocks, emit.integer(DEPTH))
        self._emit_scores()
        self._emit_unseen()
        self._emit_corrected(self._emit_softmax())
        self._emit_left()
        self._emit_weighted()
        builder.ret_void()

    def _emit_scores(self) -> None:
        emit, builder = self.emit, self.emit.builder
        key_bytes = 2 * self.head_dim
        lane_bytes = builder.mul(self.lanes, emit.integer(4))
        with emit.loop(emit.integer(0), self.count, TILE) as key:
            keys = emit.at(self.keys, builder.mul(key.index, emit.integer(key_bytes)), INT8)
            for lane in range(self.width):
                emit.zero(lane)
            for step in range(self.head_dim // DEPTH):
                emit.load_tile(_SHARED, emit.at(keys, 2 * DEPTH * step, INT8), key_bytes)
                rows = emit.at(self.query, builder.mul(self.lanes, emit.integer(TILE * step)), INT32)
                for lane in range(self.width):
                    emit.load_tile(_OF_ROWS + lane, emit.at(rows, lane * TILE, INT32), lane_bytes)
                    emit.add_product(lane, _SHARED, _OF_ROWS + lane)
            target = emit.at(self.scores, builder.mul(key.index, emit.integer(self.row_floats)))
            for lane in range(self.width):
                emit.store_tile(lane, emit.at(target, lane * TILE), 4 * self.row_floats)

    def _emit_unseen(self) -> None:
        """Scores of what lies behind the last key in its block of 32."""
        emit, builder = self.emit, self.emit.builder
        with (
            emit.when(builder.icmp_signed("<", self.count, self.num_keys)),
            emit.loop(self.count, self.num_keys, 1) as key,
        ):
            place = emit.at(self.scores, builder.mul(key.index, emit.integer(self.row_floats)))
            for lane in range(self.width):
                emit.store(emit.constant(UNSEEN), emit.at(place, lane * TILE))

    def _row(self, pointer: Value, index: Value) -> list[Value]:
        place = self.emit.at(pointer, self.emit.builder.mul(index, self.emit.integer(self.row_floats)))
        return [self.emit.load(self.emit.at(place, lane * TILE)) for lane in range(self.width)]

    def _lanes_of(self, pointer: Value) -> list[Value]:
        return [self.emit.load(self.emit.at(pointer, lane * TILE)) for lane in range(self.width)]

    def _emit_softmax(self) -> list[Value]:
        """Scores to weights, pairs of keys side by side in the scores' memory; the corrections of older sums."""
        emit, builder, lanes = self.emit, self.emit.builder, range(self.width)
        before = self._lanes_of(self.maximum)
        with emit.loop(emit.integer(0), self.num_keys, 2, before) as key:
            even, odd = (
                self._row(self.scores, key.index),
                self._row(self.scores, builder.add(key.index, emit.integer(1))),
            )
            key.following = [emit.larger(odd[i], emit.larger(even[i], key.values[i])) for i in lanes]
        larger = list(key.following)
        corrections = [self._weight(before[i], larger[i]) for i in lanes]
        old = self._lanes_of(self.denominator)
        with emit.loop(emit.integer(0), self.num_keys, 2, [builder.fmul(old[i], corrections[i]) for i in lanes]) as key:
            weights = [
                [
                    self._weight(score, larger[i])
                    for i, score in enumerate(self._row(self.scores, builder.add(key.index, emit.integer(step))))
                ]
                for step in range(2)
            ]
            place = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
            for i in lanes:
                pairs = emit.pairs(weights[0][i], weights[1][i])
                builder.store(pairs, emit.at(self.scores, builder.add(place, emit.integer(i * TILE))), align=4)
            key.following = [builder.fadd(key.values[i], builder.fadd(weights[0][i], weights[1][i])) for i in lanes]
        for i in lanes:
            emit.store(larger[i], emit.at(self.maximum, i * TILE))
            emit.store(key.following[i], emit.at(self.denominator, i * TILE))
        return corrections

    def _weight(self, score: Value, maximum: Value) -> Value:
        """The difference first: a product of its own for each would round huge scores to more than the maximum."""
        exponent = self.emit.builder.fmul(self.emit.builder.fsub(score, maximum), self.factor)
        return self.emit.power_of_two(exponent, FEW_TERMS)

    def _emit_left(self) -> None:
        """Weights as left operands: `[blocks of 32 keys, width, 16 rows, 32 keys]`."""
        emit, builder = self.emit, self.emit.builder
        with emit.loop(emit.integer(0), self.num_keys, DEPTH) as key:
            first = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
            for lane in range(self.width):
                place = builder.add(first, emit.integer(lane * TILE))
                source = emit.at(self.scores, place, INT32)
                pairs = [emit.load_integers(emit.at(source, pair * self.row_floats, INT32)) for pair in range(TILE)]
                target = emit.at(self.weights, builder.add(first, emit.integer(lane * TILE * TILE)), INT32)
                for row, vector in enumerate(emit.transposed(pairs)):
                    builder.store(vector, emit.at(target, row * TILE, INT32), align=4)

    def _emit_corrected(self, corrections: list[Value]) -> None:
        emit, builder = self.emit, self.emit.builder
        for lane, vector in enumerate(corrections):
            emit.store(vector, emit.at(self.corrections, lane * TILE))
        with emit.loop(emit.integer(0), emit.integer(self.row_floats), 1) as row:
            factor = emit.spread(emit.at(self.corrections, row.index))
            place = emit.at(self.weighted, builder.mul(row.index, emit.integer(self.head_dim)))
            for channel in range(0, self.head_dim, TILE):
                target = emit.at(place, channel)
                emit.store(builder.fmul(emit.load(target), factor), target)

    def _emit_weighted(self) -> None:
        """Add the piece's weighted values, 16 channels at a time."""
        emit, builder = self.emit, self.emit.builder
        row_bytes = 4 * self.head_dim
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), TILE) as channel:
            places = [
                emit.at(self.weighted, builder.add(channel.index, emit.integer(lane * TILE * self.head_dim)))
                for lane in range(self.width)
            ]
            for lane, place in enumerate(places):
                emit.load_tile(lane, place, row_bytes)
            with emit.loop(emit.integer(0), self.num_keys, DEPTH) as key:
                index = builder.add(
                    builder.mul(key.index, emit.integer(self.head_dim)), builder.mul(channel.index, emit.integer(DEPTH))
                )
                emit.load_tile(_SHARED, emit.at(self.values, index, INT16))
                first = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
                for lane in range(self.width):
                    source = emit.at(self.weights, builder.add(first, emit.integer(lane * TILE * TILE)), INT32)
                    emit.load_tile(_OF_ROWS + lane, source)
                    emit.add_product(lane, _OF_ROWS + lane, _SHARED)
            for lane, place in enumerate(places):
                emit.store_tile(lane, place, row_bytes)


def _emit_finish(call: Call) -> None:
    """Join the ranges of every head and write the result, row by row; maxima and denominators end in range 0."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    num_ranges, lanes = call[Field.NUM_RANGES], call[Field.NUM_LANES]
    with (
        emit.loop(zero, call[Field.NUM_KV_HEADS], 1) as head,
        emit.loop(zero, lanes, TILE) as vector,
    ):
        base = builder.mul(head.index, num_ranges)
        largest, total = emit_factors(call, base, vector.index)
        first = vector.index
        stop = emit.minimum(builder.add(first, emit.integer(TILE)), call[Field.NUM_ROWS])
        with emit.loop(first, stop, 1) as row:
            nothing = [emit.constant(0.0)] * (call.head_dim // TILE)
            with emit.loop(zero, num_ranges, 1, nothing) as part:
                task = builder.add(base, part.index)
                factor = emit.spread(emit.at(call[Field.MAXIMUM], call.index(task, (lanes, row.index))))
                weighted = emit.at(call[Field.WEIGHTED], call.index(task, (lanes, row.index), (call.head_dim, 0)))
                part.following = [
                    emit.multiply_add(factor, emit.load(emit.at(weighted, index * TILE)), value)
                    for index, value in enumerate(part.values)
                ]
            target = emit.at(
                call[Field.OUT], call.index(head.index, (call[Field.NUM_ROWS], row.index), (call.head_dim, 0))
            )
            for index, value in enumerate(part.following):
                emit.store(value, emit.at(target, index * TILE))
        place = call.index(base, (lanes, first))
        emit.store(largest, emit.at(call[Field.MAXIMUM], place))
        emit.store(total, emit.at(call[Field.DENOMINATOR], place))
    emit_logsumexps(call)
    builder.ret_void()
