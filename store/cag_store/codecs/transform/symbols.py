"""Codes -> symbols of the entropy coder and low bits, and which frequency table a code is written with
(docs/format.md 5.4).

A code of a loud component is split: its upper part is a symbol, its low bits are kept as they are. What no symbol
reaches is escaped. A table stands for a deviation; a segment shifts each component and each token to louder or quieter
tables than the basis foresees.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ESCAPE = 0
NUM_SYMBOLS = 128
MIDDLE = NUM_SYMBOLS // 2
MAX_CODE = (1 << 15) - 1
MAX_LOW_BITS = 9
LEVELS_PER_OCTAVE = 4
OCTAVES_BELOW = 3  # level 0 has a deviation of 2 ** -3 codes
SHIFTS = 16  # a shift is from -8 to 7 levels
LEAST_SHIFT = -8

_LEAST_OCTAVE = 2  # components are coded from a deviation of 2 ** -2 codes on
_WIDEST = 3  # log2 of the deviation, in symbols, from which on low bits are split off


def component_levels(log_deviation: NDArray[np.int16], step: int) -> NDArray[np.int32]:
    """Level of each component that is coded at a step of `2 ** (step / 64)`: those whose deviation is at least a
    quarter of it, which come first. The deviation is about `2 ** (level / 4 - 3)` codes."""
    spread = log_deviation.astype(np.int32) - step + 64 * _LEAST_OCTAVE
    kept = spread[: int(np.count_nonzero(spread >= 0))]
    levels: NDArray[np.int32] = kept * LEVELS_PER_OCTAVE // 64 + LEVELS_PER_OCTAVE * (OCTAVES_BELOW - _LEAST_OCTAVE)
    return levels


def low_bits(levels: NDArray[np.int32]) -> NDArray[np.uint8]:
    """How many low bits the codes of components of these levels have."""
    octaves = -(-levels // LEVELS_PER_OCTAVE) - OCTAVES_BELOW
    return np.clip(octaves - _WIDEST, 0, MAX_LOW_BITS).astype(np.uint8)


def table_numbers(levels: NDArray[np.int32], num_tables: int) -> NDArray[np.int32]:
    """The table of the symbols of components of these levels, in a segment without shifts."""
    in_symbols: NDArray[np.int32] = levels - LEVELS_PER_OCTAVE * low_bits(levels).astype(np.int32)
    return np.minimum(in_symbols, num_tables - 1)


def symbols_of(codes: NDArray[np.int16], low: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`[num_tokens, num_components]`: ESCAPE where no symbol reaches."""
    found = codes >> low.astype(np.int16)
    found += np.int16(MIDDLE)  # the largest ones wrap around to negative numbers, which no symbol reaches either
    unsigned = found.view(np.uint16)
    unsigned *= unsigned < NUM_SYMBOLS  # ESCAPE is 0
    return unsigned.astype(np.uint8)
