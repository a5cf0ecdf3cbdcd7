"""Entropy-coded segments as they are stored, verified and taken apart but not decoded: what a reader may keep in place
of decoded numbers, for a device that decodes them itself.

A codec that is joint over several layers (`transform`) can hand out its segments like this; who decodes them gives the
bits that the codec would. Knows sizes and arrays only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cag_store.codecs.transform.basis import Rotation
    from cag_store.codecs.transform.prepared import PreparedSide

ALIGNED = 64  # bytes: a segment has a slot that begins with a line of the processor's cache

CENTER, EXACT, EXACT_ROWS, COMPONENT_SHIFTS, TOKEN_SHIFTS, ESCAPES, STATES, WORDS = range(8)
"""The parts of a segment (docs/format.md 5.4), in their order."""
NUM_PARTS = 8


class StreamChunk(NamedTuple):
    """The segment of one chunk: tokens [start, start + num_tokens) of the cache in `encoded_bytes`."""

    start: int
    num_tokens: int
    encoded_bytes: int


@dataclass(frozen=True)
class StreamShape:
    """One side of a group of neighbouring layers over all chunks of a cache.

    static: what all its segments are decoded with. rotations: what turns the keys of each layer, None where nothing
    does, and for values. itemsize: bytes of a decoded number.
    """

    static: PreparedSide
    rotations: tuple[Rotation | None, ...]
    chunks: tuple[StreamChunk, ...]
    itemsize: int

    @cached_property
    def slots(self) -> list[int]:
        """First byte of each segment's slot, and the end of the last one. A slot has a byte more than the segment."""
        sizes = (-(-(chunk.encoded_bytes + 1) // ALIGNED) * ALIGNED for chunk in self.chunks)
        return list(accumulate(sizes, initial=0))

    @cached_property
    def chunk_at(self) -> dict[int, int]:
        """Number of the chunk with this first token."""
        return {chunk.start: number for number, chunk in enumerate(self.chunks)}


class StreamSide(NamedTuple):
    """Where segments of one side of a group are put.

    bounds: int64 `[num_chunks, NUM_PARTS + 1]`, where the parts of each segment begin in `data`, and where the last one
    ends; escapes, and so words, begin at an even byte. data: uint8 `[num_bytes]`, the segments, each in its slot.
    """

    shape: StreamShape
    bounds: NDArray[np.int64]
    data: NDArray[np.uint8]

    def fits(self, shape: StreamShape) -> bool:
        """Whether these are arrays of a shape."""
        found = [(array.shape, array.dtype, array.flags.writeable) for array in (self.bounds, self.data)]
        sizes = [(len(shape.chunks), NUM_PARTS + 1), (shape.slots[-1],)]
        return self.shape == shape and found == [
            (size, np.dtype(kind), True) for size, kind in zip(sizes, (np.int64, np.uint8), strict=True)
        ]

    def put(self, start: int, data: memoryview, bounds: Sequence[int]) -> None:
        """Keep the verified segment of the chunk that begins at `start`; its parts have these bounds within it."""
        chunk = self.shape.chunk_at[start]
        first = self.shape.slots[chunk]
        first += (first + bounds[ESCAPES]) % 2
        self.bounds[chunk] = np.asarray(bounds, np.int64) + first
        self.data[first : first + len(data)] = np.frombuffer(data, np.uint8)
