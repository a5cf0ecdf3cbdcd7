"""One thread for each matrix product of numpy while codecs encode: the store encodes several segments at once already,
and OpenBLAS' own threads would wait for each other, spinning, wherever cores are busy or few.

Where numpy has another library, or the system does not say which, nothing is changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_MAPS = Path("/proc/self/maps")
_PREFIXES = ("scipy_openblas_", "openblas_")
_SUFFIXES = ("64_", "")


class _Threads(NamedTuple):
    """How many threads OpenBLAS uses, and how to say it."""

    get: Callable[[], int]
    set: Callable[[int], None]


_guard = threading.Lock()
_state = {"inside": 0, "before": 1}


@contextlib.contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Inside, in any thread, OpenBLAS uses one thread a call; when the last one leaves, as many as before."""
    threads = _threads()
    if threads is None:
        yield
        return
    with _guard:
        if _state["inside"] == 0:
            _state["before"] = threads.get()
            threads.set(1)
        _state["inside"] += 1
    try:
        yield
    finally:
        with _guard:
            _state["inside"] -= 1
            if _state["inside"] == 0:
                threads.set(_state["before"])


@cache
def _threads() -> _Threads | None:
    """Of the OpenBLAS that numpy has loaded; None where there is none."""
    try:
        lines = _MAPS.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return None
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in lines if "openblas" in line)
    for path in paths:
        with contextlib.suppress(OSError):
            found = _functions(ctypes.CDLL(path))
            if found is not None:
                return found
    return None


def _functions(library: ctypes.CDLL) -> _Threads | None:
    for prefix in _PREFIXES:
        for suffix in _SUFFIXES:
            get = getattr(library, f"{prefix}get_num_threads{suffix}", None)
            put = getattr(library, f"{prefix}set_num_threads{suffix}", None)
            if get is not None and put is not None:
                get.restype, put.argtypes, put.restype = ctypes.c_int, [ctypes.c_int], None
                return _Threads(get, put)
    return None
