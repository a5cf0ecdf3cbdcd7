"""The types of numbers that compiled code reads from memory and widens to float32: keys, values and weights.

Names and sizes only; what they are as instructions is in `cpu.emit`, and in `cpu.rows` for numba.
"""

from __future__ import annotations

from enum import Enum
from functools import cache

import torch


class FloatType(Enum):
    """A type by the name that torch gives it."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @classmethod
    def of(cls, dtype: torch.dtype) -> FloatType:
        """Raises: ValueError: compiled code reads no such numbers."""
        return cls(str(dtype).removeprefix("torch."))

    @property
    def num_bytes(self) -> int:
        """Of one number."""
        return 4 if self is FloatType.FLOAT32 else 2


DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    return dtype in DTYPES
