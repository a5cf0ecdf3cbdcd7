"""A linear layer over a few rows by tile products (AMX), over a bfloat16 weight as it lies in the checkpoint.

Nothing is packed beforehand, so blocks of prefill keep the library's product on the same memory
(`cpu.products.tile_product`).
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from llvmlite import ir  # type: ignore[import-untyped]
from torch import Tensor

from cag_kernels.cpu.emit import Value
from cag_kernels.cpu.products.plain import PlainProduct
from cag_kernels.cpu.products.tile_product import PARTS, Field, ProductCall, emit_blocks, emit_prepare, emit_sums
from cag_kernels.cpu.program import Program
from cag_kernels.cpu.tape import CompiledStep, Reads, new_call, scratch_memory
from cag_kernels.cpu.tiles import DEPTH, TILE, has_tiles, require_tiles

BLOCK_FEATURES = PARTS * TILE

_lock = threading.Lock()


def serves(weight: Tensor) -> bool:
    """Whether `compiled_linear` takes this bfloat16 weight, on this processor."""
    large = weight.shape[0] >= BLOCK_FEATURES and weight.shape[1] % DEPTH == 0
    return large and weight.is_contiguous() and has_tiles()


def compiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`rows [num_rows, in_features] @ weight.T + bias`, all contiguous, rows and bias float32, nothing empty; into
    `out [num_rows, out_features]` float32 if given."""
    num_rows, in_features = rows.shape
    out_features = weight.shape[0]
    out = rows.new_empty(num_rows, out_features) if out is None else out
    pairs = scratch_memory(pairs_size(num_rows, in_features))
    bias = no_bias(out_features) if bias is None else bias
    memory = (rows, pairs, weight, bias, out)
    pointers = [tensor.data_ptr() for tensor in memory]
    compiled_kernel().run((0, *pointers, num_rows, in_features, out_features), memory)
    return out


def pairs_size(num_rows: int, in_features: int) -> int:
    """Float32 whose memory holds a block turned: two bfloat16 in the place of each."""
    return -(-num_rows // TILE) * TILE * in_features // 2


class TileProduct(PlainProduct):
    """`compiled_linear` with one weight and its bias."""

    def multiply(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """See `PlainProduct`."""
        return compiled_linear(rows, self.weight, self.bias, out)


@cache
def no_bias(count: int) -> Tensor:
    """`[count]` zeros, which nobody may write to."""
    with torch.inference_mode(False):
        return torch.zeros(count, dtype=torch.float32)


class TileLinearKernel:
    """Machine code for every shape, run on several threads."""

    def __init__(self) -> None:
        require_tiles()
        program = Program(tile_linear_module)
        self._prepare, self._multiply = (
            CompiledStep(program.address(name), program) for name in ("prepare", "multiply")
        )

    def run(self, fields: tuple[int, ...], memory: tuple[Tensor, ...]) -> None:
        """Serve one call; `fields` are `Field` in order, `memory` is what their addresses are of."""
        call = new_call(fields, memory)
        self.prepare(call)
        self.multiply(call)

    def prepare(self, call: Any) -> None:
        """Turn the block."""
        self._prepare.alone(call)

    def multiply(self, call: Any) -> None:
        """The product of the turned block."""
        weight, in_features, out_features = (call[i] for i in (Field.WEIGHT, Field.IN_FEATURES, Field.OUT_FEATURES))
        reads = Reads(weight, out_features, 2 * in_features, BLOCK_FEATURES)
        self._multiply.shared(call, -(-out_features // BLOCK_FEATURES), reads)


def compiled_kernel() -> TileLinearKernel:
    """The kernel, compiled once a process."""
    with _lock:
        return _compile()


@cache
def _compile() -> TileLinearKernel:
    return TileLinearKernel()


def tile_linear_module() -> ir.Module:
    """Module with `prepare` and `multiply`, each of one pointer to the fields of a call."""
    module = ir.Module(name="tile_linear")
    emit_prepare(ProductCall(module, "prepare"))
    _emit_multiply(ProductCall(module, "multiply"))
    return module


def _emit_multiply(call: ProductCall) -> None:
    emit, builder = call.emit, call.emit.builder
    with emit.configured():
        turned = emit.bytes_on_stack(4 * TILE * TILE)

        def emit_block(first: Value, row_tiles: list[Value], following: Value | None) -> None:
            starts, ahead = _starts(call, first), None if following is None else _starts(call, following)
            for start, tiles in zip(starts, emit_sums(call, starts, row_tiles, ahead), strict=True):
                for row_tile, tile in zip(row_tiles, tiles, strict=True):
                    emit.store_tile(tile, turned)
                    _emit_rows(call, start, row_tile, turned)

        emit_blocks(call, BLOCK_FEATURES, emit_block)
    builder.ret_void()


def _starts(call: ProductCall, first: Value) -> list[Value]:
    return [call.emit.builder.add(first, call.emit.integer(part * TILE)) for part in range(PARTS)]


def _emit_rows(call: ProductCall, feature: Value, row_tile: Value, turned: Value) -> None:
    """A tile of sums, `[16 features, 16 rows]` in `turned`, to rows of out with the features' bias."""
    emit, builder = call.emit, call.emit.builder
    rows = emit.transposed([emit.load(emit.at(turned, row * TILE)) for row in range(TILE)])
    bias = emit.load(emit.at(call[Field.BIAS], feature))
    for row, vector in enumerate(rows):
        emit.store(builder.fadd(vector, bias), emit.at(turned, row * TILE))
    begin = builder.mul(row_tile, emit.integer(TILE))
    count = emit.minimum(builder.sub(call[Field.NUM_ROWS], begin), emit.integer(TILE))
    with emit.loop(emit.integer(0), count, 1) as place:
        line = builder.mul(builder.add(begin, place.index), call[Field.OUT_FEATURES])
        vector = emit.load(emit.at(turned, builder.mul(place.index, emit.integer(TILE))))
        emit.store(vector, emit.at(call[Field.OUT], builder.add(line, feature)))
