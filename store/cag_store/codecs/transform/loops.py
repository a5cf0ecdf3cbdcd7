"""Which inner loops the codec `transform` runs: compiled ones where numba can be imported, otherwise numpy. Both
give the same bits."""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array

if TYPE_CHECKING:
    from cag_store.codecs.transform.rans import Layout, Stream, Tables


class Loops(Protocol):
    """None of them holds the interpreter's lock."""

    def encode_codes(
        self, codes: NDArray[np.int16], layout: Layout, tables: Tables
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int16]]:
        """As `rans.encode_reference`."""

    def decode_codes(self, stream: Stream, layout: Layout, tables: Tables, codes: NDArray[np.int16]) -> bool:
        """As `rans.decode_codes`, of a padded stream; False for what that refuses. Rows of `codes` have room for one
        more code, which may be set to 0, when their number is odd."""

    def shift_costs(
        self, symbols: NDArray[np.uint8], across: NDArray[np.int32], own: NDArray[np.int32], costs: NDArray[np.int32]
    ) -> NDArray[np.int64]:
        """As `shifts.costs_reference`."""

    def PackedRows(self, rows: NDArray[np.int16]) -> Any:  # noqa: N802  a class
        """Rows `[num_components, num_channels]` as `integer_product` reads them."""

    def Operand(self, buffer: NDArray[np.int16], num_tokens: int, num_components: int) -> Any:  # noqa: N802  a class
        """Codes as `integer_product` reads them, from a `product.code_buffer`."""

    def integer_product(self, operand: Any, packed: Any) -> NDArray[np.int32]:
        """As `product.product_reference`."""

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
