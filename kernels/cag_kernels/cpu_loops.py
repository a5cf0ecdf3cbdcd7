"""The compiled functions of one call: `prepare` the query, `attend` task by task, `finish` by merging the ranges.

A task is one range of keys of one key/value head. Threads take tasks from a shared counter, so they are busy alike; the
ranges have a fixed number of keys and are merged in order, so the threads do not show in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_call import Call, Field
from cag_kernels.cpu_dequantize import Dequantizer
from cag_kernels.cpu_emit import FLOAT, INT16, INT32, INT64, UNSEEN, Emitter, Value, function_blocks
from cag_kernels.cpu_few import FewRows
from cag_kernels.cpu_panel import MAX_WIDTH, Blocking, Panel, WideTile
from cag_kernels.cpu_window_call import emit_first_keys, emit_range_bounds, emit_seeing
from cag_kernels.prefixes import Codes


def attention_module(
    head_dim: int,
    blocking: Blocking,
    few_rows: int | None = None,
    codes: Codes | None = None,
    has_window: bool = False,
) -> ir.Module:
    """Module with `prepare`, `attend` and `finish`, each of one pointer to the fields of a call.

    Over numbers, or over codes, of which a range is turned into numbers where it is attended to. For any number of
    rows, with a window or without; or for exactly `few_rows` of one query, without a window.
    """
    module = ir.Module(name=f"attention_{head_dim}")
    prepare = Call(module, "prepare", head_dim, blocking, has_window=has_window)
    _emit_prepare(prepare)
    if has_window:
        emit_first_keys(prepare, blocking.tile)
    prepare.emit.builder.ret_void()
    attend = Call(module, "attend", head_dim, blocking, has_window=has_window, has_codes=codes is not None)
    if few_rows is None:
        panels = [Panel(module, head_dim, width, blocking, has_window).function for width in range(1, MAX_WIDTH + 1)]
        serve = _served_by_panels(attend, panels, masks=has_window)
    else:
        serve = _served_by_few(attend, FewRows(module, head_dim, few_rows, blocking).function)
    _emit_attend(attend, serve, codes)
    _emit_finish(Call(module, "finish", head_dim, blocking, has_window=has_window))
    return module


def _emit_prepare(call: Call) -> None:
    """Write the query transposed: so many rows by as many channels at a time, in registers."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
    num_lanes = call[Field.NUM_LANES]
    with (
        emit.loop(zero, call[Field.NUM_KV_HEADS], 1) as head,
        emit.loop(zero, num_lanes, emit.lanes) as vector,
    ):
        rows = [_Row(call, head.index, builder.add(vector.index, emit.integer(lane))) for lane in range(emit.lanes)]
        with emit.loop(zero, emit.integer(call.head_dim), emit.lanes) as channel:
            numbers = []
            for row in rows:
                number = emit.load(row.place(Field.QUERY, channel.index))
                numbers.append(builder.select(row.exists, builder.fmul(number, scale), emit.constant(0.0)))
            for offset, column in enumerate(emit.transposed(numbers)):
                place = builder.add(channel.index, emit.integer(offset))
                target = call.index(head.index, (call.head_dim, place), (num_lanes, vector.index))
                emit.store(column, emit.at(call[Field.SCALED], target))


class _Row:
    """A row of a head's queries; behind the last one, which it stands for then, there is none."""

    def __init__(self, call: Call, head: Value, row: Value) -> None:
        self._call, self._head = call, head
        emit, last = call.emit, call.emit.builder.sub(call[Field.NUM_ROWS], call.emit.integer(1))
        self.exists = emit.builder.icmp_signed("<=", row, last)
        self.row = emit.minimum(row, last)

    def place(self, field: Field, channel: Value) -> Value:
        """Of the query or of the output."""
        call = self._call
        index = call.index(self._head, (call[Field.NUM_ROWS], self.row), (call.head_dim, channel))
        return call.emit.at(call[field], index)


class _Numbers:
    """The numbers of a range of codes, on the stack."""

    def __init__(self, call: Call, codes: Codes) -> None:
        self._dequantizer, self._num_tokens = Dequantizer(call, codes), call.blocking.range_tokens
        self._rows = [self._dequantizer.rows_on_stack(self._num_tokens) for _ in range(2)]

    def emit_side(self, side: int, head: Value, first: Value, count: Value) -> Value:
        """Where keys (0) or values (1) of tokens `[first, first + count)` lie, `[range_tokens, head_dim]`."""
        self._dequantizer.emit_side(side, head, first, count, self._rows[side], self._num_tokens)
        return self._rows[side]


