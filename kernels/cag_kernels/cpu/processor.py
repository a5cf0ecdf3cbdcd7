"""What compiled code can do on this machine: whether there is a compiler, and what the processor multiplies."""

from __future__ import annotations

import importlib.util
from functools import cache


@cache
def has_compiler() -> bool:
    """Whether llvmlite works on this machine; loading it takes some 50 ms, once."""
    try:
        import llvmlite.binding  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


@cache
def has_numba() -> bool:
    """Whether numba is there, for the small steps between products and for tails in pages."""
    return importlib.util.find_spec("numba") is not None and has_compiler()


def vector_lanes() -> int:
    """How many float32 numbers a vector of compiled code has on this processor; 8 where nothing can be compiled."""
    if not has_compiler():
        return 8
    from cag_kernels.cpu.attention.panel import host_blocking

    return host_blocking().lanes


def has_tiles() -> bool:
    """Whether compiled code may multiply tiles of bfloat16 (AMX) here."""
    if not has_compiler():
        return False
    from cag_kernels.cpu import tiles as cpu_tiles

    return cpu_tiles.has_tiles()


def has_dots() -> bool:
    """Whether compiled code may multiply vectors of bfloat16 (AVX512_BF16) here."""
    if not has_compiler():
        return False
    from cag_kernels.cpu import dots as cpu_dots

    return cpu_dots.has_dots()


def prefers_dots() -> bool:
    """Whether they are what it multiplies bfloat16 by: tiles do more at once, where there are some."""
    return has_dots() and not has_tiles()


def has_byte_tiles() -> bool:
    """Whether it may multiply tiles of bytes, too."""
    if not has_compiler():
        return False
    from cag_kernels.cpu import tiles as cpu_tiles

    return cpu_tiles.has_byte_tiles()
