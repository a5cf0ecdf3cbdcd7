"""Attention of sessions' rows over their own tails, as LLVM code; `cpu.paged` has the call and says what it means.

A task is a piece of the rows of one session and key/value head: query heads of a token side by side, token by token.
The piece's keys come a block at a time, at fixed places of the tail. A block is turned once and meets the rows a few at
a time, with an online softmax from block to block. Then each row is joined with what it found in other segments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.segments import MAX_FEW_ROWS
from cag_kernels.cpu.attention.tail_rows import TailRows, turning_function
from cag_kernels.cpu.emit import ELEMENTS, FLOAT, INT32, INT64, POINTER, UNSEEN, Emitter, Value
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.paged import ADDRESSES, Field
from cag_kernels.cpu.team import tasks_taken
from cag_kernels.prefixes import BLOCK_TOKENS

ROWS = 6  # that meet a block of keys at a time, where a session has more than one token's
PIECE_ROWS = 8 * ROWS


def tails_module(head_dim: int, group: int, lanes: int, kept: torch.dtype) -> ir.Module:
    """Module with `attend`, of one pointer to the fields of a call: of so many query heads a key/value head.

    lanes: of a vector; they divide `head_dim`.
    """
    module = ir.Module(name="tails")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name="attend")
    some = TailRows(module, head_dim, ROWS, lanes, kept).function
    has_own = group != ROWS and group <= MAX_FEW_ROWS
    one_token = TailRows(module, head_dim, group, lanes, kept).function if has_own else some
    turn = turning_function(module, head_dim, lanes, kept)
    _Attend(Emitter(function, lanes), head_dim, group, kept, some, one_token, turn)
    return module


class _Rows:
    """A piece's rows on the stack: what is theirs, and how far they have come."""

    def __init__(self, emit: Emitter, head_dim: int) -> None:
        self.emit, self.head_dim = emit, head_dim
        self.query, self.sums = emit.scratch(PIECE_ROWS * head_dim), emit.scratch(PIECE_ROWS * head_dim)
        self.maxima, self.denominators = emit.scratch(PIECE_ROWS), emit.scratch(PIECE_ROWS)
        self.firsts, self.lasts = emit.scratch(PIECE_ROWS), emit.scratch(PIECE_ROWS)  # int32: keys that each sees

    def wide(self, pointer: Value, row: Value) -> Value:
        """Where a row's channels begin."""
        return self.emit.at(pointer, self.emit.builder.mul(row, self.emit.integer(self.head_dim)))

    def begin(self, row: Value, source: Value | None, scale: Value, first: Value, last: Value) -> None:
        """With no key seen; without a source, for a row that there is not."""
        emit, builder, nothing = self.emit, self.emit.builder, self.emit.constant(0.0)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), emit.lanes) as channel:
            scaled = nothing
            if source is not None:
                scaled = builder.fmul(emit.load(emit.at(source, channel.index)), scale)
            emit.store(scaled, emit.at(self.wide(self.query, row), channel.index))
            emit.store(nothing, emit.at(self.wide(self.sums, row), channel.index))
        builder.store(ir.Constant(FLOAT, UNSEEN), emit.at(self.maxima, row), align=4)
        builder.store(ir.Constant(FLOAT, 0.0), emit.at(self.denominators, row), align=4)
        for side, bound in ((self.firsts, first), (self.lasts, last)):
            builder.store(builder.trunc(bound, INT32), emit.at(side, row, INT32), align=4)

    def pointers(self, row: Value) -> list[Value]:
        """Of rows from one on, what `TailRows` takes: query, bounds and sums."""
        emit = self.emit
        bounds = [emit.at(side, row, INT32) for side in (self.firsts, self.lasts)]
        sums = [emit.at(self.maxima, row), emit.at(self.denominators, row), self.wide(self.sums, row)]
        return [self.wide(self.query, row), *bounds, *sums]


