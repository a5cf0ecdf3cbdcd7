"""Tile registers of x86 processors (AMX): products of 16 x 32 by 32 x 16 bfloat16, summed in float32.

In: places in memory. Out: instructions in a function under construction. `left` operands are 16 rows of 32 numbers as
they lie in memory; `right` operands are 16 rows of 16 pairs, each pair two neighbouring numbers of the summed axis.
Knows nothing of attention or linear layers.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir

from cag_kernels.cpu.emit import INT8, INT16, INT32, INT64, POINTER, Emitter, Value

TILE = 16  # rows of a tile, pairs in a row of it, and lanes of a vector
DEPTH = 32  # numbers of the summed axis in one product
ROW_BYTES = 64

FEW_TERMS = 4  # of 2 ** f for 0 <= f < 1
_POLYNOMIAL = (0.99992519, 0.69583363, 0.22606727, 0.07802428)  # of least relative error, 7.5e-5

_HALVES = ir.VectorType(INT16, 2 * TILE)
_FLOOR, _CURRENT_DIRECTION = 1, 4  # of vreduceps and of vscalefps
_NUM_TILES = 8
_HALF_LANE = 4  # numbers of 16 bits in half of the 128 bits within which the cheap permutations work
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


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


class TileEmitter(Emitter):
    """Instructions on vectors of 16 float32 and on tiles, which are numbered 0 to 7."""

    def __init__(self, function: ir.Function) -> None:
        require_tiles()
        super().__init__(function, TILE)

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

    def bytes_on_stack(self, count: int) -> Value:
        """Uninitialized memory of the calling function."""
        memory = self.builder.alloca(INT8, size=count)
        memory.align = 64
        memory.type = POINTER
        return memory

    def pairs(self, even: Value, odd: Value) -> Value:
        """Two vectors of finite float32, rounded to the nearest bfloat16 (ties away from zero), lane by lane side by
        side: vector of 16 int32."""
        builder, half = self.builder, self._integers(1 << 15)
        low, high = (builder.add(builder.bitcast(value, self.integers), half) for value in (even, odd))
        rows = [builder.bitcast(value, _HALVES) for value in (builder.lshr(low, self._integers(16)), high)]
        numbers = builder.shuffle_vector(*rows, self._both([i if i % 2 == 0 else i + DEPTH for i in range(DEPTH)]))
        return builder.bitcast(numbers, self.integers)

    def load_pairs(self, even: Value, odd: Value) -> list[Value]:
        """Two places in memory that hold 32 bfloat16 each, number by number side by side: two vectors of 16 int32, of
        the lower and of the upper four numbers of each eight."""
        rows = [self.builder.load(place, typ=_HALVES, align=2) for place in (even, odd)]
        found = []
        for upper in (0, _HALF_LANE):
            near = [2 * lane - lane % _HALF_LANE + upper for lane in range(TILE)]
            lanes = [number + odd for number in near for odd in (0, DEPTH)]
            found.append(self.builder.bitcast(self.builder.shuffle_vector(*rows, self._both(lanes)), self.integers))
        return found

    def narrowed_pairs(self, even: Value, odd: Value) -> Value:
        """Two vectors of float32, rounded to the nearest bfloat16 (ties to even), lane by lane side by side: vector of
        16 int32."""
        both = self._narrowed_both(even, odd)
        lanes = [lane // 2 + TILE * (lane % 2) for lane in range(2 * TILE)]
        return self.builder.bitcast(self.builder.shuffle_vector(both, both, self._both(lanes)), self.integers)

    def narrowed_row(self, low: Value, high: Value) -> Value:
        """32 float32 in order, rounded to bfloat16: vector of 16 int32."""
        return self.builder.bitcast(self._narrowed_both(low, high), self.integers)

    def power_of_two(self, exponent: Value, num_terms: int) -> Value:
        """As `Emitter.power_of_two`; `FEW_TERMS` use what the processor has for it, and give 8e-5."""
        if num_terms != FEW_TERMS:
            return super().power_of_two(exponent, num_terms)
        # 2 ** x = 2 ** floor(x) * 2 ** (x - floor(x)), the second by a polynomial
        fraction = self._masked("reduce.ps.512", exponent, ir.Constant(INT32, _FLOOR))
        result = self.constant(_POLYNOMIAL[-1])
        for coefficient in reversed(_POLYNOMIAL[:-1]):
            result = self.multiply_add(result, fraction, self.constant(coefficient))
        return self._masked("scalef.ps.512", result, exponent)

    def _narrowed_both(self, low: Value, high: Value) -> Value:
        """One behind the other, vector of 32 int16."""
        numbers = self.builder.shuffle_vector(low, high, self._both(range(2 * TILE)))
        narrow = self.builder.fptrunc(numbers, ir.VectorType(_BFloat(), 2 * TILE))
        return self.builder.bitcast(narrow, _HALVES)

    def _both(self, lanes: Sequence[int]) -> Value:
        return ir.Constant(ir.VectorType(INT32, 2 * TILE), list(lanes))

    def _masked(self, name: str, *arguments: Value) -> Value:
        """An instruction of AVX-512 for all lanes, rounding as the thread does."""
        everything, nearest = ir.Constant(INT16, -1), ir.Constant(INT32, _CURRENT_DIRECTION)
        operands = [*arguments, self.constant(0.0), everything, nearest]
        kind = ir.FunctionType(self.vector, [value.type for value in operands])
        function = self.function.module.declare_intrinsic(f"llvm.x86.avx512.mask.{name}", fnty=kind)
        return self.builder.call(function, operands)

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
