"""Which inner loops decode: compiled ones where numba can be imported, otherwise numpy. Both give the same bits.

numba is imported by the first segment that is decoded, or by `warm_up`; whoever only reads manifests never pays for it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array


class Loops(Protocol):
    """Loops that write straight into `out` `[num_kv_heads, num_tokens, head_dim]`, whose last axis is contiguous.

    None of them holds the interpreter's lock.
    """

    def join_planes(self, planes: list[NDArray[np.uint8]], out: Array) -> None:
        """Interleave byte planes (flat, most significant first), rotate right by one bit; `out` unsigned."""

    def dequantize_keys(
        self, codes: NDArray[np.int8], parameters: NDArray[np.uint16], group_tokens: int, out: Array
    ) -> None:
        """`out = code * scale + offset`. parameters: scales and offsets, bfloat16 bit patterns
        `[2, num_kv_heads, num_groups, head_dim]`; `out` of the bfloat16 or float32 storage dtype."""

    def dequantize_values(self, codes: NDArray[np.int8], parameters: NDArray[np.uint16], out: Array) -> None:
        """The same with parameters `[2, num_kv_heads, num_tokens]`."""

    def dequantize_nibble_keys(
        self, codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_tokens: int, out: Array
    ) -> None:
        """As `dequantize_keys`, from two codes a byte `[num_kv_heads, num_tokens, ceil(head_dim / 2)]`: low nibbles are
        the first channels, high nibbles the others."""

    def dequantize_nibble_values(
        self, codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_channels: int, out: Array
    ) -> None:
        """The same with parameters `[2, num_kv_heads, num_tokens, num_channel_groups]`."""


@cache
def compiled() -> Loops | None:
    """The compiled loops, or None where numba cannot be imported. The first call takes half a second; the first
    one after an installation compiles, which takes three."""
    try:
        return cast(Loops, importlib.import_module("cag_store.codecs.compiled_loops"))
    except ImportError:
        return None


def compiled_for(out: Array) -> Loops | None:
    """The compiled loops if they can write into `out`."""
    writable = out.strides[-1] == out.itemsize and out.flags.aligned and out.dtype.isnative
    return compiled() if writable else None


def warm_up() -> bool:
    """Import and compile ahead of the first decoding, perhaps on a thread of the caller's. Returns whether the
    compiled loops will be used."""
    return compiled() is not None
