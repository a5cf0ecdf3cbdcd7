"""Memory for encoded bytes on their way: page-aligned, as reads past the page cache want it, and used again.

The first touch of fresh memory costs a fault a page, which took as long as reading.
"""

from __future__ import annotations

import contextlib
import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

HUGE_PAGE_BYTES = 2 << 20


class Scratch:
    """Mappings of memory, of which the last `keep` that came free are kept. Safe with several threads."""

    def __init__(self, keep: int) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[memoryview]:
        """At least `num_bytes` of any content, which begin at a page; nobody else's until the end."""
        memory = self._found(num_bytes)
        try:
            yield memoryview(memory)
        finally:
            self._free.append(memory)

    def _found(self, num_bytes: int) -> mmap.mmap:
        with contextlib.suppress(IndexError):
            memory = self._free.pop()
            if len(memory) >= num_bytes:
                return memory  # one that is too small is given up
        return huge_mapping(-(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)


def huge_mapping(num_bytes: int) -> mmap.mmap:
    """Fresh memory of the process, of any content, in huge pages where the system has them."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    # private: shared memory gets huge pages only where the system's administrator allows them
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
