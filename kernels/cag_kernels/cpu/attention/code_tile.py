"""A tile of a prefix in codes as integer products want it, on the stack of the function that serves a call's tasks.

In: a call whose keys and values are codes with scales and offsets (`prefixes.QuantizedPrefix`). Out: codes in 16 bits,
scales and offsets in float32, once for all rows that meet them (`cpu.attention.code_panel`).
"""

from __future__ import annotations

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.attention.dequantize import SIDES
from cag_kernels.cpu.emit import INT8, INT16, INT32, Emitter, Value
from cag_kernels.prefixes import Codes

CHUNK = 16  # codes that are widened at once, and channels of values side by side
_CODES = ir.VectorType(INT8, CHUNK)
_WIDE = ir.VectorType(INT16, CHUNK)


def num_channel_groups(head_dim: int, codes: Codes) -> int:
    """Groups of values along the channels."""
    return -(-head_dim // codes.group_channels)


def codes_place(call: Call, codes: Codes, side: int, head: Value, token: Value) -> Value:
    """Where the codes of a key (side 0) or a value (1) lie in memory."""
    skipped = call.emit.builder.mul(token, call.emit.integer(codes.row_bytes(call.head_dim)[side]))
    return call.emit.at(call[SIDES[side].codes], call.index(head, (call[SIDES[side].stride], skipped)), INT8)


class CodeTile:
    """Memory of one tile, and how it is filled.

    keys: int16 `[tile, head_dim]`. values: int16 `[head_dim / CHUNK, tile / 2, CHUNK, 2]`, codes of two keys side by
    side. key_parameters: float32 `[2, head_dim]`, scales and offsets; value_parameters: float32 `[2, groups, tile]`,
    zeros behind the last key. Codes behind the last key are any.
    """

    def __init__(self, call: Call, codes: Codes) -> None:
        self.call, self.emit, self.builder, self.codes = call, call.emit, call.emit.builder, codes
        self.tile, self.head_dim = call.blocking.tile, call.head_dim
        self.num_groups = num_channel_groups(call.head_dim, codes)
        self.row_bytes = codes.row_bytes(call.head_dim)
        self.keys, self.values = (self.emit.scratch(self.tile * self.head_dim // 2) for _ in range(2))
        self.key_parameters = self.emit.scratch(2 * self.head_dim)
        self.value_parameters = self.emit.scratch(2 * self.tile * self.num_groups)

    def emit_tile(self, head: Value, first: Value, count: Value) -> None:
        """Tokens `[first, first + count)` of a head, of which `first` is a multiple of the tile."""
        self._emit_keys(head, first, count)
        self._emit_values(head, first, count)
        self._emit_key_parameters(head, first)
        self._emit_value_parameters(head, first, count)

    def _emit_keys(self, head: Value, first: Value, count: Value) -> None:
        emit, builder, bits = self.emit, self.builder, self.codes.key_bits
        source = codes_place(self.call, self.codes, 0, head, first)
        with emit.loop(emit.integer(0), count, 1) as token:
            row = emit.at(source, builder.mul(token.index, emit.integer(self.row_bytes[0])), INT8)
            target = emit.at(self.keys, builder.mul(token.index, emit.integer(self.head_dim)), INT16)
            for byte in range(0, self.row_bytes[0], CHUNK):
                load = builder.load(emit.at(row, byte, INT8), typ=_CODES, align=1)
                for channel, codes in self._channels(load, byte, bits):
                    builder.store(self._wide(codes, bits), emit.at(target, channel, INT16), align=2)

    def _emit_values(self, head: Value, first: Value, count: Value) -> None:
        """Two rows at a time; the last one beside itself where it has none."""
        emit, builder, bits = self.emit, self.builder, self.codes.value_bits
        source, last = codes_place(self.call, self.codes, 1, head, first), builder.sub(count, emit.integer(1))
        turns = [
            ir.Constant(ir.VectorType(INT32, CHUNK), [half + lane // 2 + lane % 2 * CHUNK for lane in range(CHUNK)])
            for half in (0, CHUNK // 2)
        ]
        with emit.loop(emit.integer(0), count, 2) as token:
            tokens = [token.index, emit.minimum(builder.add(token.index, emit.integer(1)), last)]
            rows = [emit.at(source, builder.mul(index, emit.integer(self.row_bytes[1])), INT8) for index in tokens]
            target = emit.at(self.values, builder.mul(token.index, emit.integer(CHUNK // 2)))
            for byte in range(0, self.row_bytes[1], CHUNK):
                loads = [builder.load(emit.at(row, byte, INT8), typ=_CODES, align=1) for row in rows]
                halves = zip(*(self._channels(load, byte, bits) for load in loads), strict=True)
                for (channel, even), (_, odd) in halves:
                    place = emit.at(target, channel * self.tile // 2)
                    for half, both in enumerate(turns):
                        codes = self._wide(builder.shuffle_vector(even, odd, both), bits)
                        builder.store(codes, emit.at(place, half * CHUNK // 2), align=2)

    def _wide(self, codes: Value, bits: int) -> Value:
        return self.builder.sext(codes, _WIDE) if bits == 8 else self.builder.zext(codes, _WIDE)

    def _channels(self, load: Value, byte: int, bits: int) -> list[tuple[int, Value]]:
        """First channel and codes, one a byte, of what was loaded from a place in a row."""
        if bits == 8:
            return [(byte, load)]
        low = self.builder.and_(load, ir.Constant(_CODES, [15] * CHUNK))
        high = self.builder.lshr(load, ir.Constant(_CODES, [4] * CHUNK))
        return [(byte, low), (self.head_dim // 2 + byte, high)]

    def _emit_key_parameters(self, head: Value, first: Value) -> None:
        emit, builder = self.emit, self.builder
        group = builder.udiv(first, emit.integer(self.codes.group_tokens))
        index = self.call.index(head, (self.call[Field.NUM_GROUPS], group), (self.head_dim, 0))
        for part, field in enumerate((Field.KEY_SCALES, Field.KEY_OFFSETS)):
            source = emit.at(self.call[field], index, INT16)
            for channel in range(0, self.head_dim, emit.lanes):
                target = emit.at(self.key_parameters, part * self.head_dim + channel)
                emit.store(emit.load_bfloat16(emit.at(source, channel, INT16)), target)

    def _emit_value_parameters(self, head: Value, first: Value, count: Value) -> None:
        index = self.call.index(head, (self.call[Field.NUM_KEYS], first), (self.num_groups, 0))
        for part, field in enumerate((Field.VALUE_SCALES, Field.VALUE_OFFSETS)):
            source = self.emit.at(self.call[field], index, INT16)
            target = self.emit.at(self.value_parameters, part * self.num_groups * self.tile)
            emit_parameters_by_group(self.emit, source, count, target, self.num_groups, self.tile)


def emit_parameters_by_group(
    emit: Emitter, source: Value, count: Value, target: Value, num_groups: int, tile: int
) -> None:
    """Scales, or offsets, of a tile's values, bfloat16 `[key, group]`, as float32 `[group, tile]`, zeros behind the
    last key; what lies there in memory is not read."""
    builder, lanes = emit.builder, emit.lanes
    targets = [emit.at(target, group * tile) for group in range(num_groups)]
    is_whole = builder.icmp_signed("==", count, emit.integer(tile))
    with emit.when(is_whole), emit.loop(emit.integer(0), emit.integer(tile), lanes) as key:
        place = emit.at(source, builder.mul(key.index, emit.integer(num_groups)), INT16)
        found = builder.load(place, typ=ir.VectorType(INT16, lanes * num_groups), align=2)
        for group, own in enumerate(targets):
            order = [lane * num_groups + group for lane in range(lanes)]
            halves = builder.shuffle_vector(found, found, ir.Constant(ir.VectorType(INT32, lanes), order))
            emit.store(emit.widened(halves), emit.at(own, key.index))
    with emit.when(builder.not_(is_whole)):
        with emit.loop(emit.integer(0), emit.integer(num_groups * tile), lanes) as element:
            emit.store(emit.constant(0.0), emit.at(target, element.index))
        with emit.loop(emit.integer(0), count, 1) as key:
            place = emit.at(source, builder.mul(key.index, emit.integer(num_groups)), INT16)
            for group, own in enumerate(targets):
                number = emit.load_one_bfloat16(emit.at(place, group, INT16))
                builder.store(number, emit.at(own, key.index), align=4)
