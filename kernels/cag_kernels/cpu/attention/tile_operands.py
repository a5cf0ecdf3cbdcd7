"""Operands of tile products from what a prefix is held in: a piece's keys as left, its values as right operands.

Keys are left operands as they lie in memory, `[PIECE, head_dim]` bfloat16; values become
`[blocks of 32 keys, head_dim / 16, 16 pairs of keys, 16 channels]`. What lies behind the last key counts as zeros.
Out of codes come the numbers that the store decodes to, to the bit (`cpu.attention.dequantize`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call
from cag_kernels.cpu.attention.dequantize import SIDES
from cag_kernels.cpu.attention.tile_piece import PIECE, TILE_BYTES
from cag_kernels.cpu.emit import INT8, INT16, LINE_BYTES, POINTER, Value, function_blocks
from cag_kernels.cpu.tiles import DEPTH, TILE, TileEmitter

_NARROW = ir.VectorType(INT16, TILE)
_QUARTER = 4  # channels of 128 bits of pairs


class Operands(ABC):
    """Makes the operands of the pieces of a range, in the function of a call. One piece's operands of a side lie in
    the place of the one before."""

    channel_order: Sequence[int]
    """Which of 32 channels each column of two neighbouring tiles of values holds."""
    unit_bytes: int
    """What the strides of a call count."""

    def __init__(self, call: Call, emit: TileEmitter, row_bytes: tuple[int, int]) -> None:
        self.call, self.emit, self.row_bytes = call, emit, row_bytes
        self.head_dim = call.head_dim
        self.piece_bytes = 2 * PIECE * self.head_dim
        self.paired = emit.bytes_on_stack(self.piece_bytes)

    @abstractmethod
    def emit_keys(self, head: Value, token: Value, count: Value) -> Value:
        """Where the keys of `count` tokens from `token` on lie, as numbers."""

    @abstractmethod
    def emit_values(self, head: Value, token: Value, count: Value) -> None:
        """Put the values of `count` tokens from `token` on into `paired`, as right operands."""

    def place(self, side: int, head: Value, token: Value) -> Value:
        """Where the numbers or codes of a token lie in memory."""
        fields = SIDES[side]
        row_bytes = self.emit.integer(self.row_bytes[side])
        stride = self.emit.builder.mul(self.call[fields.stride], self.emit.integer(self.unit_bytes))
        index = self.call.index(head, (stride, self.emit.builder.mul(token, row_bytes)))
        return self.emit.at(self.call[fields.codes], index, INT8)

    def num_lines(self, side: int) -> int:
        """Cache lines of a piece in memory."""
        return PIECE * self.row_bytes[side] // LINE_BYTES


class Numbers(Operands):
    """Of a prefix in bfloat16. Pairs are made within 128 bits, which changes the order of channels."""

    channel_order = [2 * lane - lane % _QUARTER + part for part in (0, _QUARTER) for lane in range(TILE)]
    unit_bytes = 2

    def __init__(self, call: Call, emit: TileEmitter) -> None:
        super().__init__(call, emit, (2 * call.head_dim, 2 * call.head_dim))
        self.padded = [emit.bytes_on_stack(self.piece_bytes) for _ in range(2)]

    def emit_keys(self, head: Value, token: Value, count: Value) -> Value:
        """See `Operands`."""
        return self._emit_whole(0, head, token, count)

    def emit_values(self, head: Value, token: Value, count: Value) -> None:
        """See `Operands`."""
        emit, builder = self.emit, self.emit.builder
        source = self._emit_whole(1, head, token, count)
        with emit.loop(emit.integer(0), emit.integer(PIECE // DEPTH), 1) as block:
            for channel in range(0, self.head_dim, DEPTH):
                rows = emit.at(source, builder.mul(block.index, emit.integer(DEPTH * self.head_dim)), INT16)
                tiles = emit.at(self.paired, builder.mul(block.index, emit.integer(2 * DEPTH * self.head_dim)), INT8)
                for pair in range(TILE):
                    even = emit.at(rows, 2 * pair * self.head_dim + channel, INT16)
                    for part, pairs in enumerate(emit.load_pairs(even, emit.at(even, self.head_dim, INT16))):
                        place = (channel // TILE + part) * TILE_BYTES + pair * 4 * TILE
                        builder.store(pairs, emit.at(tiles, place, INT8), align=4)

    def _emit_whole(self, side: int, head: Value, token: Value, count: Value) -> Value:
        """Where a piece's keys (0) or values (1) lie: a copy with zeros behind it when it is not whole."""
        call, emit, builder = self.call, self.emit, self.emit.builder
        source, copy = self.place(side, head, token), self.padded[side]
        before, (partly, behind) = builder.block, function_blocks(call.function, "partly", "behind")
        builder.cbranch(builder.icmp_signed("<", count, emit.integer(PIECE)), partly, behind)
        builder.position_at_end(partly)
        present = builder.mul(count, emit.integer(self.head_dim))
        with emit.loop(emit.integer(0), present, TILE) as element:
            numbers = builder.load(emit.at(source, element.index, INT16), typ=_NARROW, align=2)
            builder.store(numbers, emit.at(copy, element.index, INT16), align=2)
        with emit.loop(present, emit.integer(PIECE * self.head_dim), TILE) as element:
            builder.store(ir.Constant(_NARROW, [0] * TILE), emit.at(copy, element.index, INT16), align=2)
        end = builder.block
        builder.branch(behind)
        builder.position_at_end(behind)
        found = builder.phi(POINTER)
        found.add_incoming(source, before)
        found.add_incoming(copy, end)
        return found
