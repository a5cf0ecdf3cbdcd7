"""`int8`: 8-bit codes, keys per channel over groups of tokens, values per token. Layout and arithmetic:
docs/format.md 5.2.

Scales and offsets are bfloat16: the range of the data itself, so nothing overflows;
codes are computed against the *rounded*
pair and scales are rounded up, so its few bits cost no accuracy beyond half a step. Non-finite values are refused.
Source: keys per channel, values per token as in KIVI (arXiv:2402.02750);
first tokens exact as in KVQuant (arXiv:2401.18079).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops
from cag_store.codecs.base import (
    Codec,
    Config,
    Packer,
    Side,
    checked_array,
    checked_int,
    corrupt_segment,
    refuse_unknown_keys,
)
from cag_store.dtypes import Array, narrow_into, widen
from cag_store.errors import UnencodableArray

_HEAD = struct.Struct("<BBHII")
_SIDES: tuple[Side, Side] = ("keys", "values")
_LARGEST = np.float32(1e38)
_LEVELS = np.float32(127)
_BLOCK_TOKENS = 256  # decoded at once: float32 scratch that stays in the cache of a core


class QuantizedGroups(NamedTuple):
    """Codes with their scales and offsets, as they stand in a segment.

    codes: int8 [num_kv_heads, num_tokens, head_dim]; scales, offsets: float32 that are exact bfloat16 values, keys
    [num_kv_heads, num_groups, head_dim], values [num_kv_heads, num_tokens].
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    offsets: NDArray[np.float32]


