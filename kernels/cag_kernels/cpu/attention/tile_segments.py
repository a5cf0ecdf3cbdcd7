"""Segment attention by tile products (AMX): a question's rows, rounded to bfloat16, over bfloat16 keys and values.

As in `cpu.attention.panel`, scores stand transposed, `[key, row]`: keys are tiles as they lie in memory, the query is
turned once a call, and the softmax has rows in its lanes. Weights, rounded to bfloat16, are turned for the second
product, which costs less than turning the values: those only have pairs of keys put side by side, once for all rows.
Weighted sums are `[row, head_dim]`. Scores, maxima and sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.loops import emit_factors, emit_logsumexps, emit_tasks
from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.attention.tile_codes import operands_of
from cag_kernels.cpu.attention.tile_piece import NUM_ASKING, PIECE, Ahead, Coming, Going, Pipeline, Rows
from cag_kernels.cpu.attention.window import emit_num_hidden
from cag_kernels.cpu.attention.window_call import emit_first_keys, emit_range_bounds
from cag_kernels.cpu.emit import (
    FLOAT,
    INT1,
    INT8,
    INT16,
    INT32,
    INT64,
    LINE_BYTES,
    POINTER,
    UNSEEN,
    Emitter,
    Loop,
    Value,
    function_blocks,
)
from cag_kernels.cpu.tiles import DEPTH, TILE, TileEmitter
from cag_kernels.prefixes import Codes

PIECES_AHEAD = 1, 0  # keys are read a piece before the values
TILE_BLOCKING = Blocking(TILE, TILE, tile=PIECE, range_tokens=1024)
SHORT_BLOCKING = Blocking(TILE, TILE, tile=PIECE, range_tokens=256)
SHORT_WINDOW = 1024  # up to which shorter ranges pay, as threads want some each; see docs/design/018


def tile_attention_module(
    head_dim: int, codes: Codes | None = None, blocking: Blocking = TILE_BLOCKING, has_window: bool = False
) -> ir.Module:
    """Module with `prepare`, `attend` and `finish`, each of one pointer to the fields of a call
    (`cpu.attention.loops.Field`).

    `SCALED` holds the query turned but not scaled, `[num_kv_heads, head_dim / 2, num_lanes]` pairs of bfloat16;
    `WEIGHTED` is `[num_kv_heads, num_ranges, num_lanes, head_dim]`.
    """
    module = ir.Module(name=f"tile_attention_{head_dim}")
    _emit_prepare(_TileCall(module, "prepare", head_dim, blocking, has_window=has_window))
    attend = _TileCall(module, "attend", head_dim, blocking, has_window=has_window, has_codes=codes is not None)
    with attend.emit.configured():
        task = _Task(attend, codes)
        emit_tasks(attend, task.emit_range)
    attend.emit.builder.ret_void()
    finish = Call(module, "finish", head_dim, blocking, has_window=has_window)
    _emit_finish(finish, task.operands.channel_order)
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
    if call.has_window:
        emit_first_keys(call, PIECE)
    builder.ret_void()


class _Task:
    """One range of keys of one head: piece by piece, and within a piece one vector of rows after the other."""

    def __init__(self, call: _TileCall, codes: Codes | None) -> None:
        self.call, self.emit = call, call.emit
        self.head_dim = call.head_dim
        self.pipeline = Pipeline(call.emit, call.head_dim, call[Field.NUM_LANES], call[Field.SCALE])
        self.operands = operands_of(call, call.emit, codes)

    def emit_range(self, task: Value) -> None:
        """The keys of a task; results of rows go to their places for the task."""
        call, emit, builder, zero = self.call, self.emit, self.emit.builder, self.emit.integer(0)
        num_ranges, lanes = call[Field.NUM_RANGES], call[Field.NUM_LANES]
        head, part = builder.sdiv(task, num_ranges), builder.srem(task, num_ranges)
        first, stop = emit_range_bounds(call, part)
        query_index = builder.mul(builder.mul(head, emit.integer(self.head_dim // 2)), lanes)
        query = emit.at(call[Field.SCALED], query_index, INT32)
        sums = [
            emit.at(call[field], builder.mul(builder.mul(task, emit.integer(size)), lanes))
            for field, size in ((Field.MAXIMUM, 1), (Field.DENOMINATOR, 1), (Field.WEIGHTED, self.head_dim))
        ]
        self._emit_start(sums, lanes)
        keys = self.operands.emit_keys(head, first, self._count(first, stop))
        self.pipeline.emit_begin(Coming(keys, query))
        nothing = [zero, self.pipeline.nowhere]  # sums of nobody before the first rows
        with emit.loop(first, stop, PIECE, [keys, *nothing]) as piece:
            piece.following = self._emit_piece(piece, head, query, sums, (first, stop))
        turn, weighted = piece.following[1:]
        self.pipeline.emit_end(turn, Going(self.operands.paired, weighted))
        scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
        with emit.loop(zero, lanes, TILE) as lane:
            place = emit.at(sums[0], lane.index)
            emit.store(builder.fmul(emit.load(place), scale), place)

    def _emit_piece(
        self, piece: Loop, head: Value, query: Value, sums: list[Value], bounds: tuple[Value, Value]
    ) -> list[Value]:
        """One piece of the keys within `bounds` for all rows. Carried on: where the keys of the piece lie, then the
        turn of the next step and the sums of the rows whose weights wait for values.

        So the values of a piece are wanted from its second step to the first of the next one, and the keys of the next
        one in the last step: one place is enough for each. Rows take their turns forth in even pieces and back in odd
        ones: all operands together are more than the first cache holds, and what met the last rows is still there.
        """
        emit, builder, lanes = self.emit, self.emit.builder, self.call[Field.NUM_LANES]
        begin, stop = bounds
        count, following = self._count(piece.index, stop), builder.add(piece.index, emit.integer(PIECE))
        ahead = self._emit_ahead(head, following, stop)
        is_odd = builder.trunc(builder.udiv(builder.sub(piece.index, begin), emit.integer(PIECE)), INT1)
        step = builder.select(is_odd, emit.integer(-TILE), emit.integer(TILE))
        first = builder.select(is_odd, builder.sub(lanes, emit.integer(TILE)), emit.integer(0))
        with emit.loop(emit.integer(0), lanes, TILE, [first, *piece.values]) as rows:
            lane, keys, turn, going = rows.values
            is_last = builder.icmp_signed("==", rows.index, builder.sub(lanes, emit.integer(TILE)))
            coming = self._emit_coming_keys(is_last, head, following, stop, keys)
            next_lane = builder.select(is_last, lane, builder.add(lane, step))
            hidden = None
            if self.call.has_window:
                first_keys = emit.at(self.call[Field.FIRST_KEYS], lane, INT32)
                hidden = emit_num_hidden(emit, first_keys, piece.index)
            present = Rows(emit.at(sums[0], lane), emit.at(sums[1], lane), count, hidden)
            self.pipeline.emit_step(
                turn,
                Coming(coming, emit.at(query, next_lane, INT32)),
                present,
                Going(self.operands.paired, going),
                self._share(ahead, rows.index),
            )
            with emit.when(builder.icmp_signed("==", rows.index, emit.integer(0))):
                self.operands.emit_values(head, piece.index, count)
            weighted = emit.at(sums[2], builder.mul(lane, emit.integer(self.head_dim)))
            rows.following = [next_lane, coming, builder.sub(emit.integer(1), turn), weighted]
        return list(rows.following[1:])

    def _emit_coming_keys(self, is_last: Value, head: Value, token: Value, stop: Value, keys: Value) -> Value:
        """Where the keys of the next step lie: those of the piece from `token` on behind the last rows; when the range
        ends there, any that may be read."""
        builder = self.emit.builder
        before, (other, behind) = builder.block, function_blocks(self.call.function, "other", "behind")
        is_other = builder.and_(is_last, builder.icmp_signed("<", token, stop))
        builder.cbranch(is_other, other, behind)
        builder.position_at_end(other)
        found = self.operands.emit_keys(head, token, self._count(token, stop))
        end = builder.block
        builder.branch(behind)
        builder.position_at_end(behind)
        place = builder.phi(POINTER)
        place.add_incoming(keys, before)
        place.add_incoming(found, end)
        return place

    def _count(self, token: Value, stop: Value) -> Value:
        return self.emit.minimum(self.emit.builder.sub(stop, token), self.emit.integer(PIECE))

    def _share(self, ahead: list[Ahead], lane: Value) -> list[Ahead]:
        """What is asked for during the step of the rows from `lane` on."""
        emit, builder = self.emit, self.emit.builder
        step = builder.mul(builder.udiv(lane, emit.integer(TILE)), emit.integer(NUM_ASKING * LINE_BYTES))
        return [side._replace(place=emit.at(side.place, builder.mul(step, side.each), INT8)) for side in ahead]

    def _emit_ahead(self, head: Value, token: Value, stop: Value) -> list[Ahead]:
        """What memory is asked for during a piece: keys and values that later steps read, counted from the next piece,
        which begins at `token`; behind the range those of the task that is taken next, by this thread as likely as by
        another."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        num_ranges, range_tokens = call[Field.NUM_RANGES], emit.integer(call.blocking.range_tokens)
        last = builder.sub(builder.mul(num_ranges, call[Field.NUM_KV_HEADS]), emit.integer(1))
        waiting = builder.load_atomic(call.place(Field.NEXT_TASK), "monotonic", 8, typ=INT64)
        task = emit.minimum(waiting, last)
        vectors = builder.udiv(call[Field.NUM_LANES], emit.integer(TILE))
        found = []
        for side, pieces in enumerate(PIECES_AHEAD):
            wanted = builder.add(token, emit.integer(pieces * PIECE))
            first, _ = emit_range_bounds(call, builder.srem(task, num_ranges))
            behind = builder.urem(wanted, range_tokens)  # of the next range when this one is whole
            is_here = builder.icmp_signed("<", wanted, stop)
            place = self.operands.place(
                side,
                builder.select(is_here, head, builder.sdiv(task, num_ranges)),
                builder.select(is_here, wanted, builder.add(first, behind)),
            )
            places = builder.mul(vectors, emit.integer(NUM_ASKING))
            found.append(Ahead(place, emit.rounded_up(emit.integer(self.operands.num_lines(side)), places)))
        return found

    def _emit_start(self, sums: list[Value], lanes: Value) -> None:
        emit, builder = self.emit, self.emit.builder
        maximum, denominator, weighted = sums
        with emit.loop(emit.integer(0), lanes, TILE) as lane:
            emit.store(emit.constant(UNSEEN), emit.at(maximum, lane.index))
            emit.store(emit.constant(0.0), emit.at(denominator, lane.index))
        with emit.loop(emit.integer(0), builder.mul(lanes, emit.integer(self.head_dim)), TILE) as element:
            emit.store(emit.constant(0.0), emit.at(weighted, element.index))


def _emit_finish(call: Call, channel_order: Sequence[int]) -> None:
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
            for channel in range(0, call.head_dim, DEPTH):
                low, high = part.following[channel // TILE : channel // TILE + 2]
                for index, value in enumerate(emit.reordered(low, high, channel_order)):
                    emit.store(value, emit.at(target, channel + index * TILE))
        place = call.index(base, (lanes, first))
        emit.store(largest, emit.at(call[Field.MAXIMUM], place))
        emit.store(total, emit.at(call[Field.DENOMINATOR], place))
        emit_logsumexps(call, head.index, first, stop)
    builder.ret_void()
