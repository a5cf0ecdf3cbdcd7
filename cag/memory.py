"""Memory that is free but not given back: what large arrays of many threads leave in the allocator of the C library."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def return_free_memory() -> None:
    """Give free memory back to the system, where the C library can (glibc); takes milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
