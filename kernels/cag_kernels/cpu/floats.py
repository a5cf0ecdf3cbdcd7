"""Which types of numbers compiled code reads from memory and widens to float32: of keys, values and weights."""

from __future__ import annotations

import importlib
from functools import cache

import torch

from cag_kernels.prefixes import FLOATS


@cache
def reads_floats(dtype: torch.dtype) -> bool:
    """Whether compiled code reads numbers of a type on this processor; asks the compiler, which must be there.

    All processors with vectors of eight numbers widen float16; without an instruction for it LLVM calls functions that
    nobody has to have.
    """
    import llvmlite.binding as llvm  # type: ignore[import-untyped]

    if dtype == torch.float16:
        features = llvm.get_host_cpu_features()
        return bool(features.get("f16c", False) or features.get("fullfp16", False))
    return dtype in FLOATS


def loops_read_floats(dtype: torch.dtype) -> bool:
    """The same of the loops that numba compiles, which must be there. They are for its own target: another processor
    than this one where somebody has named one (`NUMBA_CPU_NAME`, `NUMBA_CPU_FEATURES`)."""
    named = importlib.import_module("numba").config.CPU_FEATURES  # None: those of this processor
    widens = named is None or not {"+f16c", "+fullfp16"}.isdisjoint(named.split(","))
    return reads_floats(dtype) and (dtype != torch.float16 or widens)
