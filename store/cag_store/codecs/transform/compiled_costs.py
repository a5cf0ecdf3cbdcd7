"""Costs of symbols under all shifts at once, as vector instructions: the shifts of a row are neighbours in the table of
costs, so one load and one addition serve them all."""

from __future__ import annotations

from typing import Any

from cag_store.codecs.emitting import (
    INT8,
    INT32,
    INT64,
    cgutils,
    constant,
    extending,
    ir,
    load,
    pointer,
    types,
)
from cag_store.codecs.transform.symbols import SHIFTS

_COSTS = ir.VectorType(INT32, SHIFTS)


def _emit(builder: Any, arguments: Any) -> None:
    symbols, across, count, costs, width, out = arguments
    total = cgutils.alloca_once_value(builder, constant(_COSTS, 0))
    with cgutils.for_range(builder, count, intp=INT64) as loop:
        symbol = builder.zext(load(builder, symbols, loop.index, INT8, 1), INT64)
        number = builder.sext(load(builder, across, builder.shl(loop.index, INT64(2)), INT32, 4), INT64)
        place = builder.add(builder.mul(symbol, width), builder.shl(number, INT64(2)))
        builder.store(builder.add(builder.load(total), load(builder, costs, place, _COSTS, 4)), total)
    builder.store(builder.load(total), pointer(builder, out, INT64(0), _COSTS), align=4)


def _add_costs(
    typing_context: Any,  # noqa: ARG001
    symbols: Any,
    across: Any,
    count: Any,
    costs: Any,
    width: Any,
    out: Any,
) -> Any:
    """The sum over `count` symbols (uint8) of `costs[symbol, across + shift]` for each shift, int32 `[SHIFTS]` into
    `out`. Addresses and counts: `costs` is where the first shift of a symbol 0 with `across` 0 stands, `width` the
    bytes between symbols."""
    del symbols, across, count, costs, width, out

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _emit(builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


add_costs = extending.intrinsic(_add_costs)