class _Attend:
    """The function that threads run."""

    def __init__(
        self,
        emit: Emitter,
        head_dim: int,
        group: int,
        kept: torch.dtype,
        some: ir.Function,
        one_token: ir.Function,
        turn: ir.Function,
    ) -> None:
        self.emit, self.head_dim, self.group, self.element = emit, head_dim, group, ELEMENTS[kept]
        self.some, self.one_token, self.turn = some, one_token, turn
        self.call = Fields(emit, list(Field)[1:], ADDRESSES)
        self.rows, self.turned = _Rows(emit, head_dim), emit.scratch(head_dim * BLOCK_TOKENS)
        self.place = emit.scratch(1)
        scale = emit.builder.bitcast(emit.builder.trunc(self.call[Field.SCALE], INT32), FLOAT)
        self.scale = emit.spread_number(scale)
        self._emit_tasks()
        emit.builder.ret_void()

    def _integer(self, array: Value, index: Value) -> Value:
        """One of an array of int32."""
        found = self.emit.builder.load(self.emit.at(array, index, INT32), typ=INT32, align=4)
        return self.emit.builder.sext(found, INT64)

    def _num_rows(self, first: Value, last: Value) -> Value:
        """Tokens of sessions `[first, last)` that ask."""
        begin, end = (self._integer(self.call[Field.STARTS], session) for session in (first, last))
        return self.emit.builder.sub(end, begin)

    def _emit_tasks(self) -> None:
        emit, builder, call = self.emit, self.emit.builder, self.call
        one, heads = emit.integer(1), call[Field.NUM_KV_HEADS]
        first, last = call[Field.FIRST_SESSION], call[Field.LAST_SESSION]
        with emit.loop(first, last, 1, [one]) as session:  # the most tokens of a session that ask
            count = self._num_rows(session.index, builder.add(session.index, one))
            more = builder.icmp_signed(">", count, session.values[0])
            session.following = [builder.select(more, count, session.values[0])]
        most_rows = builder.mul(session.following[0], emit.integer(self.group))
        pieces = emit.rounded_up(most_rows, emit.integer(PIECE_ROWS))
        of_session = builder.mul(heads, pieces)
        num_tasks = builder.mul(builder.sub(last, first), of_session)
        with tasks_taken(emit, call.place(Field.NEXT_TASK), num_tasks) as task:
            session_number = builder.add(first, builder.udiv(task, of_session))
            place = builder.urem(task, of_session)
            self._emit_piece(session_number, builder.udiv(place, pieces), builder.urem(place, pieces))

    def _emit_piece(self, session: Value, kv_head: Value, piece: Value) -> None:
        emit, builder, group = self.emit, self.emit.builder, self.emit.integer(self.group)
        begin = self._integer(self.call[Field.STARTS], session)
        count = self._num_rows(session, builder.add(session, emit.integer(1)))
        first_row = builder.mul(piece, emit.integer(PIECE_ROWS))
        left = builder.sub(builder.mul(count, group), first_row)
        with emit.when(builder.icmp_signed(">", left, emit.integer(0))):
            num_rows = emit.minimum(left, emit.integer(PIECE_ROWS))
            is_one_token = builder.icmp_signed("==", count, emit.integer(1))

            def token_and_head(row: Value) -> tuple[Value, Value]:
                """Of a row of the piece, the token counted from the session's first row, and the query head."""
                number = builder.add(first_row, row)
                head = builder.add(builder.mul(kv_head, group), builder.urem(number, group))
                return builder.udiv(number, group), head

            self._emit_rows(session, begin, count, num_rows, token_and_head)
            self._emit_blocks(session, kv_head, num_rows, is_one_token)
            with emit.loop(emit.integer(0), num_rows, 1) as row:
                token, head = token_and_head(row.index)
                self._emit_joined(row.index, builder.add(begin, token), head)

    def _emit_rows(
        self,
        session: Value,
        begin: Value,
        count: Value,
        num_rows: Value,
        token_and_head: Callable[[Value], tuple[Value, Value]],
    ) -> None:
        """Begin with the rows of a piece, and with rows of nothing up to whole `ROWS`."""
        emit, builder, call, zero = self.emit, self.emit.builder, self.call, self.emit.integer(0)
        before = builder.sub(self._integer(call[Field.LENGTHS], session), count)
        skipped = self._integer(call[Field.SKIPPED], session)
        with emit.loop(zero, num_rows, 1) as row:
            token, head = token_and_head(row.index)
            last = builder.add(builder.add(before, token), emit.integer(1))
            first = builder.sub(last, call[Field.WINDOW])
            first = builder.select(builder.icmp_signed("<", first, skipped), skipped, first)
            number = builder.add(builder.mul(head, call[Field.NUM_ROWS]), builder.add(begin, token))
            source = emit.at(call[Field.QUERY], builder.mul(number, emit.integer(self.head_dim)))
            self.rows.begin(row.index, source, self.scale, first, last)
        whole = builder.mul(emit.rounded_up(num_rows, emit.integer(ROWS)), emit.integer(ROWS))
        with emit.when(builder.icmp_signed("<", num_rows, whole)), emit.loop(num_rows, whole, 1) as row:
            self.rows.begin(row.index, None, self.scale, zero, zero)

    def _emit_blocks(self, session: Value, kv_head: Value, num_rows: Value, is_one_token: Value) -> None:
        """All keys that any row of the piece sees, block by block."""
        emit, builder, rows, zero = self.emit, self.emit.builder, self.rows, self.emit.integer(0)
        size = emit.integer(BLOCK_TOKENS)
        least = self._integer(rows.firsts, zero)
        behind = self._integer(rows.lasts, builder.sub(num_rows, emit.integer(1)))
        start = builder.mul(builder.udiv(least, size), size)
        with emit.when(builder.icmp_signed("<", least, behind)), emit.loop(start, behind, BLOCK_TOKENS) as block:
            token = block.index
            count = emit.minimum(builder.sub(behind, token), size)
            following = builder.add(token, size)
            following = builder.select(builder.icmp_signed("<", following, behind), following, token)
            here, ahead = (self._block_place(session, kv_head, place) for place in (token, following))
            keys, values, next_keys, next_values = (
                emit.at(self.call[side], place, self.element)
                for place in (here, ahead)
                for side in (Field.KEYS, Field.VALUES)
            )
            builder.call(self.turn, [keys, next_keys, values, count, self.turned])

            def serve(function: ir.Function, row: Value) -> None:
                builder.call(function, [self.turned, values, next_values, *rows.pointers(row), token, count])

            if self.one_token is self.some:
                self._emit_some(num_rows, token, count, serve)
                return
            with builder.if_else(is_one_token) as (alone, more):
                with alone:
                    serve(self.one_token, zero)
                with more:
                    self._emit_some(num_rows, token, count, serve)

    def _emit_some(
        self, num_rows: Value, token: Value, count: Value, serve: Callable[[ir.Function, Value], None]
    ) -> None:
        """All rows of a piece that see a key of a block, `ROWS` at a time."""
        emit, builder, rows = self.emit, self.emit.builder, self.rows
        last_row = builder.sub(num_rows, emit.integer(1))
        with emit.loop(emit.integer(0), num_rows, ROWS) as row:
            last = self._integer(rows.lasts, emit.minimum(builder.add(row.index, emit.integer(ROWS - 1)), last_row))
            first = self._integer(rows.firsts, row.index)
            begins = builder.icmp_signed("<", first, builder.add(token, count))
            with emit.when(builder.and_(begins, builder.icmp_signed("<", token, last))):
                serve(self.some, row.index)

    def _block_place(self, session: Value, kv_head: Value, token: Value) -> Value:
        """Of a token of a tail in the pool."""
        emit, builder, call = self.emit, self.emit.builder, self.call
        page_tokens = call[Field.PAGE_TOKENS]
        index = builder.add(builder.mul(session, call[Field.MAX_PAGES]), builder.udiv(token, page_tokens))
        head = builder.add(builder.mul(self._integer(call[Field.PAGES], index), call[Field.NUM_KV_HEADS]), kv_head)
        place = builder.add(builder.mul(head, page_tokens), builder.urem(token, page_tokens))
        return builder.mul(place, emit.integer(self.head_dim))

    def _emit_joined(self, row: Value, query_row: Value, head: Value) -> None:
        """Add what a row found in other segments, divide, and write it with the logsumexp of all."""
        emit, builder, call, zero = self.emit, self.emit.builder, self.call, self.emit.integer(0)
        num_parts, channels = call[Field.NUM_PARTS], emit.integer(self.head_dim)
        begin = self._integer(call[Field.STARTS], call[Field.FIRST_SESSION])
        part_rows = self._num_rows(call[Field.FIRST_SESSION], call[Field.LAST_SESSION])

        def part_row(part: Value) -> Value:
            heads = builder.add(builder.mul(part, call[Field.NUM_Q_HEADS]), head)
            return builder.add(builder.mul(heads, part_rows), builder.sub(query_row, begin))

        def logsumexp(part: Value) -> Value:
            return emit.spread(emit.at(call[Field.PART_LOGSUMEXPS], part_row(part)))

        maximum = emit.spread(emit.at(self.rows.maxima, row))
        has_parts = builder.icmp_signed(">", num_parts, zero)
        sums, place = self.rows.wide(self.rows.sums, row), self.place
        builder.store(emit.first_lane(maximum), place, align=4)
        with emit.when(has_parts):
            with emit.loop(zero, num_parts, 1, [maximum]) as part:
                part.following = [emit.larger(logsumexp(part.index), part.values[0])]
            builder.store(emit.first_lane(part.following[0]), place, align=4)
        largest = emit.spread(place)
        share = emit.exponential(builder.fsub(maximum, largest))
        total = builder.fmul(share, emit.spread(emit.at(self.rows.denominators, row)))
        builder.store(emit.first_lane(total), place, align=4)
        with emit.loop(zero, channels, emit.lanes) as channel:
            spot = emit.at(sums, channel.index)
            emit.store(builder.fmul(emit.load(spot), share), spot)
        with emit.when(has_parts):
            with emit.loop(zero, num_parts, 1, [total]) as part:
                share = emit.exponential(builder.fsub(logsumexp(part.index), largest))
                source = emit.at(call[Field.PARTS], builder.mul(part_row(part.index), channels))
                with emit.loop(zero, channels, emit.lanes) as channel:
                    spot = emit.at(sums, channel.index)
                    found = emit.load(emit.at(source, channel.index))
                    emit.store(emit.multiply_add(share, found, emit.load(spot)), spot)
                part.following = [builder.fadd(part.values[0], share)]
            builder.store(emit.first_lane(part.following[0]), place, align=4)
        total = emit.spread(place)
        inverse = builder.fdiv(emit.constant(1.0), total)
        target = builder.add(builder.mul(query_row, call[Field.NUM_Q_HEADS]), head)
        target = emit.at(call[Field.OUT], builder.mul(target, channels))
        with emit.loop(zero, channels, emit.lanes) as channel:
            found = builder.fmul(emit.load(emit.at(sums, channel.index)), inverse)
            emit.store(found, emit.at(target, channel.index))
        logarithm = emit.function.module.declare_intrinsic("llvm.log.f32", fnty=ir.FunctionType(FLOAT, [FLOAT]))
        found = builder.fadd(emit.first_lane(largest), builder.call(logarithm, [emit.first_lane(total)]))
        spot = builder.add(builder.mul(head, call[Field.NUM_ROWS]), query_row)
        builder.store(found, emit.at(call[Field.LOGSUMEXPS], spot), align=4)
