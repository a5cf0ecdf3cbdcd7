"""The compiled functions of one call: `prepare` the query, `attend` task by task, `finish` by merging the ranges.

A task is one range of keys of one key/value head. Threads take tasks from a shared counter, so they are busy alike; the
ranges have a fixed number of keys and are merged in order, so the threads do not show in the result. What is done
before and behind is cut into vectors of rows, which threads may share out, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.code_ranges import serve_by_integers
from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.attention.ranges import Range, Serve, serve_by_dots, serve_by_few, serve_by_panels
from cag_kernels.cpu.attention.window_call import emit_first_keys, emit_range_bounds, emit_seeing
from cag_kernels.cpu.emit import FLOAT, INT16, INT32, LINE_BYTES, UNSEEN, Value
from cag_kernels.cpu.team import Share, tasks_taken
from cag_kernels.prefixes import Codes


def shares_ends(blocking: Blocking) -> bool:
    """Whether all threads run `prepare` and `finish`, else one does: where a vector of rows is a line of the cache."""
    return 4 * blocking.lanes == LINE_BYTES


def attention_module(
    head_dim: int,
    blocking: Blocking,
    few_rows: int | None = None,
    codes: Codes | None = None,
    has_window: bool = False,
    by_integers: bool = False,
    kept: torch.dtype = torch.bfloat16,
    by_dots: bool = False,
) -> ir.Module:
    """Module with `prepare`, `attend` and `finish`, each of one pointer to the fields of a call.

    Over numbers of the type `kept`, or over codes with exact numbers of that type: codes meet 16-bit integers if
    `by_integers`, else a range of them is turned into numbers where it is attended to. For any number of rows, with a
    window or without; or for exactly `few_rows` of one query, without a window. `by_dots`: of queries in bfloat16, over
    numbers in bfloat16.
    """
    module = ir.Module(name=f"attention_{head_dim}")
    prepare = Call(module, "prepare", head_dim, blocking, has_window=has_window)
    emit_prepare = _emit_prepare_pairs if by_dots else _emit_prepare
    _emit_vectors(prepare, lambda head, vector: emit_prepare(prepare, head, vector))
    if has_window:  # all threads write the same
        emit_first_keys(prepare, blocking.tile)
    prepare.emit.builder.ret_void()
    has_codes = codes is not None
    attend = Call(module, "attend", head_dim, blocking, has_window=has_window, has_codes=has_codes, kept=kept)
    if by_dots:
        serve = serve_by_dots(attend, few_rows)
    elif by_integers:
        assert codes is not None
        serve = serve_by_integers(attend, codes, few_rows)
    elif few_rows is None:
        serve = serve_by_panels(attend, codes)
    else:
        serve = serve_by_few(attend, few_rows, codes)
    columns = head_dim // 2 if by_dots else head_dim  # of the query as `prepare` leaves it
    emit_tasks(attend, lambda task: _emit_task(attend, serve, task, columns))
    attend.emit.builder.ret_void()
    finish = Call(module, "finish", head_dim, blocking, has_window=has_window)
    _emit_vectors(finish, lambda head, vector: _emit_finish(finish, head, vector))
    finish.emit.builder.ret_void()
    return module


def _emit_vectors(call: Call, emit_vector: Callable[[Value, Value], None]) -> None:
    """Instructions for each vector of rows of each head that the calling thread takes (`shares_ends`)."""
    emit, builder = call.emit, call.emit.builder
    num_vectors = builder.udiv(call[Field.NUM_LANES], emit.integer(emit.lanes))
    count = builder.mul(call[Field.NUM_KV_HEADS], num_vectors)

    def emit_some(first: Value, stop: Value) -> None:
        with emit.loop(first, stop, 1) as vector:
            head, place = builder.udiv(vector.index, num_vectors), builder.urem(vector.index, num_vectors)
            emit_vector(head, builder.mul(place, emit.integer(emit.lanes)))

    if not shares_ends(call.blocking):
        emit_some(emit.integer(0), count)
        return
    share = Share(emit, count, emit.integer(1))
    with share.units(emit, call.place(Field.NEXT_TASK)) as unit:
        first = builder.mul(unit, share.size)
        emit_some(first, emit.minimum(builder.add(first, share.size), count))


def _emit_prepare(call: Call, head: Value, vector: Value) -> None:
    """Write queries transposed: so many rows by as many channels at a time, in registers."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
    rows = [_Row(call, head, builder.add(vector, emit.integer(lane))) for lane in range(emit.lanes)]
    with emit.loop(zero, emit.integer(call.head_dim), emit.lanes) as channel:
        numbers = []
        for row in rows:
            number = emit.load(row.place(Field.QUERY, channel.index))
            numbers.append(builder.select(row.exists, builder.fmul(number, scale), emit.constant(0.0)))
        for offset, column in enumerate(emit.transposed(numbers)):
            place = builder.add(channel.index, emit.integer(offset))
            target = call.index(head, (call.head_dim, place), (call[Field.NUM_LANES], vector))
            emit.store(column, emit.at(call[Field.SCALED], target))


