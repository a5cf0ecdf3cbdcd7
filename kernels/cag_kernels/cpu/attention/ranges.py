"""How one range of keys of a key/value head is served, as LLVM code: tile by tile with all rows, or by code for few.

Knows where keys and values of a range lie, in memory or, out of codes, on the stack; not how ranges are shared out and
joined (`cpu.attention.loops`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.dequantize import Dequantizer
from cag_kernels.cpu.attention.dot_few import DotFewRows
from cag_kernels.cpu.attention.dot_panel import LOG2_E, DotPanel, PairedTile
from cag_kernels.cpu.attention.few import FewRows
from cag_kernels.cpu.attention.panel import MAX_WIDTH, Panel, WideTile
from cag_kernels.cpu.emit import FLOAT, INT32, INT64, UNSEEN, Value, function_blocks
from cag_kernels.prefixes import Codes


class Range(NamedTuple):
    """One range of keys of a head, and where what its rows find goes."""

    head: Value
    first: Value  # the key that it begins with
    count: Value
    query: Value
    sums: list[Value]  # maxima, denominators and weighted sums


Serve = Callable[[Range], None]


class _Numbers:
    """Keys and values of a range: as they lie in memory, or made out of codes on the stack."""

    def __init__(self, call: Call, codes: Codes | None) -> None:
        self._call = call
        if codes is not None:
            self._dequantizer, self._num_tokens = Dequantizer(call, codes), call.blocking.range_tokens
            self._rows = [self._dequantizer.rows_on_stack(self._num_tokens) for _ in range(2)]
        self._has_codes = codes is not None

    def emit_sides(self, part: Range) -> list[Value]:
        """Where the keys and the values lie, `[count, head_dim]`."""
        if self._has_codes:
            for side, rows in enumerate(self._rows):
                self._dequantizer.emit_side(side, part.head, part.first, part.count, rows, self._num_tokens)
            return self._rows
        call = self._call
        skipped = call.emit.builder.mul(part.first, call.emit.integer(call.head_dim))
        return [
            call.emit.at(call[field], call.index(part.head, (call[stride], skipped)), call.element)
            for field, stride in ((Field.KEYS, Field.KEYS_STRIDE), (Field.VALUES, Field.VALUES_STRIDE))
        ]


def serve_by_few(call: Call, rows: int, codes: Codes | None) -> Serve:
    """By the function for that many rows."""
    few = FewRows(call.function.module, call.head_dim, rows, call.blocking, call.kept).function
    numbers = _Numbers(call, codes)

    def serve(part: Range) -> None:
        arguments = [part.query, *numbers.emit_sides(part), *part.sums, part.count, call[Field.NUM_LANES]]
        call.emit.builder.call(few, arguments)

    return serve


def serve_by_dots(call: Call, rows: int | None) -> Serve:
    """By products of pairs: by the function for that many rows, or tile by tile with all panels of rows for each."""
    emit, builder = call.emit, call.emit.builder
    numbers = _Numbers(call, None)
    scale = emit.spread_number(builder.bitcast(builder.trunc(call[Field.SCALE], INT32), FLOAT))
    factor = emit.scratch(emit.lanes)
    emit.store(builder.fmul(scale, emit.constant(LOG2_E)), factor)
    attend = _dot_panels(call, numbers, factor) if rows is None else _dot_rows(call, rows, numbers, factor)

    def serve(part: Range) -> None:
        attend(part)
        with emit.loop(emit.integer(0), call[Field.NUM_LANES], emit.lanes) as row:
            maximum = emit.at(part.sums[0], row.index)
            emit.store(builder.fmul(emit.load(maximum), scale), maximum)

    return serve


def _dot_rows(call: Call, rows: int, numbers: _Numbers, factor: Value) -> Serve:
    few = DotFewRows(call.function.module, call.head_dim, rows, call.blocking).function

    def serve(part: Range) -> None:
        arguments = [part.query, *numbers.emit_sides(part), *part.sums, factor, part.count, call[Field.NUM_LANES]]
        call.emit.builder.call(few, arguments)

    return serve


def _dot_panels(call: Call, numbers: _Numbers, factor: Value) -> Serve:
    module, has_window = call.function.module, call.has_window
    widths = range(1, MAX_WIDTH + 1)
    panels = [DotPanel(module, call.head_dim, width, call.blocking, has_window).function for width in widths]
    return _serve_tiles(call, numbers, PairedTile(call.emit, call.head_dim, call.blocking), panels, [factor])


def serve_by_panels(call: Call, codes: Codes | None) -> Serve:
    """Tile by tile, with all panels of rows for each."""
    wide = WideTile(call.emit, call.head_dim, call.blocking, call.kept)
    return _serve_tiles(call, _Numbers(call, codes), wide, float_panels(call), [])


def _serve_tiles(
    call: Call, numbers: _Numbers, wide: WideTile | PairedTile, panels: list[ir.Function], others: list[Value]
) -> Serve:
    """`others`: further arguments of panels."""
    emit, builder, tile = call.emit, call.emit.builder, call.blocking.tile

    def serve(part: Range) -> None:
        sides = numbers.emit_sides(part)
        emit_nothing(call, part.sums)
        with emit.loop(emit.integer(0), part.count, tile) as begin:
            count = emit.minimum(builder.sub(part.count, begin.index), emit.integer(tile))
            skipped = builder.mul(begin.index, emit.integer(call.head_dim))
            keys, values = (emit.at(side, skipped, call.element) for side in sides)
            wide.emit_widened(keys, values, count)
            following = builder.add(skipped, emit.integer(tile * call.head_dim))
            ahead = [emit.at(side, following, call.element) for side in sides]
            pointers = [part.query, wide.keys, wide.values, *part.sums, *ahead, *others]
            emit_panels(call, panels, pointers, count, builder.add(part.first, begin.index))

    return serve


def float_panels(call: Call, max_width: int = MAX_WIDTH) -> list[ir.Function]:
    """Functions for one, two and more vectors of rows, by what they are wide."""
    module, has_window = call.function.module, call.has_window
    widths = range(1, max_width + 1)
    return [Panel(module, call.head_dim, width, call.blocking, has_window, call.kept).function for width in widths]


def emit_nothing(call: Call, sums: list[Value]) -> None:
    """Begin with no key seen and nothing summed."""
    emit, (maximum, denominator, weighted) = call.emit, sums
    zero, lanes = emit.integer(0), call[Field.NUM_LANES]
    with emit.loop(zero, lanes, emit.lanes) as row:
        emit.store(emit.constant(UNSEEN), emit.at(maximum, row.index))
        emit.store(emit.constant(0.0), emit.at(denominator, row.index))
    with emit.loop(zero, emit.builder.mul(lanes, emit.integer(call.head_dim)), emit.lanes) as element:
        emit.store(emit.constant(0.0), emit.at(weighted, element.index))


def emit_panels(call: Call, panels: list[ir.Function], pointers: list[Value], count: Value, token: Value) -> None:
    """Serve all rows with panels as wide as they come; four vectors are two and two where they come by three.

    Places 0 and 3 to 5 of `pointers` are those of rows. `token`: which key the tile begins with.
    """
    emit, builder, rows = call.emit, call.emit.builder, call[Field.NUM_LANES]
    total = builder.sdiv(rows, emit.integer(emit.lanes))
    test, behind = function_blocks(emit.function, "panels", "served")
    before = builder.block
    builder.branch(test)
    builder.position_at_end(test)
    column = builder.phi(INT64)
    column.add_incoming(emit.integer(0), before)
    left = builder.sub(total, column)
    widest = emit.integer(len(panels))
    if len(panels) == 3:
        widest = builder.select(builder.icmp_signed("==", left, emit.integer(4)), emit.integer(2), widest)
    width = emit.minimum(left, widest)
    shift = builder.mul(column, emit.integer(emit.lanes))
    query, keys, values, *sums = pointers[:6]
    shifted = [emit.at(query, shift), keys, values, *(emit.at(pointer, shift) for pointer in sums), *pointers[6:]]
    windows = [emit.at(call[Field.FIRST_KEYS], shift, INT32), token] if call.has_window else []
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
