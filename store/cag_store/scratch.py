"""Memory apart from the allocator of the C library: page-aligned, used again or given back whole.

The first touch of fresh memory costs a fault a page, which took as long as reading: what is on its way is used again.
And glibc keeps a heap for each thread, in which arrays of megabytes that live long lie between others that do not: the
holes that these leave serve no other thread, and were a fifth of the memory of a build.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

HUGE_PAGE_BYTES = 2 << 20
_ALIGNED = 64  # bytes: an array begins with a line of the processor's cache


class Scratch:
    """Mappings of memory, of which the last `keep` that came free are kept, or all, which are as many as there were
    users at once. Safe with several threads."""

    def __init__(self, keep: int | None = None) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    @contextmanager
    def taken(self, num_bytes: int) -> Iterator[memoryview]:
        """At least `num_bytes` of any content, which begin at a page; nobody else's until the end."""
        memory = self._found(num_bytes)
        try:
            yield memoryview(memory)
        finally:
            self._free.append(memory)

    @contextmanager
    def arrays(self, *kinds: tuple[tuple[int, ...], DTypeLike]) -> Iterator[list[NDArray[Any]]]:
        """Uninitialized arrays, each of a shape and a dtype, side by side; nobody else's until the end."""
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in kinds]
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] - (-size // _ALIGNED) * _ALIGNED)
        with self.taken(bounds.pop()) as memory:
            yield [np.ndarray(shape, dtype, memory, begin) for begin, (shape, dtype) in zip(bounds, kinds, strict=True)]

    def _found(self, num_bytes: int) -> mmap.mmap:
        with contextlib.suppress(IndexError):
            memory = self._free.pop()
            if len(memory) >= num_bytes:
                return memory  # one that is too small is given up
        return huge_mapping(-(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES)


def mapped_array(shape: tuple[int, ...], dtype: DTypeLike, *, huge: bool = True) -> NDArray[Any]:
    """Zeros in a mapping of their own, which the system has back as soon as nobody refers to them. For arrays of
    megabytes; without `huge` pages, what is not touched takes no memory."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    if not num_bytes:
        return np.zeros(shape, dtype)
    return np.ndarray(shape, dtype, huge_mapping(num_bytes) if huge else _mapping(num_bytes))


def huge_mapping(num_bytes: int) -> mmap.mmap:
    """Fresh memory of the process, of any content, in huge pages where the system has them."""
    memory = _mapping(num_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _mapping(num_bytes: int) -> mmap.mmap:
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, num_bytes)
    # private: shared memory gets huge pages only where the system's administrator allows them
    return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
