"""The integer product as vector instructions, in the widest form that this processor has.

With AMX, numbers of 16 bits are split into digits of 8 and multiplied tile by tile; otherwise pairs of 16-bit numbers
are multiplied and added to 32-bit sums. Sums wrap in both, so both give the same bits.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.emitting import (
    BIT,
    FEATURES,
    INT8,
    INT16,
    INT32,
    INT64,
    POINTER,
    array,
    cgutils,
    compiled,
    constant,
    extending,
    intrinsic,
    ir,
    load,
    pointer,
    splat,
    types,
)
from cag_store.codecs.transform.product import DIGIT_STEP, PANEL, ROWS, TILE, pack_digits, pack_rows

_PAIR = 2 * TILE  # tokens whose sums are held in tiles together
_TILE_BYTES = TILE * DIGIT_STEP
_SYSCALL_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def tiles_permitted() -> bool:
    """Whether this process may use AMX: the kernel wants to be asked once."""
    fits = sys.platform == "linux" and os.uname().machine == "x86_64"
    if not (fits and FEATURES.get("amx-tile") and FEATURES.get("amx-int8")):
        return False
    system = ctypes.CDLL(None, use_errno=True)
    return int(system.syscall(_SYSCALL_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)) == 0


def _vector_shape() -> tuple[int, int]:
    """32-bit lanes of a vector, and vectors of a row that are summed together."""
    if FEATURES.get("avx512bw"):
        return 16, 4
    return (8, 2) if FEATURES.get("avx2") else (4, 2)


def _madd(builder: Any, sums: Any, left: Any, right: Any, lanes: int) -> Any:
    """`sums + left.low * right.low + left.high * right.high` on vectors of `lanes` pairs of 16-bit numbers."""
    words, halves = ir.VectorType(INT32, lanes), ir.VectorType(INT16, 2 * lanes)
    if lanes == 16 and FEATURES.get("avx512vnni"):
        return intrinsic(builder, "llvm.x86.avx512.vpdpwssd.512", words, sums, left, right)
    names = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}
    if lanes in names:
        parts = [builder.bitcast(vector, halves) for vector in (left, right)]
        return builder.add(sums, intrinsic(builder, names[lanes], words, *parts))
    by = ir.Constant(words, [16] * lanes)
    high = builder.mul(builder.ashr(left, by), builder.ashr(right, by))
    low = builder.mul(*(builder.ashr(builder.shl(v, by), by) for v in (left, right)))
    return builder.add(sums, builder.add(high, low))


def _emit_panel(builder: Any, arguments: Any) -> None:
    address, step, rows, count, target, row_bytes = arguments
    lanes, vectors = _vector_shape()
    vector = ir.VectorType(INT32, lanes)
    for part in range(0, PANEL, lanes * vectors):
        held = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(ROWS)]
        for slot in (slot for row in held for slot in row):
            builder.store(ir.Constant(vector, [0] * lanes), slot)
        with cgutils.for_range(builder, count, intp=INT64) as loop:
            base = builder.mul(loop.index, INT64(4 * PANEL))
            offsets = [builder.add(base, INT64(4 * (part + lanes * i))) for i in range(vectors)]
            right = [load(builder, rows, offset, vector, 4) for offset in offsets]
            for number, row in enumerate(held):
                offset = builder.add(builder.mul(step, INT64(number)), builder.mul(loop.index, INT64(4)))
                left = splat(builder, load(builder, address, offset, INT32, 4), vector)
                for slot, vectored in zip(row, right, strict=True):
                    builder.store(_madd(builder, builder.load(slot), left, vectored, lanes), slot)
        for number, row in enumerate(held):
            for i, slot in enumerate(row):
                offset = builder.add(builder.mul(row_bytes, INT64(number)), INT64(4 * (part + lanes * i)))
                builder.store(builder.load(slot), pointer(builder, target, offset, vector), align=4)


def _panel(
    typing_context: Any,  # noqa: ARG001
    codes: Any,
    stride: Any,
    packed: Any,
    pairs: Any,
    sums: Any,
    width: Any,
) -> Any:
    """Sums of ROWS tokens by PANEL channels, from addresses; `stride` is in bytes between tokens of codes, `width`
    between those of sums."""
    del codes, stride, packed, pairs, sums, width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _emit_panel(builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6), generate


class _Tiles:
    """Emits AMX instructions; a tile is named by its number."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def _call(self, name: str, *arguments: Any) -> None:
        intrinsic(self.builder, f"llvm.x86.{name}", ir.VoidType(), *arguments)

    def configure(self, address: Any) -> None:
        self._call("ldtilecfg", self.builder.inttoptr(address, POINTER))

    def release(self) -> None:
        self._call("tilerelease")

    def zero(self, *tiles: int) -> None:
        for tile in tiles:
            self._call("tilezero", INT8(tile))

    def load(self, tile: int, base: Any, offset: Any) -> None:
        self._call("tileloadd64", INT8(tile), pointer(self.builder, base, offset, INT8), INT64(DIGIT_STEP))

    def add_product(self, sums: int, left: int, right: int) -> None:
        self._call("tdpbssd", INT8(sums), INT8(left), INT8(right))

    def store(self, tile: int, base: Any, place: int) -> None:
        at = pointer(self.builder, base, INT64(place * 4 * TILE * TILE), INT8)
        self._call("tilestored64", INT8(tile), at, INT64(4 * TILE))


