"""Bounds of a linear layer's outputs from 8 bits of its weight, by products of pairs (`cpu.pairs`).

A weight in codes streams through once; a row has as many bits as its sums leave room for, so that what is lost is the
weight's. Sums are exact int32. From each come an upper and a lower bound of what the exact product gives
(`cpu.products.codes`): all upper bounds are written, of the lower ones only the largest is kept.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from functools import cache

from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.attention.panel import host_blocking
from cag_kernels.cpu.emit import INT16, INT32, INT64, POINTER, Emitter, Value
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.pairs import emit_pairs
from cag_kernels.cpu.passes import emit_passes
from cag_kernels.cpu.products.codes import LANES, QUAD
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.tape import CompiledStep, Reads, new_call
from cag_kernels.cpu.team import Share

MOST_ROWS = 32  # of a call
PASS_ROWS = {16: 12, 8: 5}  # lanes of a register -> rows whose sums fit the registers beside the codes
QUAD_BYTES = QUAD * LANES  # of the codes of a group of features: a line
_AHEAD = 128  # quads ahead of which codes are asked for
_BYTE = 8  # bits

_lock = threading.Lock()


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code, by pairs or by tiles
    (`cpu.products.tile_bounds`); all but counts are addresses."""

    NEXT_TASK = 0
    ROWS = 1  # what `cpu.products.codes.split_pairs`, or `split` for tiles, made of rows
    ROW_FACTS = 2  # [num_rows, 3] float32
    CODES = 3  # [num_groups, num_steps, bytes of a step] int8, as `cpu.products.codes.encode` lays them
    SCALES = 4  # [num_groups * LANES] float32, as the next two
    ERRORS = 5
    NORMS = 6
    UPPERS = 7  # [num_groups, num_rows, LANES] float32
    LOWERS = 8  # [MAX_UNITS, num_rows, LANES] float32, -infinity before the call
    NUM_ROWS = 9
    NUM_STEPS = 10  # along the summed axis: quads, or products of tiles
    NUM_GROUPS = 11


def compiled_bounds(memory: tuple[Tensor, ...], num_rows: int, num_quads: int, num_groups: int) -> None:
    """Serve one call for at most `MOST_ROWS` rows; `memory` are the tensors of `Field` in order."""
    share_bounds(compiled_kernel(), memory, (num_rows, num_quads, num_groups), QUAD_BYTES)


