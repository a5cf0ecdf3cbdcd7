"""Which inner loops decode: compiled ones where numba can be imported, otherwise numpy. Both give the same bits.

numba is imported by the first segment that is decoded, or by `warm_up`; whoever only reads manifests never pays for it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array

if TYPE_CHECKING:
    from cag_store.codecs.ranks import PackedRanks


class Loops(Protocol):
    """Loops that write straight into `out` `[num_kv_heads, num_tokens, head_dim]`, whose last axis is contiguous.

    None of them holds the interpreter's lock.
    """

    def join_planes(self, planes: list[NDArray[np.uint8]], out: Array) -> None:
        """Interleave byte planes (flat, most significant first), rotate right by one bit; `out` unsigned."""

    def around_medians(self, plane: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of each channel of `[num_heads, num_tokens, channels]` the median, and how often each difference from it
        occurs: `[num_heads * channels]` and `[num_heads * channels, 256]`."""

    def pack_ranks(self, plane: NDArray[np.uint8], base: NDArray[np.uint8], rank_of: NDArray[np.uint8]) -> PackedRanks:
        """Codes of the differences of `plane` `[num_heads, num_tokens, channels]` from `base` `[num_heads, channels]`,
        by their ranks."""

    def unpack_ranks(self, data: NDArray[np.uint8], out: Array) -> bool:
        """Unpack what `cag_store.codecs.ranks.Ranks` packed into bytes `out` `[num_kv_heads, num_tokens, channels]`.
        False, with anything in `out`, where `data` is damaged."""

    def decode_ranked(self, segments: NDArray[np.int64], kind: int) -> NDArray[np.bool_]:
        """Decode those segments of `lossless` that are ranks (`packers[kind - 1]`) and a raw plane.

        segments: `[num_segments, 7]` of the address of its bytes, their number, the address of the first head of its
        array of 2-byte elements, bytes from head to head, and shape; heads are contiguous. Returns which are decoded;
        others are of another form, or damaged, and have anything in their array.
        """

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

    def dequantize_segments(self, segments: NDArray[np.int64]) -> None:
        """What the four above do, for several segments of 2-byte elements, as many calls would.

        segments: `[num_segments, 13]` of address of the codes, address of scales and offsets, address of the first
        head of the array, bytes from head to head, `num_kv_heads`, `num_tokens`, `head_dim`, bytes of a row of codes,
        groups along the tokens and along the channels, size of a group, bits of a code, and 1 for keys. Each head of an
        array is contiguous.
        """

    def copy_checked(self, spans: NDArray[np.int64], checks: NDArray[np.int64]) -> bool:
        """Copy bytes, unless a check fails.

        spans: `[num_spans, 3]` of source address, target address and number of bytes, which do not overlap; checks:
        `[num_checks, 3]` of address, number of bfloat16 that must be finite, and 1 if none may be below 0.
        """


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


def has_whole_heads(out: object) -> bool:
    """Whether `out` is an array of 2-byte elements that compiled loops can write, one run a head."""
    if not isinstance(out, np.ndarray) or out.dtype.itemsize != 2 or out.size == 0 or compiled_for(out) is None:
        return False
    row = out.shape[2] * out.itemsize
    return out.strides[1] == row and (out.shape[0] == 1 or (out.strides[0] > 0 and out.strides[0] % row == 0))


def warm_up() -> bool:
    """Import and compile ahead of the first decoding, perhaps on a thread of the caller's. Returns whether the
    compiled loops will be used."""
    return compiled() is not None
