"""The page cache: dropping a file from it, asking the kernel what lies in it, and reading past it. Linux; elsewhere
nothing is dropped, and files are read through it.

The question is put with `cachestat`, and to a kernel before 6.5 with `mincore`: that needs a mapping, whose end
interrupts the other cores. A `preadv2` with RWF_NOWAIT would start the kernel's readahead and bring pages back.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from functools import cache
from typing import Any

import numpy as np

DIRECT_ALIGNMENT = 4096  # of offsets, lengths and addresses of direct reads: no device asks for more
READING = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)  # a pipe that lies there is not waited for

_ATTEMPTS = 3  # pages still on a core's way to the LRU lists are skipped the first time
_DIRECT = getattr(os, "O_DIRECT", None)
_CACHESTAT = ctypes.c_long(451)  # its number on all processors that torch and numba know
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
    return _resident_pages(descriptor, 0, size) if size else 0


def lies_in_memory(descriptor: int, offset: int, length: int) -> bool:
    """Whether all pages of a range of the file are in memory, or the kernel does not say. `length` is at least 1."""
    found = _resident_pages(descriptor, offset, length)
    return found is None or found > (offset + length - 1) // mmap.PAGESIZE - offset // mmap.PAGESIZE


def open_direct(path: str) -> int | None:
    """A descriptor for reads past the page cache, or None where the file system has none. Raises: OSError."""
    if _DIRECT is None:
        return None
    try:
        return os.open(path, READING | _DIRECT)
    except OSError as error:
        if error.errno in _REFUSES_DIRECT:
            return None
        raise


def _resident_pages(descriptor: int, offset: int, length: int) -> int | None:
    """How many pages of a range are in memory; None when the kernel does not say."""
    syscall = _syscall()
    if syscall is not None:
        span, counts = (ctypes.c_uint64 * 2)(offset, length), (ctypes.c_uint64 * 5)()  # the first are those in memory
        if not syscall(_CACHESTAT, ctypes.c_uint(descriptor), span, counts, ctypes.c_uint(0)):
            return counts[0]
    return _mapped_pages(descriptor, offset, length)


def _mapped_pages(descriptor: int, offset: int, length: int) -> int | None:
    """`_resident_pages` by `mincore`."""
    mincore, before = _mincore(), offset % mmap.ALLOCATIONGRANULARITY
    if mincore is None:
        return None
    pages = np.zeros(-(-(before + length) // mmap.PAGESIZE), dtype=np.uint8)
    try:
        mapping = mmap.mmap(descriptor, before + length, access=mmap.ACCESS_COPY, offset=offset - before)
    except (ValueError, OSError):  # the file ends before, or its file system maps nothing
        return None
    with mapping as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address, size = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(before + length)
        failed = mincore(address, size, ctypes.c_void_p(pages.ctypes.data))
        del first  # the mapping cannot be closed before
    return None if failed else int((pages[before // mmap.PAGESIZE :] & np.uint8(1)).sum())


@cache
def _mincore() -> Any:
    return getattr(ctypes.CDLL(None, use_errno=True), "mincore", None)


@cache
def _syscall() -> Any:
    """The C library's `syscall` on Linux; called with the interpreter's lock, as a call takes two microseconds."""
    return getattr(ctypes.PyDLL(None), "syscall", None) if sys.platform == "linux" else None