def share_bounds(
    step: CompiledStep, memory: tuple[Tensor, ...], counts: tuple[int, int, int], step_bytes: int, groups: int = 1
) -> None:
    """Let threads share out the groups of a call, so many at once; `counts` are those of `Field`, `step_bytes` those of
    the codes of a group in one step along the summed axis."""
    pointers = [tensor.data_ptr() for tensor in memory]
    _, num_steps, num_groups = counts
    reads = Reads(pointers[Field.CODES - 1], num_groups, num_steps * step_bytes, groups)
    step.shared(new_call((0, *pointers, *counts), memory), -(-num_groups // groups), reads)


def compiled_kernel() -> CompiledStep:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> CompiledStep:
    program = Program(bounds_module, host_blocking().lanes)
    return CompiledStep(program.address("bounds"), program)


def bounds_module(lanes: int) -> ir.Module:
    """Module with `bounds`, of one pointer to the fields of a call."""
    module = ir.Module(name="bounds")
    passes = [_Pass(module, lanes, rows).function for rows in range(1, PASS_ROWS[lanes] + 1)]
    _Bounds(module, lanes, passes)
    return module


class _Pass:
    """Sums of `rows` rows by a group of features.

    Arguments: the group's codes, the first row's pairs, where sums go (`[rows, LANES]` int32), and the number of quads.
    """

    def __init__(self, module: ir.Module, lanes: int, rows: int) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 3 + [INT64])
        self.function = ir.Function(module, kind, name=f"rows_{rows}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, lanes)
        self.vectors, self.rows = range(LANES // lanes), range(rows)
        self.codes, self.pairs, self.out, self.num_quads = self.function.args
        self._emit_sums()

    def _emit_sums(self) -> None:
        emit, builder = self.emit, self.emit.builder
        nothing = [ir.Constant(emit.integers, [0] * emit.lanes)] * (len(self.rows) * len(self.vectors))
        with emit.loop(emit.integer(0), self.num_quads, 1, nothing) as quad:
            codes = self._halves(quad.index)
            sums = list(quad.values)
            for row in self.rows:
                place = builder.add(builder.mul(self.num_quads, emit.integer(row)), quad.index)
                for half in range(2):
                    pair = emit.at(emit.at(self.pairs, builder.mul(place, emit.integer(2)), INT32), half, INT32)
                    numbers = emit.spread_integer(builder.load(pair, typ=INT32, align=4))
                    for vector in self.vectors:
                        index = row * len(self.vectors) + vector
                        sums[index] = builder.add(sums[index], emit_pairs(emit, codes[half][vector], numbers))
            quad.following = sums
        for index, value in enumerate(quad.following):
            emit.store(value, emit.at(self.out, index * emit.lanes, INT32))
        builder.ret_void()

    def _halves(self, quad: Value) -> list[list[Value]]:
        """Codes 0 and 2, then codes 1 and 3 of a quad of all features, as pairs of int16; later ones are asked for."""
        emit, builder = self.emit, self.emit.builder
        place = emit.at(self.codes, builder.mul(quad, emit.integer(LANES)), INT32)
        emit.prefetch(emit.at(place, _AHEAD * LANES, INT32))
        shorts = ir.VectorType(INT16, 2 * emit.lanes)
        byte = ir.Constant(shorts, [_BYTE] * (2 * emit.lanes))
        loads = [emit.load_integers(emit.at(place, vector * emit.lanes, INT32)) for vector in self.vectors]
        whole = [builder.bitcast(load, shorts) for load in loads]
        return [[builder.ashr(builder.shl(part, byte), byte) for part in whole], [builder.ashr(p, byte) for p in whole]]


class _Bounds:
    """The function that threads run: unit by unit, group by group, of each all rows."""

    def __init__(self, module: ir.Module, lanes: int, passes: list[ir.Function]) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name="bounds")
        self.emit = Emitter(self.function, lanes)
        self.passes = passes
        self.fields = Fields(self.emit, list(Field)[1:], range(Field.ROWS, Field.LOWERS + 1))
        emit, builder = self.emit, self.emit.builder
        num_groups = self.fields[Field.NUM_GROUPS]
        self.sums = emit.scratch(MOST_ROWS * LANES)
        share = Share(emit, num_groups, emit.integer(1))
        with share.units(emit, self.fields.place(Field.NEXT_TASK)) as unit:
            start = builder.mul(unit, share.size)
            stop = emit.minimum(builder.add(start, share.size), num_groups)
            with emit.loop(start, stop, 1) as group:
                self._emit_sums(group.index)
                self._emit_bounds(group.index, unit)
        builder.ret_void()

    def _emit_sums(self, group: Value) -> None:
        """All rows by a group of features, to `sums`."""
        emit, builder, num_quads = self.emit, self.emit.builder, self.fields[Field.NUM_STEPS]
        index = builder.mul(builder.mul(group, num_quads), emit.integer(LANES))
        codes = emit.at(self.fields[Field.CODES], index, INT32)

        def arguments(row: Value) -> list[Value]:
            pairs = emit.at(self.fields[Field.ROWS], builder.mul(builder.mul(row, num_quads), emit.integer(2)), INT32)
            return [codes, pairs, emit.at(self.sums, builder.mul(row, emit.integer(LANES))), num_quads]

        emit_passes(emit, self.fields[Field.NUM_ROWS], self.passes, arguments)

    def _emit_bounds(self, group: Value, unit: Value) -> None:
        emit, builder, num_rows = self.emit, self.emit.builder, self.fields[Field.NUM_ROWS]
        first = builder.mul(group, emit.integer(LANES))
        with emit.loop(emit.integer(0), num_rows, 1) as row:
            own = emit.at(self.fields[Field.ROW_FACTS], builder.mul(row.index, emit.integer(3)))
            scale, norm, lost = (emit.spread(emit.at(own, index)) for index in range(3))
            places = [
                builder.mul(builder.add(builder.mul(index, num_rows), row.index), emit.integer(LANES))
                for index in (group, unit)
            ]
            sums = emit.at(self.sums, builder.mul(row.index, emit.integer(LANES)))
            for lane in range(0, LANES, emit.lanes):
                scales, errors, norms = (
                    emit.load(emit.at(self.fields[field], builder.add(first, emit.integer(lane))))
                    for field in (Field.SCALES, Field.ERRORS, Field.NORMS)
                )
                total = builder.sitofp(emit.load_integers(emit.at(sums, lane)), emit.vector)
                value = builder.fmul(total, builder.fmul(scales, scale))
                margin = emit.multiply_add(errors, norm, builder.fmul(norms, lost))
                upper_at, lowest_at = (
                    emit.at(emit.at(self.fields[field], place), lane)
                    for field, place in zip((Field.UPPERS, Field.LOWERS), places, strict=True)
                )
                emit.store(builder.fadd(value, margin), upper_at)
                emit.store(emit.larger(builder.fsub(value, margin), emit.load(lowest_at)), lowest_at)
