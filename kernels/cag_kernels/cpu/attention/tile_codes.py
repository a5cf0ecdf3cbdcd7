"""Operands of tile products from a prefix in codes, without numbers in rows in between where none are wanted.

What comes out is, to the bit, what the store's codecs decode to (docs/format.md 5.2): a product of a code and a 16-bit
scale is exact in float32, so adding the offset to it rounds once, fused or not.
"""

from __future__ import annotations

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.dequantize import GROUP_MULTIPLE, SIDES, Dequantizer
from cag_kernels.cpu.attention.tile_operands import Numbers, Operands
from cag_kernels.cpu.attention.tile_piece import PIECE, TILE_BYTES
from cag_kernels.cpu.emit import FLOAT, INT8, INT16, INT32, Value
from cag_kernels.cpu.tiles import DEPTH, ROW_BYTES, TILE, TileEmitter
from cag_kernels.prefixes import Codes

_TOP_BYTE = 24
_NARROW = ir.VectorType(INT16, TILE)
_EVEN, _ODD = 0, 1
_UNITS = 2.0**-_TOP_BYTE, 2.0**-8  # of keys' codes of 8 bits as `_key_codes` gives them, of even and odd channels


class Coded(Operands):
    """Of a prefix in codes. Scales and offsets of values are widened a piece at a time, so that each is one load."""

    channel_order = range(DEPTH)
    unit_bytes = 1

    def __init__(self, call: Call, emit: TileEmitter, codes: Codes) -> None:
        self.bits = codes.key_bits, codes.value_bits
        super().__init__(call, emit, codes.row_bytes(call.head_dim))
        self.dequantizer = Dequantizer(call, codes)
        self.codes = codes
        self.keys = emit.bytes_on_stack(self.piece_bytes)
        self.group_channels = min(codes.group_channels, call.head_dim)
        self.num_groups = -(-call.head_dim // self.group_channels)  # of a token's values
        self.parameters = [emit.scratch(PIECE * self.num_groups) for _ in range(2)]

    def emit_keys(self, head: Value, token: Value, count: Value) -> Value:
        """See `Operands`."""
        emit, builder = self.emit, self.emit.builder
        source, target = self.place(0, head, token), self.keys
        if self.bits[0] == 4 and self.head_dim // 2 % DEPTH:  # nibbles of neighbours lie in rows apart
            self.dequantizer.emit_side(0, head, token, count, target, PIECE)
            return target
        with emit.loop(emit.integer(0), count, GROUP_MULTIPLE) as block:
            stop = emit.minimum(builder.add(block.index, emit.integer(GROUP_MULTIPLE)), count)
            scales, offsets = self._key_parameters(head, builder.add(token, block.index))
            with emit.loop(block.index, stop, 1) as key:
                row = emit.at(source, builder.mul(key.index, emit.integer(self.row_bytes[0])), INT8)
                place = emit.at(target, builder.mul(key.index, emit.integer(2 * self.head_dim)), INT8)
                for channel, codes in self._key_codes(row).items():
                    numbers = [
                        emit.multiply_add(codes[odd], scales[channel][odd], offsets[channel][odd])
                        for odd in (_EVEN, _ODD)
                    ]
                    builder.store(emit.pairs(*numbers), emit.at(place, 2 * channel, INT8), align=4)
        self.dequantizer.emit_exact(0, target, head, token, count)
        self.dequantizer.emit_zeros(target, count, PIECE)
        return target

    def emit_values(self, head: Value, token: Value, count: Value) -> None:
        """See `Operands`."""
        emit, builder = self.emit, self.emit.builder
        source, target = self.place(1, head, token), self.paired
        self._emit_widened(head, token, count)
        last = builder.sub(count, emit.integer(1))
        with emit.loop(emit.integer(0), count, 2) as key:
            # behind the last token that one again, which no weight will count
            tokens = [key.index, emit.minimum(builder.add(key.index, emit.integer(1)), last)]
            even, odd = (self._value_numbers(source, token) for token in tokens)
            place = self._pair_place(target, builder.lshr(key.index, emit.integer(1)))
            for channel in even:
                pairs = emit.pairs(even[channel], odd[channel])
                builder.store(pairs, emit.at(place, channel // TILE * TILE_BYTES, INT8), align=4)
        self._emit_exact_values(target, head, token, count)
        self._emit_no_values(target, count)

    def _key_parameters(self, head: Value, token: Value) -> list[dict[int, tuple[Value, Value]]]:
        """Scales and offsets of the group of a token, of even and of odd channels of each 32."""
        emit, builder = self.emit, self.emit.builder
        places = self.dequantizer.key_parameter_places(head, token)
        units = (_UNITS if self.bits[0] == 8 else (1.0, 1.0), (1.0, 1.0))
        found = []
        for place, unit in zip(places, units, strict=True):
            side = {}
            for channel in range(0, self.head_dim, DEPTH):
                both = emit.load_integers(emit.at(place, channel, INT16))
                parts = (
                    builder.shl(both, self._integers(16)),
                    builder.and_(both, self._integers(-(1 << 16))),
                )
                numbers = [builder.bitcast(part, emit.vector) for part in parts]
                if unit != (1.0, 1.0):
                    numbers = [builder.fmul(n, emit.constant(u)) for n, u in zip(numbers, unit, strict=True)]
                side[channel] = (numbers[0], numbers[1])
            found.append(side)
        return found

    def _key_codes(self, row: Value) -> dict[int, tuple[Value, Value]]:
        """Codes of a row as float32, of even and of odd channels of each 32; see `_key_parameters` for their unit."""
        emit, builder = self.emit, self.emit.builder
        found = {}
        if self.bits[0] == 8:
            for channel in range(0, self.head_dim, DEPTH):
                both = builder.sext(builder.load(emit.at(row, channel, INT8), typ=_NARROW, align=1), emit.integers)
                parts = builder.shl(both, self._integers(_TOP_BYTE)), builder.and_(both, self._integers(-(1 << 8)))
                found[channel] = tuple(builder.sitofp(part, emit.vector) for part in parts)
            return found
        half = self.head_dim // 2
        for first in range(0, half, DEPTH):
            load = builder.load(emit.at(row, first, INT8), typ=_NARROW, align=1)
            both = builder.zext(load, emit.integers)
            for nibble, channel in enumerate((first, half + first)):
                found[channel] = (self._nibble(both, 4 * nibble), self._nibble(both, 8 + 4 * nibble))
        return found

    def _nibble(self, codes: Value, shift: int) -> Value:
        builder = self.emit.builder
        code = builder.and_(builder.lshr(codes, self._integers(shift)), self._integers(15))
        return builder.sitofp(code, self.emit.vector)

    def _emit_widened(self, head: Value, token: Value, count: Value) -> None:
        """Scales and offsets of a piece's values as float32, `[count, num_groups]`."""
        emit, builder = self.emit, self.emit.builder
        index = self.call.index(head, (self.call[Field.NUM_KEYS], token))
        first = builder.mul(index, emit.integer(self.num_groups))
        stop = builder.mul(count, emit.integer(self.num_groups))
        vectors = builder.and_(stop, emit.integer(-TILE))
        for field, target in zip((SIDES[1].scales, SIDES[1].offsets), self.parameters, strict=True):
            source = emit.at(self.call[field], first, INT16)
            with (
                emit.when(builder.icmp_signed(">", vectors, emit.integer(0))),
                emit.loop(emit.integer(0), vectors, TILE) as element,
            ):
                wide = emit.load_bfloat16(emit.at(source, element.index, INT16))
                emit.store(wide, emit.at(target, element.index))
            with emit.when(builder.icmp_signed("<", vectors, stop)), emit.loop(vectors, stop, 1) as element:
                half = builder.load(emit.at(source, element.index, INT16), typ=INT16, align=2)
                bits = builder.shl(builder.zext(half, INT32), ir.Constant(INT32, 16))
                builder.store(builder.bitcast(bits, FLOAT), emit.at(target, element.index), align=4)

    def _value_numbers(self, source: Value, token: Value) -> dict[int, Value]:
        """Float32 values of a token, 16 channels each."""
        emit, builder = self.emit, self.emit.builder
        row = emit.at(source, builder.mul(token, emit.integer(self.row_bytes[1])), INT8)
        first = builder.mul(token, emit.integer(self.num_groups))
        groups = [
            [emit.spread(emit.at(place, builder.add(first, emit.integer(group)))) for place in self.parameters]
            for group in range(self.num_groups)
        ]
        return {
            channel: emit.multiply_add(code, *groups[channel // self.group_channels])
            for channel, code in self.dequantizer.row_codes(row, self.bits[1])
        }

    def _pair_place(self, target: Value, pair: Value) -> Value:
        """Where the first 16 channels of a pair of keys lie in right operands."""
        emit, builder = self.emit, self.emit.builder
        block, row = builder.lshr(pair, emit.integer(4)), builder.and_(pair, emit.integer(TILE - 1))
        shift = builder.mul(row, emit.integer(ROW_BYTES))
        return emit.at(target, self.call.index(block, (2 * DEPTH * self.head_dim, shift)), INT8)

    def _emit_exact_values(self, target: Value, head: Value, token: Value, count: Value) -> None:
        """Put the exact first tokens in the place of what their codes gave."""
        emit, builder = self.emit, self.emit.builder
        stop = emit.minimum(self.call[Field.NUM_EXACT], builder.add(token, count))
        with emit.when(builder.icmp_signed("<", token, stop)), emit.loop(token, stop, 1) as exact:
            index = self.call.index(head, (self.call[Field.NUM_EXACT], exact.index), (self.head_dim, 0))
            source = emit.at(self.call[Field.EXACT_VALUES], index, INT16)
            key = builder.sub(exact.index, token)
            place = self._pair_place(target, builder.lshr(key, emit.integer(1)))
            shift = builder.mul(builder.trunc(builder.and_(key, emit.integer(1)), INT32), ir.Constant(INT32, 16))
            shifts = emit.spread_integer(shift)
            kept = builder.shl(self._integers(0xFFFF), builder.sub(self._integers(16), shifts))
            for channel in range(0, self.head_dim, TILE):
                half = builder.load(emit.at(source, channel, INT16), typ=_NARROW, align=2)
                new = builder.shl(builder.zext(half, emit.integers), shifts)
                there = emit.at(place, channel // TILE * TILE_BYTES, INT8)
                old = builder.and_(emit.load_integers(there), kept)
                builder.store(builder.or_(old, new), there, align=4)

    def _emit_no_values(self, target: Value, count: Value) -> None:
        emit, builder = self.emit, self.emit.builder
        first = builder.lshr(builder.add(count, emit.integer(1)), emit.integer(1))
        stop = emit.integer(PIECE // 2)
        with emit.when(builder.icmp_signed("<", first, stop)), emit.loop(first, stop, 1) as pair:
            place = self._pair_place(target, pair.index)
            for channel in range(0, self.head_dim, TILE):
                nothing = ir.Constant(emit.integers, [0] * TILE)
                builder.store(nothing, emit.at(place, channel // TILE * TILE_BYTES, INT8), align=4)

    def _integers(self, value: int) -> Value:
        return ir.Constant(self.emit.integers, [value] * TILE)


def operands_of(call: Call, emit: TileEmitter, codes: Codes | None) -> Operands:
    """For a prefix in numbers, or in codes."""
    return Numbers(call, emit) if codes is None else Coded(call, emit, codes)
