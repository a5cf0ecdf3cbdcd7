"""Where the parts of a segment of grouped integers lie (docs/format.md 5.2): found once a shape, not a segment."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import corrupt_segment
from cag_store.errors import CorruptEntry

HEAD = struct.Struct("<BBHII")


class SegmentPlace(NamedTuple):
    """Of a segment with codes alone: its head and length; for each part of a `CodedSide` its number, where the chunk
    begins in a head of it (bytes), where a head's part begins in the segment, and bytes a head."""

    head: bytes
    num_bytes: int
    parts: tuple[tuple[int, int, int, int], ...]
    offsets_at: int
    codes_at: int
    num_scales: int
    groups: tuple[int, int]

    def checks(self, address: int) -> list[tuple[int, int, int]]:
        """What `Loops.copy_checked` checks of a segment at an address."""
        return [(address + HEAD.size, self.num_scales, 1), (address + self.offsets_at, self.num_scales, 0)]


def bad_scales() -> CorruptEntry:
    """The error for scales or offsets that a check refused."""
    return corrupt_segment("scales and offsets", "finite, no scale below 0", "others")


def table(rows: list[tuple[int, int, int]]) -> NDArray[np.int64]:
    """Rows of spans or checks as `Loops.copy_checked` takes them."""
    return np.array(rows, np.int64).reshape(-1, 3)
