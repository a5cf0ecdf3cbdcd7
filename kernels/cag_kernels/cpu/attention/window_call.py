"""Sliding windows of a call of compiled attention: which keys each row sees, and which ranges are attended to at all.

Row `r` of a key/value head is query `r % NUM_QUERIES`, at place `OFFSET + POSITIONS[query]` counted from the segment's
first key and never before its last; it sees keys from `place - WINDOW + 1` on. Work begins with the piece (`tile` of a
`Blocking`) that holds the first key of any row. Pieces and ranges lie at fixed places, and keys that a row does not see
weigh exactly nothing, so a row's bits do not depend on how far back others see.
"""

from __future__ import annotations

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.emit import INT32, INT64, Value


def emit_first_keys(call: Call, multiple: int) -> None:
    """Write the first key of each lane, where the work begins, a multiple of `multiple`, and the ranges from there on.

    A row that sees no key gets `NUM_KEYS`; where that holds for all, the work begins with the last key.
    """
    emit, builder, zero = call.emit, call.emit.builder, call.emit.integer(0)
    num_keys, one = call[Field.NUM_KEYS], emit.integer(1)
    last_row = builder.sub(call[Field.NUM_ROWS], one)
    behind = builder.sub(builder.add(call[Field.OFFSET], one), call[Field.WINDOW])
    with emit.loop(zero, call[Field.NUM_LANES], 1, [builder.sub(num_keys, one)]) as lane:
        query = builder.urem(emit.minimum(lane.index, last_row), call[Field.NUM_QUERIES])
        position = builder.load(emit.at(call[Field.POSITIONS], query, INT32), typ=INT32, align=4)
        first = builder.add(builder.sext(position, INT64), behind)
        first = builder.select(builder.icmp_signed("<", first, zero), zero, emit.minimum(first, num_keys))
        builder.store(builder.trunc(first, INT32), emit.at(call[Field.FIRST_KEYS], lane.index, INT32), align=4)
        lane.following = [emit.minimum(first, lane.values[0])]
    begin = builder.sub(lane.following[0], builder.urem(lane.following[0], emit.integer(multiple)))
    range_tokens = emit.integer(call.blocking.range_tokens)
    num_ranges = builder.sub(emit.rounded_up(num_keys, range_tokens), builder.udiv(begin, range_tokens))
    for field, value in ((Field.BEGIN, begin), (Field.NUM_RANGES, num_ranges)):
        builder.store(value, call.place(field), align=8)


def emit_range_bounds(call: Call, part: Value) -> tuple[Value, Value]:
    """The keys `[first, stop)` of a range, counted from the first range that is attended to."""
    emit, builder = call.emit, call.emit.builder
    range_tokens = emit.integer(call.blocking.range_tokens)
    if call.has_window:
        part = builder.add(part, builder.udiv(call[Field.BEGIN], range_tokens))
    first = builder.mul(part, range_tokens)
    stop = emit.minimum(builder.add(first, range_tokens), call[Field.NUM_KEYS])
    if call.has_window:
        begin = call[Field.BEGIN]
        first = builder.select(builder.icmp_signed("<", first, begin), begin, first)
    return first, stop


def emit_seeing(call: Call, row: Value, total: Value) -> tuple[Value, Value]:
    """Denominators of a vector of rows and their inverses; zeros for rows that see no key."""
    emit, builder = call.emit, call.emit.builder
    first = builder.load(emit.at(call[Field.FIRST_KEYS], row, INT32), typ=emit.integers, align=4)
    num_keys = emit.spread_integer(builder.trunc(call[Field.NUM_KEYS], INT32))
    sees, nothing = builder.icmp_signed("<", first, num_keys), emit.constant(0.0)
    inverse = builder.fdiv(emit.constant(1.0), total)
    return builder.select(sees, total, nothing), builder.select(sees, inverse, nothing)
