"""What the C library keeps of memory that is free: glibc has a heap for each thread, whose free memory no other uses.

Its thresholds grow with the blocks that are freed. After one of 32 MB, as any model frees, blocks up to that size lie
in the heaps, and each heap keeps up to 64 MB of free memory at its end, which `malloc_trim` passes over in all heaps
but that of the first thread. Where the C library is another one, nothing here does anything.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

APART_BYTES = 1 << 20
KEPT_BYTES = 4 << 20  # at the end of each heap: less costs faults where blocks are just below `APART_BYTES`
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_GROWN_BYTES = 32 << 20  # where glibc's own growth ends; twice that for free memory at the end of a heap

_guard = threading.Lock()
_inside = 0


def return_free_memory() -> None:
    """Give free memory back to the system, where the C library can (glibc); takes milliseconds."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Inside, in all threads, blocks from `APART_BYTES` on go back to the system when they are freed, and of smaller
    ones that are free at the end of a heap all but `KEPT_BYTES`.

    Behind the last one who leaves, the thresholds are as high as glibc itself lets them grow, and stay there. What the
    environment says of them (`GLIBC_TUNABLES`, `MALLOC_MMAP_THRESHOLD_`, ...) is left as it is.
    """
    global _inside
    limit = None if _user_decides() else _function("mallopt")
    if limit is None:
        yield
        return
    with _guard:
        _inside += 1
        _set_thresholds(limit, APART_BYTES, KEPT_BYTES)
    return_free_memory()  # a heap that has room is asked before the threshold
    try:
        yield
    finally:
        with _guard:
            _inside -= 1
            if not _inside:
                _set_thresholds(limit, _GROWN_BYTES, 2 * _GROWN_BYTES)


def _set_thresholds(limit: Callable[[int, int], int], mapped_bytes: int, kept_bytes: int) -> None:
    limit(_M_MMAP_THRESHOLD, mapped_bytes)
    limit(_M_TRIM_THRESHOLD, kept_bytes)


def _user_decides() -> bool:
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    return any(name in os.environ for name in names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _function(name: str) -> Any:
    """A function of glibc, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
