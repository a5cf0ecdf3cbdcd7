"""How the integer codes of a group are chosen, and how they stand in a segment: a byte each, or two to a byte.

A code stands for `code * scale + offset`; scale and offset are bfloat16. Codes are computed against the *rounded* pair
and scales are rounded up, so its few bits cost no accuracy beyond half a step. Knows no groups and no segments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import Side, corrupt_segment
from cag_store.codecs.loops import Loops
from cag_store.dtypes import Array, widen

Floats = NDArray[np.float32]


class CodeWidth(ABC):
    """Codes of `bits` bits from `lowest` to `highest`, kept as arrays `[num_kv_heads, num_tokens, row_bytes]` of
    `dtype`."""

    bits: ClassVar[int]
    dtype: ClassVar[np.dtype[Any]]
    lowest: ClassVar[int]
    highest: ClassVar[int]

    @abstractmethod
    def row_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one token of one head."""

    @abstractmethod
    def fit(self, high: Floats, low: Floats) -> tuple[Floats, Floats]:
        """Scales and offsets, exact bfloat16 values, of groups that reach from `low` to `high` (float32)."""

    @abstractmethod
    def pack(self, codes: NDArray[np.int8]) -> Array:
        """Codes `[..., head_dim]` as they are stored."""

    @abstractmethod
    def unpack(self, stored: Array, head_dim: int) -> Floats:
        """Undo `pack`; the codes as float32."""

    def check(self, stored: Array, head_dim: int) -> None:  # noqa: B027  a byte a code has no spare bits
        """Raises: CorruptEntry when `stored` has bits set that belong to no code."""

    @abstractmethod
    def dequantize(
        self, loops: Loops, side: Side, stored: Array, parameters: Array, group_size: int, out: Array
    ) -> None:
        """Decode a whole segment by compiled loops.

        Args:
            loops: the compiled ones.
            side: keys or values.
            stored: what `pack` gave.
            parameters: scales and offsets, bfloat16 bit patterns; keys `[2, num_kv_heads, num_groups, head_dim]`,
                values `[2, num_kv_heads, num_tokens, num_channel_groups]`.
            group_size: tokens (of keys) or channels (of values) of a group.
            out: `[num_kv_heads, num_tokens, head_dim]`, bfloat16 or float32 storage dtype.
        """

    def quantize(self, values: Floats, axis: int) -> tuple[NDArray[np.int8], Array, Array]:
        """Codes of `values`, and the scales and offsets of the groups that run along `axis` (1 long in them)."""
        high, low = values.max(axis=axis, keepdims=True), values.min(axis=axis, keepdims=True)
        scales, offsets = self.fit(high, low)
        steps = np.where(scales > 0, scales, np.float32(1))
        codes = np.rint((values - offsets) / steps)
        return codes.clip(self.lowest, self.highest).astype(np.int8), scales, offsets


class Bytes(CodeWidth):
    """-127 to 127 about the middle of the group."""

    bits = 8
    dtype = np.dtype(np.int8)
    lowest, highest = -127, 127

    def row_bytes(self, head_dim: int) -> int:
        """See `CodeWidth`."""
        return head_dim

    def fit(self, high: Floats, low: Floats) -> tuple[Floats, Floats]:
        """See `CodeWidth`."""
        offsets = rounded(high * np.float32(0.5) + low * np.float32(0.5))
        return rounded(np.maximum(high - offsets, offsets - low) / np.float32(self.highest), up=True), offsets

    def pack(self, codes: NDArray[np.int8]) -> Array:
        """See `CodeWidth`."""
        return codes

    def unpack(self, stored: Array, head_dim: int) -> Floats:  # noqa: ARG002
        """See `CodeWidth`."""
        return stored.astype(np.float32)

    def dequantize(
        self, loops: Loops, side: Side, stored: Array, parameters: Array, group_size: int, out: Array
    ) -> None:
        """See `CodeWidth`; of values only with one group a token."""
        if side == "keys":
            loops.dequantize_keys(stored, parameters, group_size, out)
        else:
            assert group_size >= out.shape[2]
            loops.dequantize_values(stored, parameters.reshape(parameters.shape[:3]), out)


class Nibbles(CodeWidth):
    """0 to 15 from the low end of the group; the two halves of a row's channels share its bytes."""

    bits = 4
    dtype = np.dtype(np.uint8)
    lowest, highest = 0, 15

    def row_bytes(self, head_dim: int) -> int:
        """See `CodeWidth`."""
        return -(-head_dim // 2)

    def fit(self, high: Floats, low: Floats) -> tuple[Floats, Floats]:
        """See `CodeWidth`. What lies below a rounded offset is less than half a unit of its last place away."""
        offsets = rounded(low)
        reach = np.maximum(high - offsets, np.float32(0))
        return rounded(reach / np.float32(self.highest), up=True), offsets

    def pack(self, codes: NDArray[np.int8]) -> Array:
        """See `CodeWidth`."""
        half, rest = self.row_bytes(codes.shape[-1]), codes.shape[-1] // 2
        stored = codes[..., :half].astype(np.uint8)
        stored[..., :rest] |= codes[..., half:].astype(np.uint8) << np.uint8(4)
        return stored

    def check(self, stored: Array, head_dim: int) -> None:
        """See `CodeWidth`."""
        if head_dim % 2 and stored[..., -1].max() > self.highest:
            raise corrupt_segment("unused bits", 0, int(stored[..., -1].max() >> 4))

    def unpack(self, stored: Array, head_dim: int) -> Floats:
        """See `CodeWidth`."""
        half = self.row_bytes(head_dim)
        codes = np.empty((*stored.shape[:-1], head_dim), dtype=np.float32)
        codes[..., :half] = stored & np.uint8(15)
        codes[..., half:] = stored[..., : head_dim - half] >> np.uint8(4)
        return codes

    def dequantize(
        self, loops: Loops, side: Side, stored: Array, parameters: Array, group_size: int, out: Array
    ) -> None:
        """See `CodeWidth`."""
        if side == "keys":
            loops.dequantize_nibble_keys(stored, parameters, group_size, out)
        else:
            loops.dequantize_nibble_values(stored, parameters, group_size, out)


BYTES, NIBBLES = Bytes(), Nibbles()


def to_bfloat16(values: Floats, up: bool = False) -> NDArray[np.uint16]:
    """Bit patterns of `values` in bfloat16: to nearest (half away from zero), or away from zero when `up`."""
    bits = np.ascontiguousarray(values).view(np.uint32) + np.uint32(0xFFFF if up else 0x8000)
    return (bits >> np.uint32(16)).astype("<u2")


def rounded(values: Floats, up: bool = False) -> Floats:
    """`values` rounded as `to_bfloat16` rounds them."""
    return widen(to_bfloat16(values, up), "bfloat16")
