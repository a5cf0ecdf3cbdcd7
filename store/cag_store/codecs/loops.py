"""Which inner loops decode: compiled ones where numba can be imported, otherwise numpy. Both give the same bits.

numba is imported by the first segment that is decoded, or by `warm_up`; whoever only reads manifests never pays for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array

if TYPE_CHECKING:
    from cag_store.codecs.ranks import PackedRanks


XXH3_ABOVE_BYTES = 240  # smaller segments are hashed in another way, and left
UNVERIFIED = np.empty((0, 2), np.uint64)  # no hashes


class ChunkSpan(NamedTuple):
    """Where the tokens of a chunk go in arrays (from `start` on), how many there are, and how many of them are exact at
    its beginning and at its end."""

    start: int
    num_tokens: int
    num_first: int = 0
    num_recent: int = 0


RANKED, GROUPED, KEPT = range(3)


class Loop(NamedTuple):
    """Which of the loops for segments of a chunk: `Loops.decode_ranked` of a `kind`, `decode_grouped` or
    `keep_grouped`."""

    number: int
    kind: int = 0


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

    # Segments of one chunk that lie in memory, verified and decoded one by one. pieces: `[num_segments, 2]` of address
    # and number of bytes. hashes: `[num_segments, 2]`, the xxh3-128 that each must have, the high half first; `[0, 2]`
    # where they were verified before. rows: what a segment is and where it goes. Returned is which are done: others
    # have another hash, are of another form, are damaged or tiny, and have anything in their arrays. Each head of an
    # array is contiguous.

    def decode_ranked(
        self,
        pieces: NDArray[np.int64],
        hashes: NDArray[np.uint64],
        rows: NDArray[np.int64],
        span: ChunkSpan,
        kind: int,
    ) -> NDArray[np.bool_]:
        """Segments of `lossless` that are ranks (`packers[kind - 1]`) and a raw plane, of 2-byte elements. rows:
        `num_kv_heads`, `head_dim`, address of the array, bytes from head to head."""

    def decode_grouped(
        self, pieces: NDArray[np.int64], hashes: NDArray[np.uint64], rows: NDArray[np.int64], span: ChunkSpan
    ) -> NDArray[np.bool_]:
        """Segments of `int8` and `int4` with unpacked codes, to numbers of the bfloat16 storage dtype. rows:
        `num_kv_heads`, `head_dim` (even), bits of a code, 1 for keys, tokens (of keys) or channels (of values) of a
        group, the head's number for that width, 2, address of the array, bytes from head to head."""

    def keep_grouped(
        self, pieces: NDArray[np.int64], hashes: NDArray[np.uint64], rows: NDArray[np.int64], span: ChunkSpan
    ) -> NDArray[np.bool_]:
        """The same to a `CodedSide`. rows: as before, with bytes of an exact number instead of 2, then address and
        bytes from head to head of each of its arrays."""


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


def addresses(pieces: Iterable[memoryview]) -> NDArray[np.int64]:
    """`[num_pieces, 2]` of address and number of bytes."""
    return np.array([(np.asarray(piece).ctypes.data, len(piece)) for piece in pieces], np.int64).reshape(-1, 2)


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
