"""The page cache: dropping a file from it, asking the kernel what lies in it, and reading past it. Linux; elsewhere
nothing is dropped, and files are read through it.

The question is put with `mincore`: a `preadv2` with RWF_NOWAIT would start the kernel's readahead and bring pages back.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache
from typing import Any

import numpy as np

DIRECT_ALIGNMENT = 4096  # of offsets, lengths and addresses of direct reads: no device asks for more

_ATTEMPTS = 3  # pages still on a core's way to the LRU lists are skipped the first time
_DIRECT = getattr(os, "O_DIRECT", None)
_REFUSES_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}


def drop(descriptor: int) -> bool:
    """Write back and drop the file's pages; whether none is left in memory."""
    if not hasattr(os, "posix_fadvise"):
        return False
    os.fsync(descriptor)
    for _ in range(_ATTEMPTS):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_pages(descriptor) == 0:
            return True
    return False


def resident_pages(descriptor: int) -> int | None:
    """How many of the file's pages are in memory; None when the kernel does not say."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0
    pages = _residency(descriptor, 0, size)
    return None if pages is None else int(pages.sum())


def lies_in_memory(descriptor: int, offset: int, length: int) -> bool:
    """Whether all pages of a range of the file are in memory, or the kernel does not say. `length` is at least 1."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    pages = _residency(descriptor, offset - before, before + length)
    return pages is None or bool(pages[before // mmap.PAGESIZE :].all())


def open_direct(path: str) -> int | None:
    """A descriptor for reads past the page cache, or None where the file system has none. Raises: OSError."""
    if _DIRECT is None:
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | _DIRECT)
    except OSError as error:
        if error.errno in _REFUSES_DIRECT:
            return None
        raise


def _residency(descriptor: int, offset: int, length: int) -> np.ndarray[Any, np.dtype[np.uint8]] | None:
    """1 for each page of a range that is in memory, 0 for others; None when the kernel does not say. `offset` is where
    a mapping can begin."""
    mincore = _mincore()
    if mincore is None:
        return None
    pages = np.zeros(-(-length // mmap.PAGESIZE), dtype=np.uint8)
    try:
        mapping = mmap.mmap(descriptor, length, access=mmap.ACCESS_COPY, offset=offset)
    except (ValueError, OSError):  # the file ends before, or its file system maps nothing
        return None
    with mapping as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = mincore(
            ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(length), ctypes.c_void_p(pages.ctypes.data)
        )
        del first  # the mapping cannot be closed before
    return None if failed else pages & np.uint8(1)


@cache
def _mincore() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
