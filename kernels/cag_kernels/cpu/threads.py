"""Running one compiled function on several threads: torch's own, which are awake from the products before."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch


def run_on_threads(function: Callable[[Any], None], address: int, call: Any, num_tasks: int) -> None:
    """Run compiled code, of which `address` is the entry, on all of torch's threads; they share out its tasks."""
    num_threads = torch.get_num_threads()
    if num_threads == 1 or num_tasks == 1:
        function(call)
    elif (parallel := openmp_parallel()) is not None:
        # all of torch's threads even for fewer tasks: another size would rebuild the team
        parallel(address, ctypes.addressof(call), num_threads, 0)
    else:
        list(thread_pool(num_threads).map(lambda _: function(call), range(num_threads)))


@cache
def openmp_parallel() -> ctypes._NamedFuncPointer | None:
    """The entry of the OpenMP library that torch has loaded, or None where it is not GNU's."""
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Python threads for where there is no OpenMP of GNU; kept for the life of the process."""
    return ThreadPoolExecutor(num_threads, thread_name_prefix="cag-kernel")
