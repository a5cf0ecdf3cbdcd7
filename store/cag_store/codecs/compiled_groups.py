"""Integer codes with scales and offsets to numbers, in numba: the loops of `cag_store.codecs.grouped`.

Rounding as docs/format.md 5.2 defines it: no fused multiply-add, no reassociation. Rows of `out` are addressed by
pointer, because numba vectorizes stores only where the type says that they are contiguous: 34 instead of 0.9 GB/s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.emitting import compiled, numba, row_pointer, types
from cag_store.dtypes import Array, bit_patterns


def _widened(pattern: Any) -> Any:
    """The float32 of a bfloat16 bit pattern."""
    return np.uint32(np.uint32(pattern) << np.uint32(16)).view(np.float32)


def _narrowing(out: Any) -> Any:
    """What is added to the bits of a float32, and by how much they are shifted then, so that the storage dtype of
    `out` stays: bfloat16 (2 bytes) or float32 (4 bytes)."""
    return (np.uint32(0x8000), np.uint32(16)) if out.itemsize == 2 else (np.uint32(0), np.uint32(0))


def _widen_group(parameters: Any, head: Any, group: Any, scales: Any, offsets: Any) -> None:
    """The parameters of a group of tokens, one scale and offset a channel."""
    for i in range(scales.shape[0]):
        scales[i] = widened(parameters[0, head, group, i])
        offsets[i] = widened(parameters[1, head, group, i])


widened = numba.njit(inline="always")(_widened)
narrowing = numba.njit(inline="always")(_narrowing)
widen_group = numba.njit(inline="always")(_widen_group)


def _dequantize_keys(codes: Any, parameters: Any, group_tokens: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half, shift = narrowing(out)
    scales, offsets = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for head in range(num_heads):
        for first in range(0, num_tokens, group_tokens):
            widen_group(parameters, head, first // group_tokens, scales, offsets)
            for token in range(first, min(first + group_tokens, num_tokens)):
                target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (head_dim,))
                row = codes[head, token]
                for i in range(head_dim):
                    value = np.float32(np.float32(row[i]) * scales[i]) + offsets[i]
                    target[i] = (np.float32(value).view(np.uint32) + half) >> shift


def _dequantize_values(codes: Any, parameters: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half, shift = narrowing(out)
    for head in range(num_heads):
        for token in range(num_tokens):
            scale, offset = widened(parameters[0, head, token]), widened(parameters[1, head, token])
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (head_dim,))
            row = codes[head, token]
            for i in range(head_dim):
                value = np.float32(np.float32(row[i]) * scale) + offset
                target[i] = (np.float32(value).view(np.uint32) + half) >> shift


def _dequantize_nibble_keys(codes: Any, parameters: Any, group_tokens: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half_dim = codes.shape[2]
    half, shift = narrowing(out)
    scales, offsets = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for head in range(num_heads):
        for first in range(0, num_tokens, group_tokens):
            widen_group(parameters, head, first // group_tokens, scales, offsets)
            high_scales, high_offsets = scales[half_dim:], offsets[half_dim:]
            for token in range(first, min(first + group_tokens, num_tokens)):
                target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (head_dim,))
                high_target, row = target[half_dim:], codes[head, token]
                for i in range(half_dim):
                    value = np.float32(np.float32(row[i] & 15) * scales[i]) + offsets[i]
                    target[i] = (np.float32(value).view(np.uint32) + half) >> shift
                for i in range(head_dim - half_dim):
                    value = np.float32(np.float32(row[i] >> 4) * high_scales[i]) + high_offsets[i]
                    high_target[i] = (np.float32(value).view(np.uint32) + half) >> shift


def _dequantize_nibble_values(codes: Any, parameters: Any, group_channels: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half_dim = codes.shape[2]
    half, shift = narrowing(out)
    for head in range(num_heads):
        for token in range(num_tokens):
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (head_dim,))
            row = codes[head, token]
            for group in range(parameters.shape[3]):
                first, last = group * group_channels, min((group + 1) * group_channels, head_dim)
                scale, offset = widened(parameters[0, head, token, group]), widened(parameters[1, head, token, group])
                middle = min(max(first, half_dim), last)
                low_target, low_row = target[first:middle], row[first:middle]
                for i in range(middle - first):
                    value = np.float32(np.float32(low_row[i] & 15) * scale) + offset
                    low_target[i] = (np.float32(value).view(np.uint32) + half) >> shift
                high_target, high_row = target[middle:last], row[max(middle - half_dim, 0) :]
                for i in range(last - middle):
                    value = np.float32(np.float32(high_row[i] >> 4) * scale) + offset
                    high_target[i] = (np.float32(value).view(np.uint32) + half) >> shift


_CODES = types.Array(types.int8, 3, "C", readonly=True)
_NIBBLES = types.Array(types.uint8, 3, "C", readonly=True)
_OUT = {2: types.Array(types.uint16, 3, "A"), 4: types.Array(types.uint32, 3, "A")}

keys_at = compiled(
    _dequantize_keys,
    *(types.void(_CODES, types.Array(types.uint16, 4, "C"), types.int64, out) for out in _OUT.values()),
)
values_at = compiled(
    _dequantize_values, *(types.void(_CODES, types.Array(types.uint16, 3, "C"), out) for out in _OUT.values())
)
nibble_keys_at, nibble_values_at = (
    compiled(
        function,
        *(types.void(_NIBBLES, types.Array(types.uint16, 4, "C"), types.int64, out) for out in _OUT.values()),
    )
    for function in (_dequantize_nibble_keys, _dequantize_nibble_values)
)


def dequantize_keys(codes: NDArray[np.int8], parameters: NDArray[np.uint16], group_tokens: int, out: Array) -> None:
    """See `Loops`."""
    keys_at(codes, parameters, group_tokens, bit_patterns(out))


def dequantize_values(codes: NDArray[np.int8], parameters: NDArray[np.uint16], out: Array) -> None:
    """See `Loops`."""
    values_at(codes, parameters, bit_patterns(out))


def dequantize_nibble_keys(
    codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_tokens: int, out: Array
) -> None:
    """See `Loops`."""
    nibble_keys_at(codes, parameters, group_tokens, bit_patterns(out))


def dequantize_nibble_values(
    codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_channels: int, out: Array
) -> None:
    """See `Loops`."""
    nibble_values_at(codes, parameters, group_channels, bit_patterns(out))