def _emit_digits(builder: Any, arguments: Any) -> None:
    low, high, wide, rows, count, held, target, row_bytes, lines, columns = arguments
    tiles = _Tiles(builder)
    upper, lower, left, right = (0, 1), (2, 3), (4, 5), (6, 7)

    def step(index: Any, codes: Any, products: list[tuple[tuple[int, int], int]]) -> None:
        base = builder.mul(index, INT64(2 * _TILE_BYTES))
        for number in (0, 1):
            offset = builder.add(base, INT64(number * _TILE_BYTES))
            tiles.load(left[number], codes, offset)
            tiles.load(right[number], rows, offset)
        for sums, digit in products:
            for number in (0, 1):
                tiles.add_product(sums[number], left[number], right[digit])

    tiles.zero(*upper, *lower)
    with cgutils.for_range(builder, count, intp=INT64) as loop:
        step(loop.index, low, [(upper, 0), (lower, 1)])
    for number in (0, 1):
        tiles.store(lower[number], held, number)
    tiles.zero(*lower)
    with cgutils.for_range(builder, count, intp=INT64) as loop:
        flag = load(builder, wide, loop.index, INT8, 1)
        with builder.if_then(builder.icmp_unsigned("!=", flag, INT8(0)), likely=False):
            step(loop.index, high, [(lower, 0), (upper, 1)])
    for number in (0, 1):
        tiles.store(upper[number], held, 2 + number)
        tiles.store(lower[number], held, 4 + number)
    _emit_joined(builder, held, target, row_bytes, lines, columns)


def _emit_joined(builder: Any, held: Any, target: Any, row_bytes: Any, lines: Any, columns: Any) -> None:
    """`held[0] + (held[1] << 8) + (held[2] << 16)`, the first `lines` rows and `columns` columns, to the target."""
    vector, mask = ir.VectorType(INT32, TILE), ir.VectorType(BIT, TILE)
    places = ir.Constant(vector, list(range(TILE)))
    inside = builder.icmp_signed("<", places, splat(builder, builder.trunc(columns, INT32), vector))
    with cgutils.for_range(builder, lines, intp=INT64) as loop:
        at = builder.mul(loop.index, INT64(4 * TILE))
        parts = [load(builder, held, builder.add(at, INT64(digit * 8 * TILE * TILE)), vector, 4) for digit in range(3)]
        shifted = [builder.shl(part, constant(vector, 8 * digit)) for digit, part in enumerate(parts)]
        joined = builder.add(shifted[0], builder.add(shifted[1], shifted[2]))
        line = pointer(builder, target, builder.mul(loop.index, row_bytes), vector)
        kind = ir.FunctionType(ir.VoidType(), [vector, line.type, INT32, mask])
        name = f"llvm.masked.store.v{TILE}i32.p0"
        put = cgutils.get_or_insert_function(builder.module, kind, name)
        builder.call(put, [joined, line, INT32(4), inside])


def _digits(
    typing_context: Any,  # noqa: ARG001
    low: Any,
    high: Any,
    wide: Any,
    packed: Any,
    num_steps: Any,
    held: Any,
    target: Any,
    row_bytes: Any,
    lines: Any,
    columns: Any,
) -> Any:
    """Sums of `lines` (at most `_PAIR`) tokens by `columns` (at most TILE) channels, from addresses: low and high
    digits of codes, which steps have high ones, digits of rows, number of steps, scratch int32 `[3, 2, TILE, TILE]`,
    where the sums go, and bytes between their rows."""
    del low, high, wide, packed, num_steps, held, target, row_bytes, lines, columns

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _emit_digits(builder, arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10), generate


