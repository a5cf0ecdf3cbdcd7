"""Codes into numbers, as LLVM code: a stretch of a quantized prefix that is about to be attended to, and no more of it.

In: a call whose keys and values are codes with scales and offsets (`prefixes.QuantizedPrefix`). Out: rows on
the stack, of the type of exact tokens, to the bit what the store's codecs decode to: `code * scale`, then `+ offset`,
each rounded to float32, and the sum to that type (docs/format.md 5.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.call import Call, Field
from cag_kernels.cpu.emit import HALF, INT8, INT16, INT32, POINTER, Value
from cag_kernels.prefixes import Codes
from cag_kernels.quantize import LARGEST_HALF

GROUP_MULTIPLE = 16  # tokens of a group of keys and channels of a group of values are multiples of this


class Side(NamedTuple):
    """The fields of a call that hold the keys, or the values, of a prefix in codes."""

    codes: Field
    stride: Field
    scales: Field
    offsets: Field
    exact: Field


SIDES = (
    Side(Field.KEYS, Field.KEYS_STRIDE, Field.KEY_SCALES, Field.KEY_OFFSETS, Field.EXACT_KEYS),
    Side(Field.VALUES, Field.VALUES_STRIDE, Field.VALUE_SCALES, Field.VALUE_OFFSETS, Field.EXACT_VALUES),
)


class Dequantizer:
    """Turns codes into rows of numbers, in the function of a call."""

    def __init__(self, call: Call, codes: Codes) -> None:
        self.call, self.emit, self.builder = call, call.emit, call.emit.builder
        self.codes = codes

    def rows_on_stack(self, num_tokens: int) -> Value:
        """Memory for `[num_tokens, head_dim]` numbers, of the whole function."""
        memory = self.builder.alloca(self.call.element, size=num_tokens * self.call.head_dim)
        memory.align = 64
        memory.type = POINTER
        return memory

    def emit_side(self, side: int, head: Value, first: Value, count: Value, target: Value, num_tokens: int) -> None:
        """Keys (0) or values (1) of tokens `[first, first + count)` into `target`, `[num_tokens, head_dim]`, with
        zeros behind them; `first` is a multiple of 16."""
        emit, builder, fields = self.emit, self.builder, SIDES[side]
        bits = (self.codes.key_bits, self.codes.value_bits)[side]
        row_bytes = self.call.head_dim * bits // 8
        start = self.call.index(head, (self.call[fields.stride], builder.mul(first, emit.integer(row_bytes))))
        source = emit.at(self.call[fields.codes], start, INT8)
        with emit.loop(emit.integer(0), count, GROUP_MULTIPLE) as block:
            stop = emit.minimum(builder.add(block.index, emit.integer(GROUP_MULTIPLE)), count)
            keys = self._key_parameters(head, builder.add(first, block.index)) if side == 0 else None
            with emit.loop(block.index, stop, 1) as token:
                parameters = keys or self._value_parameters(head, builder.add(first, token.index))
                row = emit.at(source, builder.mul(token.index, emit.integer(row_bytes)), INT8)
                place = emit.at(target, builder.mul(token.index, emit.integer(self.call.head_dim)), self.call.element)
                values = {
                    channel: builder.fadd(builder.fmul(code, parameters[channel][0]), parameters[channel][1])
                    for channel, code in self.row_codes(row, bits)
                }
                for channel, width in self._stores:
                    vectors = [values[channel + first] for first in range(0, width, emit.lanes)]
                    builder.store(self._rounded(vectors), emit.at(place, channel, self.call.element), align=2)
        self.emit_exact(side, target, head, first, count)
        self.emit_zeros(target, count, num_tokens)

    @property
    def _channels(self) -> range:
        return range(0, self.call.head_dim, self.emit.lanes)

    def _key_parameters(self, head: Value, token: Value) -> dict[int, tuple[Value, Value]]:
        """Scales and offsets of all channels for the group of a token."""
        places = self.key_parameter_places(head, token)
        return {channel: (self._wide(places[0], channel), self._wide(places[1], channel)) for channel in self._channels}

    def key_parameter_places(self, head: Value, token: Value) -> list[Value]:
        """Where scales and offsets of all channels lie for the group of a token."""
        group = self.builder.udiv(token, self.emit.integer(self.codes.group_tokens))
        index = self.call.index(head, (self.call[Field.NUM_GROUPS], group), (self.call.head_dim, 0))
        return [self.emit.at(self.call[field], index, INT16) for field in (Field.KEY_SCALES, Field.KEY_OFFSETS)]

    def _wide(self, place: Value, channel: int) -> Value:
        return self.emit.load_bfloat16(self.emit.at(place, channel, INT16))

    def _value_parameters(self, head: Value, token: Value) -> dict[int, tuple[Value, Value]]:
        """Scale and offset of a token for the group of each vector of channels, in all lanes."""
        size = min(self.codes.group_channels, self.call.head_dim)
        num_groups = -(-self.call.head_dim // size)
        index = self.call.index(head, (self.call[Field.NUM_KEYS], token), (num_groups, 0))
        pairs = [
            tuple(
                self._spread(self.emit.at(self.call[field], self.builder.add(index, self.emit.integer(group)), INT16))
                for field in (Field.VALUE_SCALES, Field.VALUE_OFFSETS)
            )
            for group in range(num_groups)
        ]
        return {channel: pairs[channel // size] for channel in self._channels}

    def _spread(self, place: Value) -> Value:
        return self.emit.spread_number(self.emit.load_one_bfloat16(place))

    def row_codes(self, row: Value, bits: int) -> list[tuple[int, Value]]:
        """First channel and codes as float32 of each vector of a token's row."""
        builder, lanes = self.builder, self.emit.lanes
        kind = ir.VectorType(INT8, lanes)
        loads = [
            (first, builder.load(self.emit.at(row, first, INT8), typ=kind, align=1))
            for first in range(0, self.call.head_dim * bits // 8, lanes)
        ]
        if bits == 8:
            return [
                (first, builder.sitofp(builder.sext(load, self.emit.integers), self.emit.vector))
                for first, load in loads
            ]
        found = []
        for first, load in loads:
            both = builder.zext(load, self.emit.integers)
            low = builder.and_(both, self._constant(15))
            high = builder.lshr(both, self._constant(4))
            found += [(first, low), (self.call.head_dim // 2 + first, high)]
        return [(first, builder.sitofp(codes, self.emit.vector)) for first, codes in found]

    def _constant(self, value: int) -> Any:
        return ir.Constant(self.emit.integers, [value] * self.emit.lanes)

    @property
    def _stores(self) -> list[tuple[int, int]]:
        """First channel and number of channels of what is stored at once: two vectors of bfloat16 where there are
        two."""
        lanes, head_dim = self.emit.lanes, self.call.head_dim
        width = 2 * lanes if head_dim % (2 * lanes) == 0 and self.call.kept is torch.bfloat16 else lanes
        return [(channel, width) for channel in range(0, head_dim, width)]

    def _rounded(self, values: Sequence[Value]) -> Value:
        """One vector or two behind each other, in the type that is kept."""
        if self.call.kept is torch.float32:
            return values[0]
        if self.call.kept is torch.float16:
            return self._rounded_to_float16(values[0])
        halves = ir.VectorType(INT16, 2 * self.emit.lanes)
        parts = [
            self.builder.bitcast(
                self.builder.add(self.builder.bitcast(value, self.emit.integers), self._constant(0x8000)), halves
            )
            for value in values
        ]
        upper = list(range(1, 2 * self.emit.lanes * len(parts), 2))
        chosen = ir.Constant(ir.VectorType(INT32, len(upper)), upper)
        return self.builder.shuffle_vector(parts[0], parts[-1], chosen)

    def _rounded_to_float16(self, value: Value) -> Value:
        """The nearest one, ties to even; what is too large becomes the largest."""
        emit, largest = self.emit, self.emit.constant(LARGEST_HALF)
        smaller = emit.builder.select(emit.builder.fcmp_ordered("<", value, largest), value, largest)
        least = emit.constant(-LARGEST_HALF)
        inside = emit.builder.select(emit.builder.fcmp_ordered(">", smaller, least), smaller, least)
        return emit.builder.fptrunc(inside, ir.VectorType(HALF, emit.lanes))

    def emit_exact(self, side: int, target: Value, head: Value, first: Value, count: Value) -> None:
        """Put the exact first tokens in the place of what their codes gave, in rows."""
        emit, builder, head_dim = self.emit, self.builder, self.call.head_dim
        stop = emit.minimum(self.call[Field.NUM_EXACT], builder.add(first, count))
        with self.emit.when(builder.icmp_signed("<", first, stop)):
            start = self.call.index(head, (self.call[Field.NUM_EXACT], first), (head_dim, 0))
            size = builder.mul(builder.sub(stop, first), emit.integer(head_dim))
            source = emit.at(self.call[SIDES[side].exact], start, self.call.element)
            self._emit_copy(source, target, emit.integer(0), size)

    def emit_zeros(self, target: Value, count: Value, num_tokens: int) -> None:
        """Zeros behind the first `count` of so many rows."""
        start = self.builder.mul(count, self.emit.integer(self.call.head_dim))
        stop = self.emit.integer(num_tokens * self.call.head_dim)
        with self.emit.when(self.builder.icmp_signed("<", start, stop)):
            self._emit_copy(None, target, start, stop)

    def _emit_copy(self, source: Value | None, target: Value, start: Value, stop: Value) -> None:
        size, lanes = self.call.element, self.emit.lanes
        kind = ir.VectorType(size, lanes)
        with self.emit.loop(start, stop, lanes) as element:
            value = ir.Constant(kind, [0] * lanes)
            if source is not None:
                value = self.builder.load(self.emit.at(source, element.index, size), typ=kind, align=2)
            self.builder.store(value, self.emit.at(target, element.index, size), align=2)
