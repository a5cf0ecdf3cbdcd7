"""Segment attention by tile products (AMX): a question's rows, rounded to bfloat16, over bfloat16 keys and values.

As in `cpu_panel`, scores stand transposed, `[key, row]`: keys are tiles as they lie in memory, the query is turned once
a call, and the softmax has rows in its lanes. Weights, rounded to bfloat16, are turned for the second product, which
costs less than turning the values: those only have pairs of keys put side by side, once for all rows. Weighted sums are
`[row, head_dim]`. Scores, maxima and sums are float32.
"""

from __future__ import annotations

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_call import Call, Field
from cag_kernels.cpu_dequantize import Dequantizer
from cag_kernels.cpu_emit import FLOAT, INT8, INT16, INT32, INT64, POINTER, UNSEEN, Emitter, Value, function_blocks
from cag_kernels.cpu_loops import emit_factors, emit_logsumexps, emit_tasks
from cag_kernels.cpu_panel import MAX_WIDTH, Blocking
from cag_kernels.cpu_tile_piece import PIECE, Piece, piece_bytes
from cag_kernels.cpu_tiles import DEPTH, TILE, TileEmitter
from cag_kernels.prefixes import Codes

TILE_BLOCKING = Blocking(TILE, TILE, tile=PIECE, range_tokens=1024)


def tile_attention_module(head_dim: int, codes: Codes | None = None) -> ir.Module:
    """Module with `prepare`, `attend` and `finish`, each of one pointer to the fields of a call (`cpu_loops.Field`).

    `SCALED` holds the query turned but not scaled, `[num_kv_heads, head_dim / 2, num_lanes]` pairs of bfloat16;
    `WEIGHTED` is `[num_kv_heads, num_ranges, num_lanes, head_dim]`.
    """
    module = ir.Module(name=f"tile_attention_{head_dim}")
    pieces = [
        Piece(module, head_dim, width, piece_bytes(head_dim, codes)).function for width in range(1, MAX_WIDTH + 1)
    ]
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
        self.codes, self.row_bytes = codes, [size // PIECE for size in piece_bytes(self.head_dim, codes)]
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
            ahead = self._emit_ahead(head, builder.add(piece.index, emit.integer(PIECE)), stop)
            self._emit_paired(values, count)
            self._emit_panels(query, [keys, self.paired], sums, ahead, count)
        scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
        with emit.loop(emit.integer(0), lanes, TILE) as lane:
            place = emit.at(sums[0], lane.index)
            emit.store(builder.fmul(emit.load(place), scale), place)

    def _emit_ahead(self, head: Value, token: Value, stop: Value) -> list[Value]:
        """Where the piece lies that is computed with next: from `token` on, and behind the range that of the task that
        is taken next, by this thread as likely as by another."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        num_ranges = call[Field.NUM_RANGES]
        last = builder.sub(builder.mul(num_ranges, call[Field.NUM_KV_HEADS]), emit.integer(1))
        coming = builder.load_atomic(call.place(Field.NEXT_TASK), "monotonic", 8, typ=INT64)
        task = emit.minimum(coming, last)
        first = builder.mul(builder.srem(task, num_ranges), emit.integer(call.blocking.range_tokens))
        is_here = builder.icmp_signed("<", token, stop)
        token = builder.select(is_here, token, first)
        head = builder.select(is_here, head, builder.sdiv(task, num_ranges))
        return [self._place(side, head, token) for side in range(2)]

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
        source, copy = self._place(side, head, token), self.padded[side]
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

    def _place(self, side: int, head: Value, token: Value) -> Value:
        """Where the numbers or codes of a token lie in memory."""
        call, builder = self.call, self.emit.builder
        field, stride = ((Field.KEYS, Field.KEYS_STRIDE), (Field.VALUES, Field.VALUES_STRIDE))[side]
        unit, size = (INT16, self.head_dim) if self.codes is None else (INT8, self.row_bytes[side])
        return self.emit.at(
            call[field], call.index(head, (call[stride], builder.mul(token, self.emit.integer(size)))), unit
        )

    def _emit_paired(self, values: Value, count: Value) -> None:
        """Values of a piece as right operands: `[blocks of 32 keys, head_dim / 16, 16 pairs of keys, 16 channels]`."""
        emit, builder = self.emit, self.emit.builder
        with (
            emit.loop(emit.integer(0), count, DEPTH) as key,
            emit.loop(emit.integer(0), emit.integer(self.head_dim), DEPTH) as channel,
        ):
            first = builder.mul(key.index, emit.integer(self.head_dim))
            source = emit.at(values, builder.add(first, channel.index), INT16)
            target = emit.at(
                self.paired, emit.builder.add(first, builder.mul(channel.index, emit.integer(DEPTH))), INT16
            )
            for pair in range(TILE):
                even = emit.at(source, 2 * pair * self.head_dim, INT16)
                for part, pairs in enumerate(emit.load_pairs(even, emit.at(even, self.head_dim, INT16))):
                    builder.store(pairs, emit.at(target, (pair + part * TILE) * DEPTH, INT16), align=4)

    def _emit_panels(
        self, query: Value, sides: list[Value], sums: list[Value], ahead: list[Value], count: Value
    ) -> None:
        """All rows, in panels of about as many vectors each, which there are tiles for."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        lanes, scale = call[Field.NUM_LANES], call[Field.SCALE]
        vectors = builder.udiv(lanes, emit.integer(TILE))
        num_panels = emit.rounded_up(vectors, emit.integer(MAX_WIDTH))
        most = emit.rounded_up(vectors, num_panels)
        with emit.loop(emit.integer(0), lanes, builder.mul(most, emit.integer(TILE))) as column:
            left = builder.sub(lanes, column.index)
            width = emit.minimum(builder.sdiv(left, emit.integer(TILE)), most)
            channels = builder.mul(column.index, emit.integer(self.head_dim))
            shifted = [
                emit.at(place, index) for place, index in zip(sums, (column.index, column.index, channels), strict=True)
            ]
            arguments = [emit.at(query, column.index, INT32), *sides, *shifted, *ahead, count, lanes, scale]
            joined = call.function.append_basic_block("joined")
            switch = builder.switch(width, joined)
            for index, piece in enumerate(self.pieces):
                (block,) = function_blocks(call.function, f"width_{index + 1}")
                switch.add_case(emit.integer(index + 1), block)
                builder.position_at_end(block)
                builder.call(piece, arguments)
                builder.branch(joined)
            builder.position_at_end(joined)


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
