"""The call that compiled attention serves: its fields in memory, and a function under construction that reads them."""

from __future__ import annotations

from enum import IntEnum

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.emit import ELEMENTS, POINTER, Emitter, Value
from cag_kernels.cpu.fields import Fields


class Field(IntEnum):
    """Places in the array of int64 that describes a call to the compiled code; `QUERY` to `LOGSUMEXPS`: addresses."""

    NEXT_TASK = 0
    QUERY = 1  # [num_kv_heads, num_rows, head_dim] float32 (bfloat16 for tiles)
    KEYS = 2  # [num_kv_heads, num_keys, head_dim], of the type that the code was made for, as EXACT_KEYS
    VALUES = 3
    SCALED = 4  # [num_kv_heads, head_dim, num_lanes] float32: the query transposed, scaled, padded with zeros
    MAXIMUM = 5  # [num_kv_heads, num_ranges, num_lanes] float32; range 0 of a head holds the result in the end
    DENOMINATOR = 6  # as MAXIMUM
    WEIGHTED = 7  # [num_kv_heads, num_ranges, head_dim, num_lanes] float32
    OUT = 8  # as QUERY, float32
    LOGSUMEXPS = 9  # [num_kv_heads, num_rows] float32
    NUM_KV_HEADS = 10
    NUM_KEYS = 11
    NUM_ROWS = 12
    NUM_LANES = 13  # rows rounded up to whole vectors
    NUM_RANGES = 14
    KEYS_STRIDE = 15  # elements from one head to the next
    VALUES_STRIDE = 16
    SCALE = 17  # the bits of a float32
    # of windows (`cpu.attention.window_call`); zeros where there are none:
    POSITIONS = 18  # address of int32 [num_queries]
    FIRST_KEYS = 19  # address of int32 [num_lanes], which `prepare` writes
    NUM_QUERIES = 20  # row r of a head is query r % NUM_QUERIES
    OFFSET = 21  # added to positions
    WINDOW = 22
    BEGIN = 23  # written by `prepare`: key from which on any row sees one
    # of a prefix in codes (`cpu.attention.dequantize`), where KEYS and VALUES are codes and their strides bytes:
    NUM_GROUPS = 24  # groups of keys along the tokens
    NUM_EXACT = 25  # first tokens that stand in EXACT_KEYS and EXACT_VALUES
    KEY_SCALES = 26  # [num_kv_heads, num_groups, head_dim] bfloat16
    KEY_OFFSETS = 27
    VALUE_SCALES = 28  # [num_kv_heads, num_keys, num_channel_groups] bfloat16
    VALUE_OFFSETS = 29
    EXACT_KEYS = 30  # [num_kv_heads, num_exact, head_dim]
    EXACT_VALUES = 31


_ADDRESSES = {*range(Field.QUERY, Field.NUM_KV_HEADS), Field.POSITIONS, Field.FIRST_KEYS, *range(Field.KEY_SCALES, 32)}


class Call(Fields[Emitter]):
    """A function under construction and the fields of the call that it serves; of windows and of codes only when
    there are some."""

    def __init__(
        self,
        module: ir.Module,
        name: str,
        head_dim: int,
        blocking: Blocking,
        *,
        has_window: bool = False,
        has_codes: bool = False,
        kept: torch.dtype = torch.bfloat16,
    ) -> None:
        """`kept`: the type of keys and values that are no codes."""
        self.function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name=name)
        self.head_dim = head_dim
        self.blocking = blocking
        self.has_window = has_window
        self.kept, self.element = kept, ELEMENTS[kept]
        last = Field.EXACT_VALUES if has_codes else Field.BEGIN
        super().__init__(self.make_emitter(), list(Field)[1 : last + 1], _ADDRESSES)

    def make_emitter(self) -> Emitter:
        """What the function's instructions are made with."""
        return Emitter(self.function, self.blocking.lanes)

    def index(self, first: Value, *pairs: tuple[Value | int, Value | int]) -> Value:
        """`((first * size + offset) * size + offset) ...` over `(size, offset)` pairs."""
        builder = self.emit.builder
        for size, offset in pairs:
            size, offset = (self.emit.integer(part) if isinstance(part, int) else part for part in (size, offset))
            first = builder.add(builder.mul(first, size), offset)
        return first