def _switch_on(typing_context: Any, address: Any) -> Any:  # noqa: ARG001
    """Configure the tiles of this thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _Tiles(builder).configure(arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _switch_off(typing_context: Any) -> Any:  # noqa: ARG001
    """Give the tiles back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        _Tiles(builder).release()
        return context.get_dummy_value()

    return types.void(), generate


panel, digits, switch_on, switch_off = (
    extending.intrinsic(function) for function in (_panel, _digits, _switch_on, _switch_off)
)


def _by_panels(codes: Any, packed: Any, sums: Any) -> None:
    """`codes` [multiple of ROWS, even], `sums` [as many, multiple of PANEL]; `packed` as `pack_rows` gives it."""
    stride, width = np.int64(2 * codes.shape[1]), np.int64(4 * sums.shape[1])
    pairs = np.int64(packed.shape[1])
    for number in range(packed.shape[0]):
        rows = packed.ctypes.data + number * pairs * 4 * PANEL
        for token in range(0, codes.shape[0], ROWS):
            target = sums.ctypes.data + token * width + number * 4 * PANEL
            panel(np.int64(codes.ctypes.data + token * stride), stride, np.int64(rows), pairs, np.int64(target), width)


def _emit_split(builder: Any, arguments: Any) -> Any:
    """Whole steps of one token; the flag of each step that has high digits is set. Returns the largest high digit, 0 at
    least."""
    codes, num_steps, low, high, wide = arguments
    halves, bytes_ = ir.VectorType(INT16, DIGIT_STEP), ir.VectorType(INT8, DIGIT_STEP)
    by, none = ir.Constant(halves, [8] * DIGIT_STEP), ir.Constant(halves, [0] * DIGIT_STEP)
    largest = cgutils.alloca_once_value(builder, none)
    with cgutils.for_range(builder, num_steps, intp=INT64) as loop:
        part = load(builder, codes, builder.mul(loop.index, INT64(2 * DIGIT_STEP)), halves, 2)
        lower = builder.trunc(part, bytes_)
        carried = builder.lshr(builder.sext(lower, halves), ir.Constant(halves, [15] * DIGIT_STEP))
        upper = builder.add(builder.ashr(part, by), carried)
        at = builder.mul(loop.index, INT64(2 * _TILE_BYTES))
        builder.store(lower, pointer(builder, low, at, bytes_), align=1)
        builder.store(builder.trunc(upper, bytes_), pointer(builder, high, at, bytes_), align=1)
        some = _reduced(builder, "or", builder.sext(builder.icmp_signed("!=", upper, none), halves))
        with builder.if_then(builder.icmp_signed("!=", some, INT16(0)), likely=False):
            builder.store(INT8(1), pointer(builder, wide, loop.index, INT8))
        held = builder.load(largest)
        builder.store(builder.select(builder.icmp_signed(">", upper, held), upper, held), largest)
    return builder.sext(_reduced(builder, "smax", builder.load(largest)), INT64)


def _reduced(builder: Any, name: str, vector: Any) -> Any:
    return intrinsic(builder, f"llvm.vector.reduce.{name}.v{DIGIT_STEP}i16", INT16, vector)


def _split_row(typing_context: Any, codes: Any, num_steps: Any, low: Any, high: Any, wide: Any) -> Any:  # noqa: ARG001
    """Digits of `num_steps * DIGIT_STEP` codes of one token, from addresses; see `_split`."""
    del codes, num_steps, low, high, wide

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return _emit_split(builder, arguments)

    return types.int64(*[types.int64] * 5), generate


split_row = extending.intrinsic(_split_row)


def _split(codes: Any, low: Any, high: Any, wide: Any) -> Any:
    """Codes as digits: `256 * high + low`, laid out in tiles `[pairs of tiles, steps, 2, TILE, DIGIT_STEP]`. False
    where a high digit has more than 8 bits."""
    largest = np.int64(0)
    for token in range(codes.shape[0]):
        pair, half, line = token // _PAIR, token // TILE % 2, token % TILE
        found = split_row(
            np.int64(codes.ctypes.data + token * codes.strides[0]),
            np.int64(low.shape[1]),
            np.int64(low[pair, 0, half, line].ctypes.data),
            np.int64(high[pair, 0, half, line].ctypes.data),
            np.int64(wide[pair].ctypes.data),
        )
        largest = max(largest, found)
    return largest <= 127


