"""Dropping a file from the page cache, and asking the kernel whether it is gone. Linux; elsewhere nothing is dropped.

The question is put with `mincore`: a `preadv2` with RWF_NOWAIT would start the kernel's readahead and bring pages back.
"""

from __future__ import annotations

import ctypes
import mmap
import os

_ATTEMPTS = 3  # pages still on a core's way to the LRU lists are skipped the first time


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
    mincore = getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)
    if mincore is None:
        return None
    if size == 0:
        return 0
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first  # the mapping cannot be closed before
    return None if failed else sum(page & 1 for page in pages)