def _emit_prepare_pairs(call: Call, head: Value, vector: Value) -> None:
    """The same of queries in bfloat16, in pairs of channels: `[head_dim / 2, num_lanes]`, not scaled."""
    emit, builder = call.emit, call.emit.builder
    rows = [_Row(call, head, builder.add(vector, emit.integer(lane))) for lane in range(emit.lanes)]
    nothing = ir.Constant(emit.integers, [0] * emit.lanes)
    with emit.loop(emit.integer(0), emit.integer(call.head_dim // 2), emit.lanes) as pair:
        channel = builder.shl(pair.index, emit.integer(1))
        numbers = (emit.load_integers(row.place(Field.QUERY, channel, INT16)) for row in rows)
        both = [builder.select(row.exists, number, nothing) for row, number in zip(rows, numbers, strict=True)]
        for offset, column in enumerate(emit.transposed(both)):
            place = builder.add(pair.index, emit.integer(offset))
            target = call.index(head, (call.head_dim // 2, place), (call[Field.NUM_LANES], vector))
            builder.store(column, emit.at(call[Field.SCALED], target, INT32), align=4)


class _Row:
    """A row of a head's queries; behind the last one, which it stands for then, there is none."""

    def __init__(self, call: Call, head: Value, row: Value) -> None:
        self._call, self._head = call, head
        emit, last = call.emit, call.emit.builder.sub(call[Field.NUM_ROWS], call.emit.integer(1))
        self.exists = emit.builder.icmp_signed("<=", row, last)
        self.row = emit.minimum(row, last)

    def place(self, field: Field, channel: Value, element: Any = FLOAT) -> Value:
        """Of the query or of the output."""
        call = self._call
        index = call.index(self._head, (call[Field.NUM_ROWS], self.row), (call.head_dim, channel))
        return call.emit.at(call[field], index, element)


def emit_tasks(call: Call, emit_task: Callable[[Value], None]) -> None:
    """Take tasks, numbered head by head and range by range, from the call's counter until none is left."""
    emit, builder = call.emit, call.emit.builder
    num_tasks = builder.mul(call[Field.NUM_RANGES], call[Field.NUM_KV_HEADS])
    with tasks_taken(emit, call.place(Field.NEXT_TASK), num_tasks) as task:
        emit_task(task)


def _emit_task(call: Call, serve: Serve, task: Value, columns: int) -> None:
    emit, builder = call.emit, call.emit.builder
    head, part = builder.sdiv(task, call[Field.NUM_RANGES]), builder.srem(task, call[Field.NUM_RANGES])
    first, stop = emit_range_bounds(call, part)
    channels, lanes = emit.integer(call.head_dim), call[Field.NUM_LANES]
    query, *sums = [
        emit.at(call[field], builder.mul(index, lanes))
        for field, index in (
            (Field.SCALED, builder.mul(head, emit.integer(columns))),
            (Field.MAXIMUM, task),
            (Field.DENOMINATOR, task),
            (Field.WEIGHTED, builder.mul(task, channels)),
        )
    ]
    serve(Range(head, first, builder.sub(stop, first), query, sums))


def _emit_finish(call: Call, head: Value, vector: Value) -> None:
    """Join the ranges of a vector of rows and write the result, so many rows by as many channels at a time; maxima and
    denominators end in range 0."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    base = builder.mul(head, call[Field.NUM_RANGES])
    largest, total = emit_factors(call, base, vector)
    rows = [_Row(call, head, builder.add(vector, emit.integer(lane))) for lane in range(emit.lanes)]
    with emit.loop(zero, emit.integer(call.head_dim), emit.lanes) as channel:
        columns = _emit_joined(call, base, channel.index, vector)
        for row, numbers in zip(rows, emit.transposed(columns), strict=True):
            with emit.when(row.exists):
                emit.store(numbers, row.place(Field.OUT, channel.index))
    emit.store(largest, _row_place(call, Field.MAXIMUM, base, zero, vector))
    emit.store(total, _row_place(call, Field.DENOMINATOR, base, zero, vector))
    behind = emit.minimum(builder.add(vector, emit.integer(emit.lanes)), call[Field.NUM_ROWS])
    emit_logsumexps(call, head, vector, behind)


def _emit_joined(call: Call, base: Value, channel: Value, row: Value) -> list[Value]:
    """As many channels of a vector of rows as it has lanes: weighted sums of all ranges, by the ranges' factors."""
    emit, builder = call.emit, call.emit.builder
    channels = [builder.add(channel, emit.integer(offset)) for offset in range(emit.lanes)]
    with emit.loop(emit.integer(0), call[Field.NUM_RANGES], 1, [emit.constant(0.0)] * emit.lanes) as part:
        factor = emit.load(_row_place(call, Field.MAXIMUM, base, part.index, row))
        task = builder.add(base, part.index)
        part.following = [
            emit.multiply_add(factor, emit.load(_weighted_at(call, task, place, row)), value)
            for place, value in zip(channels, part.values, strict=True)
        ]
    return list(part.following)


def emit_logsumexps(call: Call, head: Value, first: Value, stop: Value) -> None:
    """Of some rows of a head, from the maxima and the denominators in its range 0."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    logarithm = call.function.module.declare_intrinsic("llvm.log.f32", fnty=ir.FunctionType(FLOAT, [FLOAT]))
    base = builder.mul(head, call[Field.NUM_RANGES])
    with emit.loop(first, stop, 1) as row:
        maximum, denominator = (
            builder.load(_row_place(call, field, base, zero, row.index), typ=FLOAT, align=4)
            for field in (Field.MAXIMUM, Field.DENOMINATOR)
        )
        target = call.index(head, (call[Field.NUM_ROWS], row.index))
        found = builder.fadd(builder.call(logarithm, [denominator]), maximum)
        builder.store(found, emit.at(call[Field.LOGSUMEXPS], target), align=4)


def _weighted_at(call: Call, task: Value, channel: Value, row: Value) -> Value:
    index = call.index(task, (call.head_dim, channel), (call[Field.NUM_LANES], row))
    return call.emit.at(call[Field.WEIGHTED], index)


def emit_factors(call: Call, base: Value, row: Value) -> tuple[Value, Value]:
    """Maximum and denominator of a vector of rows over the ranges from task `base` on; each range's place of its
    maximum then holds what its weighted sums are multiplied by."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    num_ranges = call[Field.NUM_RANGES]
    with emit.loop(zero, num_ranges, 1, [emit.constant(UNSEEN)]) as part:
        maximum = emit.load(_row_place(call, Field.MAXIMUM, base, part.index, row))
        part.following = [emit.larger(part.values[0], maximum)]
    largest = part.following[0]
    with emit.loop(zero, num_ranges, 1, [emit.constant(0.0)]) as part:
        place = _row_place(call, Field.MAXIMUM, base, part.index, row)
        factor = emit.exponential(builder.fsub(emit.load(place), largest))
        emit.store(factor, place)
        denominator = emit.load(_row_place(call, Field.DENOMINATOR, base, part.index, row))
        part.following = [emit.multiply_add(factor, denominator, part.values[0])]
    total = part.following[0]
    if call.has_window:
        total, inverse = emit_seeing(call, row, total)
    else:
        inverse = builder.fdiv(emit.constant(1.0), total)
    with emit.loop(zero, num_ranges, 1) as part:
        place = _row_place(call, Field.MAXIMUM, base, part.index, row)
        emit.store(builder.fmul(emit.load(place), inverse), place)
    return largest, total


def _row_place(call: Call, field: Field, base: Value, part: Value, row: Value) -> Value:
    return call.emit.at(call[field], call.index(call.emit.builder.add(base, part), (call[Field.NUM_LANES], row)))
