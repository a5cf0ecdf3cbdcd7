"""Static rANS over 32 tokens at once (docs/format.md 5.4).

A token of a block of `LANES` is a lane with a state of its own; component after component is coded for all lanes. The
reference here does so in numpy; compiled loops give the same words and codes.
Source: Duda, arXiv:1311.2540; Giesen, arXiv:1402.3392 (interleaving).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import corrupt_segment
from cag_store.codecs.transform import loops
from cag_store.codecs.transform.symbols import ESCAPE, MIDDLE, NUM_SYMBOLS, SHIFTS, symbols_of
from cag_store.errors import CorruptEntry

LANES = 32
PROBABILITY_BITS = 12
TOTAL = 1 << PROBABILITY_BITS
LOWEST_STATE = 1 << 16
SPARE_WORDS = 8 * LANES
"""Zeros behind words and escapes: compiled loops read ahead."""

_SLOTS = np.uint32(TOTAL - 1)
_COST_UNIT = 256  # of a bit
_ESCAPED_BITS = 16


@dataclass(frozen=True, eq=False)
class Tables:
    """Frequencies `[num_tables, NUM_SYMBOLS]`, each row summing to TOTAL, and what follows from them.

    starts: uint32, the same shape, where a symbol's slots begin. slots: uint32 [num_tables, TOTAL]: symbol << 24 |
    frequency << 12 | place of the slot within the symbol's. costs: int32 [NUM_SYMBOLS, SHIFTS + num_tables + SHIFTS],
    what a symbol takes with a table, in 256ths of a bit; beyond the first and last table those stand for the others.
    """

    frequencies: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    slots: NDArray[np.uint32]
    costs: NDArray[np.int32]

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
        bits = PROBABILITY_BITS - np.log2(np.maximum(counts, 1))
        bits[:, ESCAPE] += _ESCAPED_BITS
        bits = np.where(counts > 0, bits, bits[:, ESCAPE][:, None])
        costs = np.pad(np.rint(_COST_UNIT * bits).astype(np.int32), ((SHIFTS, SHIFTS), (0, 0)), mode="edge")
        return cls(counts, starts, np.stack(rows).astype(np.uint32), np.ascontiguousarray(costs.T))


@dataclass(frozen=True, eq=False)
class Layout:
    """What codes are written with: `table_numbers` int32 and `low` uint8 (number of low bits) of each component,
    `token_shifts` int32. The table of a code is `table_numbers[component] + token_shifts[token]`, or the first or the
    last one."""

    table_numbers: NDArray[np.int32]
    low: NDArray[np.uint8]
    token_shifts: NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Stream:
    """states: uint32 [LANES]; words: uint16 in the order in which a decoder reads them; escapes: int16. To be decoded,
    `num_words` and `num_escapes` of them have SPARE_WORDS zeros behind them."""

    states: NDArray[np.uint32]
    words: NDArray[np.uint16]
    escapes: NDArray[np.int16]
    num_words: int
    num_escapes: int

    @classmethod
    def padded(cls, states: NDArray[np.uint32], words: NDArray[np.uint16], escapes: NDArray[np.int16]) -> Self:
        """A stream to be decoded; copies, as these arrays may lie at any address."""
        spare = np.zeros(SPARE_WORDS, np.uint16)
        padded = np.concatenate([words, spare]), np.concatenate([escapes, spare.astype(np.int16)])
        return cls(states.copy(), *padded, len(words), len(escapes))


def encode_codes(codes: NDArray[np.int16], layout: Layout, tables: Tables) -> Stream:
    """codes: `[num_tokens, num_components]`."""
    fast = loops.compiled()
    encode = encode_reference if fast is None else fast.encode_codes
    states, words, escapes = encode(np.ascontiguousarray(codes), layout, tables)
    return Stream(states, words, escapes, len(words), len(escapes))


def encode_reference(
    codes: NDArray[np.int16], layout: Layout, tables: Tables
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int16]]:
    """See `encode_codes`."""
    states = np.full(LANES, LOWEST_STATE, np.uint64)
    words: list[NDArray[np.uint16]] = []
    escapes: list[NDArray[np.int16]] = []
    symbols = symbols_of(codes, layout.low)
    for first in reversed(range(0, len(codes), LANES)):
        tokens = slice(first, first + LANES)
        lanes = states[: len(codes[tokens])]
        for component in reversed(range(codes.shape[1])):
            number = _tables_of(layout, component, tokens, tables)
            symbol = symbols[tokens, component].copy()
            symbol[tables.frequencies[number, symbol] == 0] = ESCAPE
            escapes.append(codes[tokens, component][symbol == ESCAPE])
            bits = int(layout.low[component])
            if bits:
                _spill(lanes, np.uint64(1 << (32 - bits)), words)
                lanes[:] = lanes << np.uint64(bits) | (codes[tokens, component] & ((1 << bits) - 1)).astype(np.uint64)
            frequency = tables.frequencies[number, symbol].astype(np.uint64)
            _spill(lanes, frequency << np.uint64(32 - PROBABILITY_BITS), words)
            start = tables.starts[number, symbol].astype(np.uint64)
            lanes[:] = (lanes // frequency << np.uint64(PROBABILITY_BITS)) + lanes % frequency + start
    joined = np.concatenate([np.empty(0, np.uint16), *reversed(words)])
    return states.astype(np.uint32), joined, np.concatenate([np.empty(0, np.int16), *reversed(escapes)])


def decode_codes(stream: Stream, layout: Layout, tables: Tables, codes: NDArray[np.int16]) -> None:
    """Into `codes` `[num_tokens, num_components]`: the reference of the compiled loop.

    Raises: CorruptEntry when words or escapes run out, are left over, or the states end otherwise than they began in
    the writer.
    """
    states, place, escape = stream.states.copy(), 0, 0
    words, escapes = stream.words[: stream.num_words], stream.escapes[: stream.num_escapes]
    for first in range(0, len(codes), LANES):
        tokens = slice(first, first + LANES)
        lanes = states[: len(codes[tokens])]
        for component in range(codes.shape[1]):
            number = _tables_of(layout, component, tokens, tables)
            slot = tables.slots[number, lanes & _SLOTS]
            frequency = slot >> np.uint32(PROBABILITY_BITS) & _SLOTS
            lanes[:] = frequency * (lanes >> np.uint32(PROBABILITY_BITS)) + (slot & _SLOTS)
            place = _refill(lanes, words, place)
            symbol = (slot >> np.uint32(24)).astype(np.int32)
            bits = int(layout.low[component])
            value = symbol - MIDDLE << bits
            if bits:
                value += (lanes & np.uint32((1 << bits) - 1)).astype(np.int32)
                lanes >>= np.uint32(bits)
                place = _refill(lanes, words, place)
            escaped = np.flatnonzero(symbol == ESCAPE)
            if escape + len(escaped) > len(escapes):
                raise torn(len(words))
            value[escaped] = escapes[escape : escape + len(escaped)]
            escape += len(escaped)
            codes[tokens, component] = value.astype(np.int16)
    if (place, escape) != (len(words), len(escapes)) or np.any(states != LOWEST_STATE):
        raise torn(len(words))


def _tables_of(layout: Layout, component: int, tokens: slice, tables: Tables) -> NDArray[np.int32]:
    wanted: NDArray[np.int32] = layout.table_numbers[component] + layout.token_shifts[tokens]
    return np.clip(wanted, 0, len(tables.frequencies) - 1)


def _spill(lanes: NDArray[np.uint64], bound: NDArray[np.uint64] | np.uint64, words: list[NDArray[np.uint16]]) -> None:
    """Move 16 bits of the states that would become too large to the words."""
    full = lanes >= bound
    words.append((lanes[full] & np.uint64(0xFFFF)).astype(np.uint16))
    lanes[full] >>= np.uint64(16)


def _refill(lanes: NDArray[np.uint32], words: NDArray[np.uint16], place: int) -> int:
    """Move words to the states that became too small; returns the place of the next word. Raises: CorruptEntry."""
    small = np.flatnonzero(lanes < LOWEST_STATE)
    if place + len(small) > len(words):
        raise torn(len(words))
    lanes[small] = lanes[small] << np.uint32(16) | words[place : place + len(small)]
    return place + len(small)


def torn(num_words: int) -> CorruptEntry:
    """The error for words that do not end where their symbols do."""
    return corrupt_segment("entropy-coded words", "a stream that ends where its last word does", f"{num_words} words")