def _by_digits(low: Any, high: Any, wide: Any, packed: Any, configuration: Any, sums: Any) -> None:
    """`sums` `[tokens, channels]` from what `_split` and `pack_digits` give."""
    held = np.empty((3, 2, TILE, TILE), np.int32)
    row_bytes = np.int64(4 * sums.shape[1])
    switch_on(np.int64(configuration.ctypes.data))
    for block in range(packed.shape[0]):
        columns = min(TILE, sums.shape[1] - block * TILE)
        for pair in range(low.shape[0]):
            digits(
                np.int64(low[pair].ctypes.data),
                np.int64(high[pair].ctypes.data),
                np.int64(wide[pair].ctypes.data),
                np.int64(packed[block].ctypes.data),
                np.int64(low.shape[1]),
                np.int64(held.ctypes.data),
                np.int64(sums.ctypes.data + pair * _PAIR * row_bytes + 4 * TILE * block),
                row_bytes,
                np.int64(min(_PAIR, sums.shape[0] - pair * _PAIR)),
                np.int64(columns),
            )
    switch_off()


_I8, _I16, _I32 = types.int8, types.int16, types.int32
_panel_loop = compiled(_by_panels, types.void(array(_I16, 2), array(_I16, 4), array(_I32, 2)))
_split_loop = compiled(
    _split,
    types.boolean(types.Array(_I16, 2, "A"), array(_I8, 5), array(_I8, 5), array(_I8, 2)),
)


def _compiled_tiles() -> Any:
    """The loop over tiles where this process may use them, or None."""
    if not tiles_permitted():
        return None
    arguments = array(_I8, 5), array(_I8, 5), array(_I8, 2), array(_I8, 5), array(types.uint8, 1)
    return compiled(_by_digits, types.void(*arguments, array(_I32, 2)))


_tile_loop = _compiled_tiles()


def _tile_configuration() -> NDArray[np.uint8]:
    """Palette 1: all eight tiles have TILE rows of DIGIT_STEP bytes."""
    found = np.zeros(64, np.uint8)
    found[0] = 1
    found[16:32:2] = DIGIT_STEP
    found[48:56] = TILE
    return found


_CONFIGURATION = _tile_configuration()


class PackedRows:
    """Rows `[num_components, num_channels]` as the product reads them."""

    def __init__(self, rows: NDArray[np.int16]) -> None:
        self.num_channels = rows.shape[1]
        self.digits = None if _tile_loop is None else pack_digits(rows)
        self._rows = rows

    @cached_property
    def panels(self) -> NDArray[np.int16]:
        """For processors without tiles."""
        return pack_rows(self._rows)


class Operand:
    """Codes of a segment as the product reads them: rows `[:num_tokens, :num_components]` of a `code_buffer`."""

    def __init__(self, buffer: NDArray[np.int16], num_tokens: int, num_components: int) -> None:
        self.buffer, self.num_tokens = buffer, num_tokens
        self.digits: tuple[NDArray[np.int8], NDArray[np.int8], NDArray[np.int8]] | None = None
        if _tile_loop is not None:
            shape = -(-num_tokens // _PAIR), -(-num_components // DIGIT_STEP)
            low, high = (np.empty((*shape, 2, TILE, DIGIT_STEP), np.int8) for _ in range(2))
            low[-1:] = high[-1:] = 0  # where tokens are missing
            wide = np.zeros(shape, np.int8)
            if not num_components or _split_loop(buffer[:num_tokens], low, high, wide):
                self.digits = low, high, wide


def integer_product(operand: Operand, packed: PackedRows) -> NDArray[np.int32]:
    """`[num_tokens, num_channels]`: as `product.product_reference`."""
    if operand.digits is not None and packed.digits is not None:
        sums = np.empty((operand.num_tokens, packed.num_channels), np.int32)
        _tile_loop(*operand.digits, packed.digits, _CONFIGURATION, sums)
        return sums
    num_rows = -(-operand.num_tokens // ROWS) * ROWS
    sums = np.empty((num_rows, -(-packed.num_channels // PANEL) * PANEL), np.int32)
    _panel_loop(operand.buffer[:num_rows], packed.panels, sums)
    return sums[: operand.num_tokens, : packed.num_channels]