class Int8(Codec):
    """Error at most half a step: (max - min) / 254 of the group, plus the rounding of the storage dtype."""

    codec_id = "int8"
    lossless = False

    def __init__(self, group_tokens: int = 64, exact_tokens: int = 4, packer: Packer | None = None) -> None:
        self.group_tokens = group_tokens
        self.exact_tokens = exact_tokens
        self.packer = packer

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `group_tokens` 1 to 65536, `exact_tokens` 0 to 65536, `packer` (configuration or null)."""
        from cag_store.codecs import packer_from_config

        refuse_unknown_keys(cls.codec_id, config, ("group_tokens", "exact_tokens", "packer"))
        packer = config.get("packer")
        return cls(
            checked_int(cls.codec_id, config, "group_tokens", 64, 1, 1 << 16),
            checked_int(cls.codec_id, config, "exact_tokens", 4, 0, 1 << 16),
            None if packer is None else packer_from_config(packer),
        )

    def config(self) -> Config:
        """The full configuration."""
        packer = None if self.packer is None else self.packer.config()
        shape = {"group_tokens": self.group_tokens, "exact_tokens": self.exact_tokens}
        return {"id": self.codec_id, **shape, "packer": packer}

    def encode(self, array: Array, dtype: str, side: Side = "keys", start: int = 0) -> bytes:
        """See `Codec`. Raises: UnencodableArray for NaN, infinities and magnitudes above 1e38."""
        values = widen(checked_array(array, dtype), dtype)
        if not np.all(np.abs(values) <= _LARGEST):
            raise UnencodableArray(
                "codec 'int8' keeps finite values up to 1e38, found NaN, infinity or more: use 'lossless'",
                codec=self.codec_id,
            )
        num_exact = min(max(self.exact_tokens - start, 0), array.shape[1])
        groups = self._quantize(values, side, num_exact)
        codes = groups.codes.tobytes()
        packed = codes if self.packer is None else self.packer.pack(codes)
        smaller = len(packed) < len(codes)
        stored = packed if smaller else codes
        head = _HEAD.pack(_SIDES.index(side), int(smaller), 0, num_exact, len(stored))
        parameters = [_to_bfloat16(groups.scales).tobytes(), _to_bfloat16(groups.offsets).tobytes()]
        return b"".join([head, *parameters, np.ascontiguousarray(array[:, :num_exact]).tobytes(), stored])

    def decode_into(self, data: bytes | memoryview, out: Array) -> None:
        """See `Codec`."""
        side, codes, parameters, exact = self._parse(memoryview(data), out)
        fast = None if out.dtype == np.float16 else loops.compiled_for(out)
        if fast is None:
            self._dequantize(side, codes, parameters, out)
        elif side == "keys":
            fast.dequantize_keys(codes, parameters, self.group_tokens, out)
        else:
            fast.dequantize_values(codes, parameters, out)
        if exact.size:
            out[:, : exact.shape[1]] = exact

    def _dequantize(self, side: Side, codes: NDArray[np.int8], parameters: NDArray[np.uint16], out: Array) -> None:
        """The reference for `Loops.dequantize_keys` and `dequantize_values`, for any storage dtype."""
        with np.errstate(over="ignore"):  # a forged scale may: infinity, as the arithmetic of the format says
            self._dequantize_blocks(side, codes, parameters, out)

    def _dequantize_blocks(
        self, side: Side, codes: NDArray[np.int8], parameters: NDArray[np.uint16], out: Array
    ) -> None:
        scales, offsets = widen(parameters, "bfloat16")
        for first, last in self._blocks(out.shape[1], _BLOCK_TOKENS // self.group_tokens):
            values = codes[:, first:last].astype(np.float32)
            if side == "keys":
                by_group = self._by_group(values)
                group = first // self.group_tokens
                near = slice(group, group + by_group.shape[1])
                by_group *= scales[:, near, None]
                by_group += offsets[:, near, None]
            else:
                values *= scales[:, first:last, None]
                values += offsets[:, first:last, None]
            narrow_into(values, out[:, first:last])

    def _blocks(self, num_tokens: int, num_groups: int) -> list[tuple[int, int]]:
        """Spans of `num_groups` (at least one) whole groups; the tokens of the last, partial group have a span of
        their own."""
        step = max(num_groups, 1) * self.group_tokens
        whole = num_tokens - num_tokens % self.group_tokens
        spans = [(first, min(first + step, whole)) for first in range(0, whole, step)]
        return spans if whole == num_tokens else [*spans, (whole, num_tokens)]

    def _by_group(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """A view `[num_kv_heads, groups, tokens of a group, head_dim]` of a span of `_blocks`."""
        num_heads, num_tokens, head_dim = values.shape
        return values.reshape(num_heads, -1, min(self.group_tokens, num_tokens), head_dim)

    def _quantize(self, values: NDArray[np.float32], side: Side, num_exact: int) -> QuantizedGroups:
        num_heads, num_tokens, head_dim = values.shape
        codes = np.zeros(values.shape, dtype=np.int8)
        if side == "values":
            scales, offsets = np.zeros((2, num_heads, num_tokens), dtype=np.float32)
            found = _quantize_axis(values[:, num_exact:], axis=2)
            codes[:, num_exact:], scales[:, num_exact:], offsets[:, num_exact:] = found
            return QuantizedGroups(codes, scales, offsets)
        blocks = self._blocks(num_tokens, 1)
        scales, offsets = np.zeros((2, num_heads, len(blocks), head_dim), dtype=np.float32)
        for group, (first, last) in enumerate(blocks):
            first = max(first, num_exact)
            if first < last:
                found = _quantize_axis(values[:, first:last], axis=1)
                codes[:, first:last], scales[:, group], offsets[:, group] = found
        return QuantizedGroups(codes, scales, offsets)

    def _parse(self, view: memoryview, out: Array) -> tuple[Side, NDArray[np.int8], NDArray[np.uint16], Array]:
        """Side, codes, scales and offsets as bit patterns `[2, ...]`, and the exact tokens."""
        num_heads, num_tokens, head_dim = out.shape
        if len(view) < _HEAD.size:
            raise corrupt_segment("length", f"at least {_HEAD.size}", len(view))
        side, packed, zero, num_exact, stored = _HEAD.unpack_from(view)
        if side > 1 or packed > 1 or zero or num_exact > min(num_tokens, self.exact_tokens):
            raise corrupt_segment(
                "head", "side, flag and number of exact tokens in range", (side, packed, zero, num_exact)
            )
        shape = (num_tokens,) if side else (-(-num_tokens // self.group_tokens), head_dim)
        exact_at = _HEAD.size + 4 * num_heads * math.prod(shape)
        codes_at = exact_at + num_heads * num_exact * head_dim * out.itemsize
        if codes_at + stored != len(view):
            raise corrupt_segment("length", codes_at + stored, len(view))
        parameters = _checked_bfloat16(view[_HEAD.size : exact_at]).reshape(2, num_heads, *shape)
        exact = np.frombuffer(view[exact_at:codes_at], dtype=out.dtype).reshape(num_heads, num_exact, head_dim)
        codes = self._codes(view[codes_at:], bool(packed), out.size).reshape(out.shape)
        return _SIDES[side], codes, parameters, exact

    def _codes(self, data: memoryview, packed: bool, size: int) -> NDArray[np.int8]:
        if packed and self.packer is None:
            raise corrupt_segment("codes", "not packed", "packed")
        if not packed and len(data) != size:
            raise corrupt_segment("number of codes", size, len(data))
        unpacked = self.packer.unpack(data, size) if packed and self.packer else data
        return np.frombuffer(unpacked, dtype=np.int8)


def _quantize_axis(values: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], Any, Any]:
    """Codes of `values`, and the scales and offsets of the groups that run along `axis` (removed from their shape)."""
    if values.shape[axis] == 0 or values.size == 0:
        empty = np.zeros(np.delete(values.shape, axis), dtype=np.float32)
        return np.zeros(values.shape, dtype=np.int8), empty, empty
    high, low = values.max(axis=axis, keepdims=True), values.min(axis=axis, keepdims=True)
    offsets = widen(_to_bfloat16(high * np.float32(0.5) + low * np.float32(0.5)), "bfloat16")
    reach = np.maximum(high - offsets, offsets - low) / _LEVELS
    scales = widen(_to_bfloat16(reach, up=True), "bfloat16")
    steps = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint((values - offsets) / steps)
    return codes.clip(-127, 127).astype(np.int8), scales.squeeze(axis), offsets.squeeze(axis)


def _to_bfloat16(values: NDArray[np.float32], up: bool = False) -> NDArray[np.uint16]:
    """Bit patterns of `values` in bfloat16: to nearest (half away from zero), or away from zero when `up`."""
    bits = np.ascontiguousarray(values).view(np.uint32) + np.uint32(0xFFFF if up else 0x8000)
    return (bits >> np.uint32(16)).astype("<u2")


def _checked_bfloat16(data: memoryview) -> NDArray[np.uint16]:
    """A copy of bfloat16 bit patterns, aligned as they need not be in a file. Raises: CorruptEntry when one is not
    finite."""
    patterns = np.frombuffer(data, dtype="<u2").astype(np.uint16)
    if (patterns & np.uint16(0x7F80)).max() == 0x7F80:
        raise corrupt_segment("scales and offsets", "finite", "NaN or infinity")
    return patterns
