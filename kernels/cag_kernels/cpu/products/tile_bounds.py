"""Bounds of a linear layer's outputs from 8 bits of its weight, by tile products of bytes (AMX).

A weight in codes lies as tiles want it, so it streams through once; a row is two times 8 bits, so that what is lost
is the weight's. Sums are exact int32. From each come an upper and a lower bound of what the exact product gives
(`cpu.products.codes`): all upper bounds are written, of the lower ones only the largest is kept.
"""

from __future__ import annotations

import threading
from functools import cache

from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.emit import INT8, INT32, LINE_BYTES, POINTER, SECOND_CACHE, Value
from cag_kernels.cpu.fields import Fields
from cag_kernels.cpu.products.bounds import Field, share_bounds
from cag_kernels.cpu.products.codes import DEPTH, LANES, ROWS, SHIFT
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.tape import CompiledStep
from cag_kernels.cpu.team import Share
from cag_kernels.cpu.tiles import TileEmitter, require_tiles

GROUPS = 2  # of features at once: two sums under way
TILE_BYTES = LANES * DEPTH
_AHEAD = 8  # tiles ahead of which codes are asked for
_OF_ROWS, _OF_CODES = 2, 3  # tiles 0 and 1 hold sums

_lock = threading.Lock()


def compiled_bounds(memory: tuple[Tensor, ...], num_rows: int, num_steps: int, num_groups: int) -> None:
    """Serve one call for at least `GROUPS` groups; `memory` are the tensors of `Field` in order."""
    share_bounds(compiled_kernel(), memory, (num_rows, num_steps, num_groups), TILE_BYTES, GROUPS)


def compiled_kernel() -> CompiledStep:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> CompiledStep:
    require_tiles()
    program = Program(tile_bounds_module)
    return CompiledStep(program.address("bounds"), program)


def tile_bounds_module() -> ir.Module:
    """Module with `bounds`, of one pointer to the fields of a call."""
    module = ir.Module(name="tile_bounds")
    _Bounds(module)
    return module


class _Bounds:
    """The function that threads run: unit by unit, two groups of features at a time, of these all rows."""

    def __init__(self, module: ir.Module) -> None:
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name="bounds")
        self.emit = TileEmitter(self.function)
        self.fields = Fields(self.emit, list(Field)[1:], range(Field.ROWS, Field.LOWERS + 1))
        emit, builder = self.emit, self.emit.builder
        num_groups = self.fields[Field.NUM_GROUPS]
        with emit.configured():
            self.sums = [emit.bytes_on_stack(4 * LANES * LANES) for _ in range(GROUPS)]
            share = Share(emit, num_groups, emit.integer(GROUPS))
            with share.units(emit, self.fields.place(Field.NEXT_TASK)) as unit:
                start = builder.mul(unit, share.size)
                stop = emit.minimum(builder.add(start, share.size), num_groups)
                with emit.loop(start, stop, GROUPS) as block:
                    # the last groups begin early enough to be whole; what is computed again is the same
                    group = emit.minimum(block.index, builder.sub(num_groups, emit.integer(GROUPS)))
                    with emit.loop(emit.integer(0), self._rounded_up(Field.NUM_ROWS, ROWS), 1) as tile:
                        self._emit_sums(group, tile.index)
                        self._emit_bounds(group, tile.index, unit)
        builder.ret_void()

    def _rounded_up(self, field: Field, size: int) -> Value:
        return self.emit.rounded_up(self.fields[field], self.emit.integer(size))

    def _tiles(self, field: Field, first: Value) -> Value:
        """Address of the first of `num_steps` tiles."""
        index = self.emit.builder.mul(first, self.fields[Field.NUM_STEPS])
        return self.emit.at(self.fields[field], self.emit.builder.mul(index, self.emit.integer(TILE_BYTES)), INT8)

    def _emit_sums(self, group: Value, row_tile: Value) -> None:
        """All rows of a tile by two groups of features, to `sums`."""
        emit, builder = self.emit, self.emit.builder
        left = self._tiles(Field.ROWS, row_tile)
        codes = [self._tiles(Field.CODES, builder.add(group, emit.integer(index))) for index in range(GROUPS)]
        for index in range(GROUPS):
            emit.zero(index)
        with emit.loop(emit.integer(0), self.fields[Field.NUM_STEPS], 1) as step:
            offset = builder.mul(step.index, emit.integer(TILE_BYTES))
            emit.load_tile(_OF_ROWS, emit.at(left, offset, INT8))
            for index, place in enumerate(codes):
                tile = emit.at(place, offset, INT8)
                for line in range(0, TILE_BYTES, LINE_BYTES):
                    emit.prefetch(emit.at(tile, _AHEAD * TILE_BYTES + line, INT8), near=SECOND_CACHE)
                emit.load_tile(_OF_CODES + index, tile)
                emit.add_byte_product(index, _OF_ROWS, _OF_CODES + index)
        for index, place in enumerate(self.sums):
            emit.store_tile(index, place)

    def _emit_bounds(self, group: Value, row_tile: Value, unit: Value) -> None:
        emit, builder = self.emit, self.emit.builder
        first = builder.mul(row_tile, emit.integer(ROWS))
        num_rows = self.fields[Field.NUM_ROWS]
        count = emit.minimum(builder.sub(num_rows, first), emit.integer(ROWS))
        facts = [self._features(field, group) for field in (Field.SCALES, Field.ERRORS, Field.NORMS)]
        with emit.loop(emit.integer(0), count, 1) as place:
            row = builder.add(first, place.index)
            own = emit.at(self.fields[Field.ROW_FACTS], builder.mul(row, emit.integer(3)))
            scale, norm, lost = (emit.spread(emit.at(own, index)) for index in range(3))
            lowest = builder.add(builder.mul(unit, num_rows), row)
            lowest_at = emit.at(self.fields[Field.LOWERS], builder.mul(lowest, emit.integer(LANES)))
            lowers = emit.load(lowest_at)
            for index in range(GROUPS):
                line = builder.add(builder.mul(builder.add(group, emit.integer(index)), num_rows), row)
                upper_at = emit.at(self.fields[Field.UPPERS], builder.mul(line, emit.integer(LANES)))
                scales, errors, norms = (found[index] for found in facts)
                value = builder.fmul(self._sum(index, place.index), builder.fmul(scales, scale))
                margin = emit.multiply_add(errors, norm, builder.fmul(norms, lost))
                emit.store(builder.fadd(value, margin), upper_at)
                lowers = emit.larger(builder.fsub(value, margin), lowers)
            emit.store(lowers, lowest_at)

    def _sum(self, index: int, place: Value) -> Value:
        """Of one row, over 16 features: of its upper and of its lower halves, in float32."""
        emit, builder = self.emit, self.emit.builder
        start = emit.at(self.sums[index], builder.mul(place, emit.integer(2 * LANES)), INT32)
        upper, lower = (
            builder.sitofp(emit.load_integers(emit.at(start, half * LANES, INT32)), emit.vector) for half in range(2)
        )
        return emit.multiply_add(upper, emit.constant(float(1 << SHIFT)), lower)

    def _features(self, field: Field, group: Value) -> list[Value]:
        """What is known of the features of two groups."""
        start = self.emit.at(self.fields[field], self.emit.builder.mul(group, self.emit.integer(LANES)))
        return [self.emit.load(self.emit.at(start, index * LANES)) for index in range(GROUPS)]
