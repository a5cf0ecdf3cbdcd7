"""Interleaved static rANS over classes of variance (docs/format.md 5.4).

Symbol `k` of a stream belongs to lane `k mod LANES`; its class has one table of frequencies that sum to `TOTAL`. The
reference here works on
one row of lanes at a time in numpy; compiled loops give the same words and symbols.
Source: Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392 (interleaving).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import corrupt_segment
from cag_store.codecs.transform import loops
from cag_store.errors import CorruptEntry

LANES = 32
PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
NUM_SYMBOLS = 128
LOWEST_STATE = 1 << 16

_SLOTS = np.uint32(TOTAL - 1)


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequencies `[num_classes, NUM_SYMBOLS]`, each row summing to TOTAL and none of it TOTAL, and what follows
    from them.

    starts: uint32, the same shape, where a symbol's slots begin. slots: uint32 [num_classes, TOTAL]: symbol << 24 |
    frequency << 12 |
    place of the slot within the symbol's.
    """

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    slots: NDArray[np.uint32]

    @classmethod
    def of(cls, frequencies: NDArray[np.integer]) -> Self:
        """The tables of valid frequencies."""
        counts = frequencies.astype(np.uint32)
        starts = (np.cumsum(counts, axis=1) - counts).astype(np.uint32)
        symbols = np.arange(NUM_SYMBOLS, dtype=np.uint32)
        rows = [
            (np.repeat(symbols << 24 | row << 12, row) | (np.arange(TOTAL, dtype=np.uint32) - np.repeat(start, row)))
            for row, start in zip(counts, starts, strict=True)
        ]
        return cls(counts, starts, np.stack(rows).astype(np.uint32))


def encode_symbols(
    symbols: NDArray[np.uint8], classes: NDArray[np.uint8], tables: Tables
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """The states `[LANES]` and words in the order in which a decoder reads them.

    symbols: `[num_tokens, num_components]`, each of a frequency above 0 in its class; classes: `[num_components]`.
    """
    fast = loops.compiled()
    if fast is not None:
        return fast.encode_symbols(np.ascontiguousarray(symbols), classes, tables.frequencies, tables.starts)
    return encode_reference(symbols, classes, tables)


def encode_reference(
    symbols: NDArray[np.uint8], classes: NDArray[np.uint8], tables: Tables
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """See `encode_symbols`."""
    flat, kinds = symbols.reshape(-1), np.tile(classes, len(symbols))
    states = np.full(LANES, LOWEST_STATE, np.uint64)
    words: list[NDArray[np.uint16]] = []
    for first in reversed(range(0, flat.size, LANES)):
        row = slice(first, first + LANES)
        frequency = tables.frequencies[kinds[row], flat[row]].astype(np.uint64)
        start = tables.starts[kinds[row], flat[row]].astype(np.uint64)
        state = states[: len(frequency)]
        full = state >= frequency << np.uint64(32 - PROBABILITY_BITS)
        words.append((state[full] & np.uint64(0xFFFF)).astype(np.uint16))
        state = np.where(full, state >> np.uint64(16), state)
        states[: len(frequency)] = (state // frequency << np.uint64(PROBABILITY_BITS)) + state % frequency + start
    return states.astype(np.uint32), np.concatenate([np.empty(0, np.uint16), *reversed(words)])


def decode_symbols(
    states: NDArray[np.uint32], words: NDArray[np.uint16], classes: NDArray[np.uint8], tables: Tables, num_tokens: int
) -> NDArray[np.uint8]:
    """`[num_tokens, num_components]`: the reference of the compiled loop.

    Raises: CorruptEntry when the words run out, are left over, or end in other states than those a writer begins with.
    """
    kinds = np.tile(classes, num_tokens)
    symbols = np.empty(kinds.size, np.uint8)
    states, position = states.copy(), 0
    for first in range(0, kinds.size, LANES):
        kind = kinds[first : first + LANES]
        state = states[: len(kind)]
        slot = tables.slots[kind, state & _SLOTS]
        symbols[first : first + LANES] = slot >> np.uint32(24)
        frequency, place = slot >> np.uint32(12) & _SLOTS, slot & _SLOTS
        state = frequency * (state >> np.uint32(PROBABILITY_BITS)) + place
        low = np.flatnonzero(state < LOWEST_STATE)
        if position + low.size > len(words):
            raise torn(len(words))
        state[low] = state[low] << np.uint32(16) | words[position : position + low.size]
        states[: len(kind)] = state
        position += low.size
    if position != len(words) or np.any(states != LOWEST_STATE):
        raise torn(len(words))
    return symbols.reshape(num_tokens, len(classes))


def torn(num_words: int) -> CorruptEntry:
    """The error for words that do not end where their symbols do."""
    return corrupt_segment("entropy-coded words", "a stream that ends where its last word does", f"{num_words} words")
