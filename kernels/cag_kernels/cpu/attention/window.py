"""Keys that rows do not see in sliding windows: their scores are taken away, so that they weigh exactly nothing.

Knows vectors of rows and scores in memory, not what calls and ranges they come from (`cpu.attention.window_call`).
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT32, UNSEEN, Emitter, Value


def emit_num_hidden(emit: Emitter, first_keys: Value, token: Value) -> Value:
    """How many keys from `token` on each row of a vector does not see, int32; none if it is not above 0."""
    first = emit.builder.load(first_keys, typ=emit.integers, align=4)
    return emit.builder.sub(first, emit.spread_integer(emit.builder.trunc(token, INT32)))


def emit_hidden(emit: Emitter, scores: Value, num_hidden: Sequence[Value], count: Value) -> None:
    """Take away scores `[count, rows]` of the keys that rows do not see, where there are any."""
    builder = emit.builder
    bits, nothing = ir.IntType(emit.lanes), ir.Constant(emit.integers, [0] * emit.lanes)
    some = ir.Constant(bits, 0)
    for hidden in num_hidden:
        some = builder.or_(some, builder.bitcast(builder.icmp_signed(">", hidden, nothing), bits))
    is_any = builder.icmp_unsigned("!=", some, ir.Constant(bits, 0))
    with emit.when(is_any), emit.loop(emit.integer(0), count, 1) as key:
        number = emit.spread_integer(builder.trunc(key.index, INT32))
        row = emit.at(scores, builder.mul(key.index, emit.integer(len(num_hidden) * emit.lanes)))
        for index, hidden in enumerate(num_hidden):
            place = emit.at(row, index * emit.lanes)
            is_hidden = builder.icmp_signed("<", number, hidden)
            emit.store(builder.select(is_hidden, emit.constant(UNSEEN), emit.load(place)), place)


def emit_reference(emit: Emitter, maximum: Value) -> Value:
    """What scores are compared with for their weights: the maximum; of rows that have not seen a key yet any number far
    above `UNSEEN`, so that hidden keys weigh nothing there, too."""
    is_none = emit.builder.fcmp_ordered("==", maximum, emit.constant(UNSEEN))
    return emit.builder.select(is_none, emit.constant(0.0), maximum)
