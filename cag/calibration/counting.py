"""Frequency tables from the coefficients of sample texts.

In: coefficients of each side of each group of layers, steps. Out: what the entropy coder of the codec `transform` works
with. Knows neither models nor bases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.transform import symbols as code
from cag_store.codecs.transform.rans import TOTAL, Tables
from cag_store.codecs.transform.shifts import chosen_shifts
from cag_store.codecs.transform.symbols import NUM_SYMBOLS

NUM_TABLES = 32
_SMOOTHING = 0.01
_LEAST_SHARE = 2e-5
_SEGMENT_TOKENS = 512
_ROUNDS = 3  # of choosing shifts and counting with them


class Counts:
    """How often each symbol occurs with each table.

    Which table a code is written with depends on the shifts of its segment, and those on the tables: counted first
    without shifts, then with those that the tables so far make cheapest.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((NUM_TABLES, NUM_SYMBOLS))
        self._coded: list[tuple[NDArray[np.uint8], NDArray[np.int32]]] = []

    def add(self, log_deviation: NDArray[np.int16], coefficients: NDArray[np.float32], step: int) -> None:
        """Count the coefficients `[num_rows, num_components]` of a side at a step."""
        levels = code.component_levels(log_deviation, step)
        low, numbers = code.low_bits(levels), code.table_numbers(levels, NUM_TABLES)
        values = coefficients[:, : len(levels)] / np.float32(2.0 ** (step / 64))
        codes = np.clip(np.rint(values), -code.MAX_CODE, code.MAX_CODE)
        kinds = code.symbols_of(codes.astype(np.int16), low)
        for first in range(0, len(kinds), _SEGMENT_TOKENS):
            self._coded.append((np.ascontiguousarray(kinds[first : first + _SEGMENT_TOKENS]), numbers))

    def frequencies(self) -> NDArray[np.uint16]:
        """Of the tables that the codes agree with."""
        self._count(None)
        for _ in range(_ROUNDS):
            self._count(Tables.of(self._frequencies()))
        return self._frequencies()

    def _count(self, tables: Tables | None) -> None:
        self.counts[:] = 0
        for kinds, numbers in self._coded:
            used = np.broadcast_to(numbers, kinds.shape)
            if tables is not None:
                by_component, by_token = chosen_shifts(kinds, numbers, tables)
                used = np.clip(numbers + by_component + by_token[:, None].astype(np.int32), 0, NUM_TABLES - 1)
            places = (used * NUM_SYMBOLS + kinds).ravel()
            self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)

    def _frequencies(self) -> NDArray[np.uint16]:
        """Counts, mirrored and smoothed, as frequencies that sum to TOTAL. Symbols too far out for a table are left to
        escapes."""
        counts = self.counts.copy()
        counts[:, 1:] += counts[:, :0:-1]
        distance = np.abs(np.arange(NUM_SYMBOLS) - code.MIDDLE)
        spread = 2.0 ** (np.arange(NUM_TABLES) / code.LEVELS_PER_OCTAVE - code.OCTAVES_BELOW)
        model = np.exp(-distance / np.maximum(0.8 * spread, 0.25)[:, None])
        model /= model.sum(axis=1, keepdims=True)
        seen = counts.sum(axis=1, keepdims=True)
        shares = counts + model * (_SMOOTHING * seen + 50)
        shares /= shares.sum(axis=1, keepdims=True)
        found = np.floor(shares * (TOTAL - NUM_SYMBOLS)).astype(np.int64)
        found[(found == 0) & (model > _LEAST_SHARE)] = 1
        found[:, code.ESCAPE] = np.maximum(found[:, code.ESCAPE], 1)
        found[:, code.MIDDLE] += TOTAL - found.sum(axis=1)
        tables: NDArray[np.uint16] = found.astype(np.uint16)
        return tables
