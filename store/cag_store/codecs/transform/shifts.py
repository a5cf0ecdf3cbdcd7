"""By how many levels the components and tokens of a segment are louder or quieter than the basis foresees
(docs/format.md 5.4).

The variance of a code is nearly a product of one factor of its component and one of its token; both are found by trial,
as those that cost the fewest bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.transform import loops
from cag_store.codecs.transform.rans import Tables
from cag_store.codecs.transform.symbols import LEAST_SHIFT, SHIFTS


def chosen_shifts(
    symbols: NDArray[np.uint8], table_numbers: NDArray[np.int32], tables: Tables
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Shifts of components and of tokens, in turn: tokens, components, tokens again.

    symbols: `[num_tokens, num_components]`; table_numbers: `[num_components]`, without shifts.
    """
    tokens = _cheapest(_costs(symbols, table_numbers, tables))
    components = _cheapest(_costs(np.ascontiguousarray(symbols.T), tokens.astype(np.int32), tables, table_numbers))
    tokens = _cheapest(_costs(symbols, table_numbers + components, tables))
    return components, tokens


def pack_shifts(shifts: NDArray[np.int8]) -> bytes:
    """Two in a byte, the first in the lower half, each 8 more than it is."""
    halves = np.append(shifts, np.zeros(len(shifts) % 2, np.int8)).astype(np.uint8) + np.uint8(-LEAST_SHIFT)
    return (halves[::2] | halves[1::2] << 4).tobytes()


def unpack_shifts(data: memoryview, count: int) -> NDArray[np.int32]:
    """Undo `pack_shifts`."""
    found = np.frombuffer(data, np.uint8)
    return np.stack([found & 15, found >> 4], axis=1).reshape(-1)[:count].astype(np.int32) + LEAST_SHIFT


def packed_size(count: int) -> int:
    """Bytes of `count` shifts."""
    return -(-count // 2)


def costs_reference(
    symbols: NDArray[np.uint8], across: NDArray[np.int32], own: NDArray[np.int32], costs: NDArray[np.int32]
) -> NDArray[np.int64]:
    """`[len(symbols), SHIFTS]`: the cost of each row of symbols under each shift of it, where `own[row] +
    across[column] + shift` is the table. costs: `Tables.costs`."""
    found = np.empty((len(symbols), SHIFTS), np.int64)
    places = np.arange(SHIFTS, dtype=np.int32)
    for row, (line, number) in enumerate(zip(symbols, own, strict=True)):
        first = across + number + (SHIFTS + LEAST_SHIFT)
        found[row] = costs[line[:, None], first[:, None] + places].sum(axis=0)
    return found


def _costs(
    symbols: NDArray[np.uint8], across: NDArray[np.int32], tables: Tables, own: NDArray[np.int32] | None = None
) -> NDArray[np.int64]:
    own = np.zeros(len(symbols), np.int32) if own is None else own
    fast = loops.compiled()
    find = costs_reference if fast is None else fast.shift_costs
    return find(symbols, np.ascontiguousarray(across, dtype=np.int32), own, tables.costs)


def _cheapest(costs: NDArray[np.int64]) -> NDArray[np.int8]:
    """The shift of least cost of each row; of equal ones the one nearest to none."""
    order = np.argsort(np.abs(np.arange(SHIFTS) + LEAST_SHIFT), kind="stable")
    found: NDArray[np.int8] = (order[np.argmin(costs[:, order], axis=1)] + LEAST_SHIFT).astype(np.int8)
    return found
