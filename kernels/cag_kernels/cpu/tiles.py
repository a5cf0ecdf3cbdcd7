"""Tile registers of x86 processors (AMX): products of 16 x 32 by 32 x 16 bfloat16, summed in float32.

In: places in memory. Out: instructions in a function under construction. `left` operands are 16 rows of 32 numbers as
they lie in memory; `right` operands are 16 rows of 16 pairs, each pair two neighbouring numbers of the summed axis.
Knows nothing of attention or linear layers.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir

from cag_kernels.cpu.dots import DotEmitter
from cag_kernels.cpu.emit import INT8, INT64, Value

TILE = 16  # rows of a tile, pairs in a row of it, and lanes of a vector
DEPTH = 32  # numbers of the summed axis in one product
ROW_BYTES = 64

_NUM_TILES = 8
_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA = 158, 0x1023, 18  # Linux: ask once a process before tiles are touched


@cache
def has_tiles() -> bool:
    """Whether this processor multiplies tiles of bfloat16 and the operating system lets this process use them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return False
    features = llvm.get_host_cpu_features()
    if not all(features.get(name, False) for name in ("amx-tile", "amx-bf16", "avx512f", "avx512bf16")):
        return False
    return int(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XTILEDATA)) == 0


def require_tiles() -> None:
    """Ask for tiles before code that uses them runs, whether it is emitted here or was found in a file: without leave
    of the operating system the first tile ends the process.

    Raises: RuntimeError if there are none.
    """
    if not has_tiles():
        raise RuntimeError("this processor has no tiles of bfloat16 (AMX), or this process may not use them")


@cache
def has_byte_tiles() -> bool:
    """Whether tiles of bytes are multiplied, too."""
    return has_tiles() and llvm.get_host_cpu_features().get("amx-int8", False)


class TileEmitter(DotEmitter):
    """Instructions on vectors of 16 float32 and on tiles, which are numbered 0 to 7."""

    def __init__(self, function: ir.Function) -> None:
        require_tiles()
        super().__init__(function)

    @contextmanager
    def configured(self) -> Iterator[None]:
        """Use tiles inside; afterwards the thread has the configuration that it had, which may be a library's."""
        before = self.bytes_on_stack(ROW_BYTES)
        self._call("llvm.x86.sttilecfg", [before])
        self._call("llvm.x86.ldtilecfg", [self._configuration()])
        yield
        self._call("llvm.x86.ldtilecfg", [before])

    def zero(self, tile: int) -> None:
        """A tile of 16 x 16 float32 zeros."""
        self._call("llvm.x86.tilezero", [self._number(tile)])

    def load_tile(self, tile: int, pointer: Value, stride: Value | int = ROW_BYTES) -> None:
        """16 rows of 64 bytes, `stride` bytes apart."""
        self._call("llvm.x86.tileloadd64", [self._number(tile), pointer, self._stride(stride)])

    def store_tile(self, tile: int, pointer: Value, stride: Value | int = ROW_BYTES) -> None:
        """See `load_tile`."""
        self._call("llvm.x86.tilestored64", [self._number(tile), pointer, self._stride(stride)])

    def add_product(self, target: int, left: int, right: int) -> None:
        """`target += left @ right`."""
        self._call("llvm.x86.tdpbf16ps", [self._number(tile) for tile in (target, left, right)])

    def add_byte_product(self, target: int, left: int, right: int) -> None:
        """The same with signed bytes, 64 to a row, and int32 sums; `right` has four neighbouring numbers of the summed
        axis in the place of a pair."""
        self._call("llvm.x86.tdpbssd", [self._number(tile) for tile in (target, left, right)])

    def _configuration(self) -> Value:
        module = self.function.module
        name = "tile_configuration"
        if name not in module.globals:
            palette = [1, 0] + [0] * 14
            row_bytes = [byte for _ in range(_NUM_TILES) for byte in (ROW_BYTES, 0)] + [0] * (2 * _NUM_TILES)
            content = palette + row_bytes + [TILE] * _NUM_TILES + [0] * _NUM_TILES
            kind = ir.ArrayType(INT8, len(content))
            found = ir.GlobalVariable(module, kind, name=name)
            found.initializer = ir.Constant(kind, content)
            found.global_constant, found.linkage, found.align = True, "internal", 64
        return self.builder.gep(module.globals[name], [ir.Constant(INT64, 0)], source_etype=INT8)

    def _stride(self, stride: Value | int) -> Value:
        return self.integer(stride) if isinstance(stride, int) else stride

    def _number(self, tile: int) -> Any:
        assert 0 <= tile < _NUM_TILES
        return ir.Constant(INT8, tile)

    def _call(self, name: str, arguments: list[Value]) -> None:
        module = self.function.module
        if name not in module.globals:
            ir.Function(module, ir.FunctionType(ir.VoidType(), [value.type for value in arguments]), name=name)
        self.builder.call(module.globals[name], arguments)
