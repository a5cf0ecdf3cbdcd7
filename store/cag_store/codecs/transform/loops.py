"""Which inner loops the codec `transform` runs: compiled ones where numba can be imported, otherwise numpy. Both
give the same bits."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array


class Loops(Protocol):
    """None of them holds the interpreter's lock."""

    def encode_symbols(
        self,
        symbols: NDArray[np.uint8],
        classes: NDArray[np.uint8],
        frequencies: NDArray[np.uint32],
        starts: NDArray[np.uint32],
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
        """As `rans.encode_reference`."""

    def decode_codes(
        self,
        states: NDArray[np.uint32],
        words: NDArray[np.uint16],
        classes: NDArray[np.uint8],
        slots: NDArray[np.uint32],
        shifts: NDArray[np.uint8],
        low: NDArray[np.uint8],
        escapes: NDArray[np.int16],
        codes: NDArray[np.int16],
    ) -> bool:
        """As `rans.decode_symbols`, then `symbols.join`, in one pass into `codes`; `low` has `symbols.PAD` behind it.
        False for what these refuse. `states` is destroyed."""

    def integer_product(self, codes: NDArray[np.int16], packed: NDArray[np.int16], sums: NDArray[np.int32]) -> None:
        """As `product.product_reference`, of rows packed by `product.pack_rows`."""

    def finish(
        self,
        sums: NDArray[np.int32],
        scale: NDArray[np.float32],
        mean: NDArray[np.float32],
        cosines: NDArray[np.float32],
        sines: NDArray[np.float32],
        pairs: NDArray[np.int64],
        out: Array,
    ) -> None:
        """As `product.finish_reference`."""


@cache
def compiled() -> Loops | None:
    """The compiled loops, or None where numba cannot be imported."""
    try:
        return cast(Loops, importlib.import_module("cag_store.codecs.transform.compiled_loops"))
    except ImportError:
        return None
