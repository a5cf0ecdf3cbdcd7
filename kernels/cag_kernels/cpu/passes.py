"""Rows served in passes: functions of which each serves as many rows as its sums fit into registers, as LLVM code.

Knows nothing of what a pass computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT64, Emitter, Value, function_blocks


def emit_passes(
    emit: Emitter, num_rows: Value, passes: Sequence[ir.Function], arguments: Callable[[Value], list[Value]]
) -> None:
    """Call passes of about equal numbers of rows for `num_rows` rows, at least one.

    passes: that of `i` rows at `i - 1`. arguments: of the pass that begins with a row.
    """
    builder, one, most = emit.builder, emit.integer(1), emit.integer(len(passes))
    num_passes = builder.sdiv(builder.add(num_rows, builder.sub(most, one)), most)
    test, behind = function_blocks(emit.function, "passes", "served")
    before = builder.block
    builder.branch(test)
    builder.position_at_end(test)
    row, left = builder.phi(INT64), builder.phi(INT64)
    rows = builder.sdiv(builder.add(builder.sub(num_rows, row), builder.sub(left, one)), left)
    _emit_switch(emit, rows, passes, arguments(row))
    following, remaining = builder.add(row, rows), builder.sub(left, one)
    row.add_incoming(emit.integer(0), before)
    row.add_incoming(following, builder.block)
    left.add_incoming(num_passes, before)
    left.add_incoming(remaining, builder.block)
    builder.cbranch(builder.icmp_signed(">", remaining, emit.integer(0)), test, behind)
    builder.position_at_end(behind)


def _emit_switch(emit: Emitter, rows: Value, passes: Sequence[ir.Function], arguments: list[Value]) -> None:
    """Call the pass made for that many rows."""
    builder = emit.builder
    joined = emit.function.append_basic_block("joined")
    switch = builder.switch(rows, joined)
    for index, function in enumerate(passes):
        (block,) = function_blocks(emit.function, f"rows_{index + 1}")
        switch.add_case(emit.integer(index + 1), block)
        builder.position_at_end(block)
        builder.call(function, arguments)
        builder.branch(joined)
    builder.position_at_end(joined)