def _emit_attend(call: Call, serve: _Serve, codes: Codes | None) -> None:
    numbers = None if codes is None else _Numbers(call, codes)
    emit_tasks(call, lambda task: _emit_task(call, serve, task, numbers))
    call.emit.builder.ret_void()


def emit_tasks(call: Call, emit_task: Callable[[Value], None]) -> None:
    """Take tasks, numbered head by head and range by range, from the call's counter until none is left."""
    emit, builder = call.emit, call.emit.builder
    num_tasks = builder.mul(call[Field.NUM_RANGES], call[Field.NUM_KV_HEADS])
    take, work, done = function_blocks(call.function, "take", "work", "done")
    builder.branch(take)
    builder.position_at_end(take)
    task = builder.atomic_rmw("add", call.place(Field.NEXT_TASK), emit.integer(1), "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, num_tasks), work, done)
    builder.position_at_end(work)
    emit_task(task)
    builder.branch(take)
    builder.position_at_end(done)


def _emit_task(call: Call, serve: _Serve, task: Value, numbers: _Numbers | None) -> None:
    emit, builder = call.emit, call.emit.builder
    head, part = builder.sdiv(task, call[Field.NUM_RANGES]), builder.srem(task, call[Field.NUM_RANGES])
    first, stop = emit_range_bounds(call, part)
    count = builder.sub(stop, first)
    channels, lanes = emit.integer(call.head_dim), call[Field.NUM_LANES]
    skipped = builder.mul(first, channels)
    query, *sums = [
        emit.at(call[field], builder.mul(index, lanes))
        for field, index in (
            (Field.SCALED, builder.mul(head, channels)),
            (Field.MAXIMUM, task),
            (Field.DENOMINATOR, task),
            (Field.WEIGHTED, builder.mul(task, channels)),
        )
    ]
    if numbers is not None:
        keys, values = [numbers.emit_side(side, head, first, count) for side in range(2)]
    else:
        keys, values = [
            emit.at(call[field], call.index(head, (call[stride], skipped)), INT16)
            for field, stride in ((Field.KEYS, Field.KEYS_STRIDE), (Field.VALUES, Field.VALUES_STRIDE))
        ]
    serve(_Range(query, keys, values, sums, first, count))


class _Range(NamedTuple):
    """One range of keys of a head, and where what its rows find goes."""

    query: Value
    keys: Value
    values: Value
    sums: list[Value]  # maxima, denominators and weighted sums
    first: Value  # the key that it begins with
    count: Value


_Serve = Callable[[_Range], None]


def _served_by_few(call: Call, few: ir.Function) -> _Serve:
    """A range served by the function for that many rows."""

    def serve(part: _Range) -> None:
        arguments = [part.query, part.keys, part.values, *part.sums, part.count, call[Field.NUM_LANES]]
        call.emit.builder.call(few, arguments)

    return serve


def _served_by_panels(call: Call, panels: list[ir.Function], *, masks: bool) -> _Serve:
    """A range served tile by tile, with all panels of rows for each."""
    emit, builder, tile = call.emit, call.emit.builder, call.blocking.tile
    wide = WideTile(emit, call.head_dim, call.blocking)

    def serve(part: _Range) -> None:
        _emit_nothing(call, part.sums)
        with emit.loop(emit.integer(0), part.count, tile) as begin:
            count = emit.minimum(builder.sub(part.count, begin.index), emit.integer(tile))
            skipped = builder.mul(begin.index, emit.integer(call.head_dim))
            wide.emit_widened(emit.at(part.keys, skipped, INT16), emit.at(part.values, skipped, INT16), count)
            hidden = (call[Field.FIRST_KEYS], builder.add(part.first, begin.index)) if masks else None
            following = builder.add(skipped, emit.integer(tile * call.head_dim))
            ahead = [emit.at(side, following, INT16) for side in (part.keys, part.values)]
            pointers = [part.query, wide.keys, wide.values, *part.sums, *ahead]
            _emit_panels(emit, panels, pointers, count, call[Field.NUM_LANES], hidden)

    return serve


def _emit_nothing(call: Call, sums: list[Value]) -> None:
    """Begin with no key seen and nothing summed."""
    emit, (maximum, denominator, weighted) = call.emit, sums
    zero, lanes = emit.integer(0), call[Field.NUM_LANES]
    with emit.loop(zero, lanes, emit.lanes) as row:
        emit.store(emit.constant(UNSEEN), emit.at(maximum, row.index))
        emit.store(emit.constant(0.0), emit.at(denominator, row.index))
    with emit.loop(zero, emit.builder.mul(lanes, emit.integer(call.head_dim)), emit.lanes) as element:
        emit.store(emit.constant(0.0), emit.at(weighted, element.index))


def _emit_panels(
    emit: Emitter,
    panels: list[ir.Function],
    pointers: list[Value],
    count: Value,
    rows: Value,
    hidden: tuple[Value, Value] | None,
) -> None:
    """Serve all rows with panels as wide as they come: three vectors, at four vectors two and two. `hidden`: the first
    keys of rows, and which key the tile begins with."""
    builder = emit.builder
    total = builder.sdiv(rows, emit.integer(emit.lanes))
    test, behind = function_blocks(emit.function, "panels", "served")
    before = builder.block
    builder.branch(test)
    builder.position_at_end(test)
    column = builder.phi(INT64)
    column.add_incoming(emit.integer(0), before)
    left = builder.sub(total, column)
    widest = builder.select(
        builder.icmp_signed("==", left, emit.integer(4)), emit.integer(2), emit.integer(len(panels))
    )
    width = emit.minimum(left, widest)
    shift = builder.mul(column, emit.integer(emit.lanes))
    query, keys, values, *sums = pointers[:6]
    shifted = [emit.at(query, shift), keys, values, *(emit.at(pointer, shift) for pointer in sums), *pointers[6:]]
    windows = [] if hidden is None else [emit.at(hidden[0], shift, INT32), hidden[1]]
    following = builder.add(column, width)
    joined = emit.function.append_basic_block("joined")
    switch = builder.switch(width, joined)
    for index, panel in enumerate(panels):
        block = emit.function.append_basic_block(f"width_{index + 1}")
        switch.add_case(emit.integer(index + 1), block)
        builder.position_at_end(block)
        builder.call(panel, [*shifted, count, rows, *windows])
        builder.branch(joined)
    builder.position_at_end(joined)
    column.add_incoming(following, joined)
    builder.cbranch(builder.icmp_signed("<", following, total), test, behind)
    builder.position_at_end(behind)


def _emit_finish(call: Call) -> None:
    """Join the ranges of every head and write the result, so many rows by as many channels at a time; maxima and
    denominators end in range 0."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    with (
        emit.loop(zero, call[Field.NUM_KV_HEADS], 1) as head,
        emit.loop(zero, call[Field.NUM_LANES], emit.lanes) as vector,
    ):
        base = builder.mul(head.index, call[Field.NUM_RANGES])
        largest, total = emit_factors(call, base, vector.index)
        rows = [_Row(call, head.index, builder.add(vector.index, emit.integer(lane))) for lane in range(emit.lanes)]
        with emit.loop(zero, emit.integer(call.head_dim), emit.lanes) as channel:
            columns = _emit_joined(call, base, channel.index, vector.index)
            for row, numbers in zip(rows, emit.transposed(columns), strict=True):
                with emit.when(row.exists):
                    emit.store(numbers, row.place(Field.OUT, channel.index))
        emit.store(largest, _row_place(call, Field.MAXIMUM, base, zero, vector.index))
        emit.store(total, _row_place(call, Field.DENOMINATOR, base, zero, vector.index))
    emit_logsumexps(call)
    builder.ret_void()


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


def emit_logsumexps(call: Call) -> None:
    """From the maximum and the denominator in range 0 of each head."""
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    logarithm = call.function.module.declare_intrinsic("llvm.log.f32", fnty=ir.FunctionType(FLOAT, [FLOAT]))
    with (
        emit.loop(zero, call[Field.NUM_KV_HEADS], 1) as head,
        emit.loop(zero, call[Field.NUM_ROWS], 1) as row,
    ):
        base = builder.mul(head.index, call[Field.NUM_RANGES])
        maximum, denominator = (
            builder.load(_row_place(call, field, base, zero, row.index), typ=FLOAT, align=4)
            for field in (Field.MAXIMUM, Field.DENOMINATOR)
        )
        target = call.index(head.index, (call[Field.NUM_ROWS], row.index))
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
