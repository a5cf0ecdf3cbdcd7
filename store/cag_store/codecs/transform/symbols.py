"""Codes <-> symbols of the entropy coder, low bits and escapes (docs/format.md 5.4).

A code of a wide class is split: its upper part is a symbol, its `shift` low bits are kept as they are. What no symbol
reaches is escaped.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import corrupt_segment
from cag_store.codecs.transform.rans import NUM_SYMBOLS

ESCAPE = 0
MIDDLE = NUM_SYMBOLS // 2
MAX_CODE = (1 << 15) - 1
CLASSES_PER_OCTAVE = 4
OCTAVES_BELOW = 2
MAX_SHIFT = 9
_WIDEST = 4  # log2 of the deviation, in symbols, from which on low bits are split off

PAD = b"\0\0"  # compiled loops look two bytes ahead of the low bits


def class_shift(index: int) -> int:
    """How many low bits the codes of a class have; its deviation is about `2 ** (index / 4 - 2)` codes."""
    octave = -(-index // CLASSES_PER_OCTAVE) - OCTAVES_BELOW
    return min(max(octave - _WIDEST, 0), MAX_SHIFT)


def component_classes(log_deviation: NDArray[np.int16], step: int, num_classes: int) -> NDArray[np.uint8]:
    """Class of each component that is coded at a step of `2 ** (step / 64)`: those whose deviation is at least a
    quarter of it,
    which come first."""
    spread = log_deviation.astype(np.int32) - step + 64 * OCTAVES_BELOW
    kept = spread[: int(np.count_nonzero(spread >= 0))]
    return np.minimum(kept * CLASSES_PER_OCTAVE // 64, num_classes - 1).astype(np.uint8)


def low_bytes(num_tokens: int, shifts: NDArray[np.uint8]) -> int:
    """Size of the low bits of all codes."""
    return -(-num_tokens * int(shifts.sum(dtype=np.int64)) // 8)


def split(codes: NDArray[np.int16], shifts: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], bytes, NDArray[np.int16]]:
    """Symbols, packed low bits, escaped codes. codes: `[num_tokens, num_components]`."""
    symbols = (codes.astype(np.int32) >> shifts) + MIDDLE
    outside = (symbols <= ESCAPE) | (symbols >= NUM_SYMBOLS)
    symbols[outside] = ESCAPE
    return symbols.astype(np.uint8), _packed_low(codes, shifts), codes[outside].astype(np.int16)


def join(
    symbols: NDArray[np.uint8],
    shifts: NDArray[np.uint8],
    low: memoryview,
    escapes: NDArray[np.int16],
) -> NDArray[np.int16]:
    """Undo `split`: the reference of the compiled loop. Raises: CorruptEntry when there are more or fewer escapes than
    symbols for them."""
    values = symbols.astype(np.int32) - MIDDLE << shifts
    num_bits = int(shifts.sum(dtype=np.int64))
    bits = np.unpackbits(np.frombuffer(low, np.uint8), bitorder="little")[: len(symbols) * num_bits].astype(np.int32)
    bits = bits.reshape(len(symbols), num_bits)
    first = 0
    for component in np.flatnonzero(shifts):
        width = int(shifts[component])
        values[:, component] += bits[:, first : first + width] @ (1 << np.arange(width, dtype=np.int32))
        first += width
    escaped = symbols == ESCAPE
    if np.count_nonzero(escaped) != len(escapes):
        raise corrupt_segment("number of escaped codes", int(np.count_nonzero(escaped)), len(escapes))
    values[escaped] = escapes
    return values.astype(np.int16)


def _packed_low(codes: NDArray[np.int16], shifts: NDArray[np.uint8]) -> bytes:
    wide = np.flatnonzero(shifts)
    columns = [
        (codes[:, component].astype(np.int32)[:, None] >> np.arange(shifts[component])) & 1 for component in wide
    ]
    if not columns:
        return b""
    return np.packbits(np.concatenate(columns, axis=1).astype(np.uint8), bitorder="little").tobytes()
