"""The gated middle of a layer over a few rows by tile products (AMX): `down(silu(gate(x)) * up(x))` in three steps,
or with the tanh form of GELU in the place of SiLU.

A task multiplies the same 16 features of gate and up, so their sums meet in tiles: gated and rounded there, they are
already turned as the next product wants them. Nothing of the middle is written in float32, and no step turns it.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.emit import INT32, Value
from cag_kernels.cpu.products import tile_linear as cpu_tile_linear
from cag_kernels.cpu.products.tile_linear import no_bias, pairs_size
from cag_kernels.cpu.products.tile_product import Field, ProductCall, emit_blocks, emit_sums
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.rows import GELU_CUBIC, GELU_LINEAR
from cag_kernels.cpu.tape import CompiledStep, Reads, new_call, scratch_memory
from cag_kernels.cpu.tiles import DEPTH, TILE, require_tiles

_lock = threading.Lock()


def serves(gate_and_up: Tensor, down: Tensor) -> bool:
    """Whether `TileMlp` takes these bfloat16 weights, on this processor."""
    fit = gate_and_up.shape[0] == 2 * down.shape[1] and down.shape[1] % DEPTH == 0
    return fit and cpu_tile_linear.serves(gate_and_up) and cpu_tile_linear.serves(down)


class TileMlp:
    """The middle of a layer with its weights, made ready once. `linear.tile_mlp_reference` says what it means."""

    def __init__(self, gate_and_up: Tensor, down: Tensor, activation: str = "silu") -> None:
        """gate_and_up: `[2 * size, in_features]` bfloat16, gate first; down: `[out_features, size]` bfloat16;
        activation: of `rows_reference.ACTIVATIONS`."""
        self.in_features, (self.out_features, self.size) = gate_and_up.shape[1], down.shape
        self._gate_and_up, self._down, self._activation = gate_and_up, down, activation

    def __call__(self, rows: Tensor) -> Tensor:
        """`[num_rows, in_features]` float32, contiguous and not empty, to `[num_rows, out_features]`."""
        out = rows.new_empty(len(rows), self.out_features)
        self.into(rows, out)
        return out

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The same, to `out`."""
        num_rows = len(rows)
        sizes = pairs_size(num_rows, self.in_features), pairs_size(num_rows, self.size)
        turned, gated = torch.split_with_sizes(scratch_memory(sum(sizes)), sizes)
        gate = self._call(rows, turned, self._gate_and_up, gated, (num_rows, self.in_features, self.size))
        down = self._call(rows, gated, self._down, out, (num_rows, self.size, self.out_features))
        linear = cpu_tile_linear.compiled_kernel()
        linear.prepare(gate)
        reads = Reads(self._gate_and_up.data_ptr(), self.size, 2 * self.in_features, TILE)
        compiled_gate(self._activation).shared(gate, -(-self.size // TILE), reads)
        linear.multiply(down)

    def _call(self, rows: Tensor, pairs: Tensor, weight: Tensor, out: Tensor, sizes: tuple[int, ...]) -> Any:
        memory = (rows, pairs, weight, no_bias(self.out_features), out)
        return new_call((0, *(tensor.data_ptr() for tensor in memory), *sizes), memory)


def compiled_gate(activation: str) -> CompiledStep:
    """The step between the two products' blocks, compiled once a process."""
    with _lock:
        return _compile(activation)


@cache
def _compile(activation: str) -> CompiledStep:
    require_tiles()
    program = Program(tile_gate_module, activation)
    return CompiledStep(program.address("gate"), program)


def tile_gate_module(activation: str) -> ir.Module:
    """Module with `gate`, of one pointer to the fields of a call: `OUT` is `[row tiles, out_features / 2, 16]` pairs of
    bfloat16, and the weight has twice `OUT_FEATURES` rows, those of gate first."""
    module = ir.Module(name="tile_gate")
    _emit_gate(ProductCall(module, "gate"), activation)
    return module


def _emit_gate(call: ProductCall, activation: str) -> None:
    emit, builder = call.emit, call.emit.builder
    with emit.configured():
        sums_of = [emit.bytes_on_stack(4 * TILE * TILE) for _ in range(2)]

        def emit_block(first: Value, row_tiles: list[Value], following: Value | None) -> None:
            ahead = None if following is None else _of_both(call, following)
            gates, ups = emit_sums(call, _of_both(call, first), row_tiles, ahead)
            for row_tile, *tiles in zip(row_tiles, gates, ups, strict=True):
                for tile, place in zip(tiles, sums_of, strict=True):
                    emit.store_tile(tile, place)
                _emit_pairs(call, first, row_tile, sums_of, activation)

        emit_blocks(call, TILE, emit_block)
    builder.ret_void()


def _of_both(call: ProductCall, feature: Value) -> list[Value]:
    """A feature of gate and the same one of up, as rows of the weight."""
    return [feature, call.emit.builder.add(feature, call[Field.OUT_FEATURES])]


def _emit_pairs(call: ProductCall, first: Value, row_tile: Value, sums_of: list[Value], activation: str) -> None:
    """Sums of gate and up, `[16 features, 16 rows]` each, to pairs of gated features."""
    emit, builder = call.emit, call.emit.builder
    index = builder.add(builder.mul(row_tile, call[Field.OUT_FEATURES]), first)
    target = emit.at(call[Field.OUT], builder.mul(index, emit.integer(TILE // 2)), INT32)
    for feature in range(0, TILE, 2):
        even, odd = (_gated(call, sums_of, feature + step, activation) for step in range(2))
        builder.store(emit.narrowed_pairs(even, odd), emit.at(target, feature // 2 * TILE, INT32), align=4)


def _gated(call: ProductCall, sums_of: list[Value], feature: int, activation: str) -> Value:
    """`activation(gate) * up` of one feature, rows in the lanes."""
    emit, builder = call.emit, call.emit.builder
    gate, up = (emit.load(emit.at(place, feature * TILE)) for place in sums_of)
    inner = gate if activation == "silu" else _inner_of_gelu(call, gate)
    # exp(-|inner|) is at most 1; sigmoid(inner) is 1 / (1 + it) or it / (1 + it)
    shrunk = emit.exponential(builder.fneg(emit.magnitude(inner)))
    is_negative = builder.fcmp_ordered("<", inner, emit.constant(0.0))
    share = builder.fdiv(
        builder.select(is_negative, shrunk, emit.constant(1.0)), builder.fadd(shrunk, emit.constant(1.0))
    )
    return builder.fmul(builder.fmul(gate, share), up)


def _inner_of_gelu(call: ProductCall, gate: Value) -> Value:
    """What the sigmoid is of, as in `cpu.rows.gate_by_gelu`."""
    emit, builder = call.emit, call.emit.builder
    square = builder.fmul(gate, gate)
    cubic = emit.multiply_add(square, emit.constant(GELU_CUBIC), emit.constant(GELU_LINEAR))
    return builder.fmul(gate, cubic)
