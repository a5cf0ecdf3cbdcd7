"""The loops of `cag_store.codecs.loops.Loops` in numba, compiled for this machine when the module is imported and
kept in numba's cache.

`out` may be strided across heads and tokens; its rows are addressed by pointer, because numba vectorizes stores only
where the type says that they are contiguous: 34 instead of 0.9 GB/s. Rounding as docs/format.md 5.2 defines it: no
fused multiply-add, no reassociation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import compiled_ranks
from cag_store.codecs.emitting import compiled, copy_bytes, numba, row_pointer, types
from cag_store.dtypes import Array, bit_patterns


def _widened(pattern: Any) -> Any:
    """The float32 of a bfloat16 bit pattern."""
    return np.uint32(np.uint32(pattern) << np.uint32(16)).view(np.float32)


def _narrowing(out: Any) -> Any:
    """What is added to the bits of a float32, and by how much they are shifted then, so that the storage dtype of
    `out` stays: bfloat16 (2 bytes) or float32 (4 bytes)."""
    return (np.uint32(0x8000), np.uint32(16)) if out.itemsize == 2 else (np.uint32(0), np.uint32(0))


widened = numba.njit(inline="always")(_widened)
narrowing = numba.njit(inline="always")(_narrowing)


def _run(out: Any) -> Any:
    """How many elements of `out` lie behind one another."""
    row = out.shape[2]
    return out.shape[1] * row if out.strides[1] == row * out.itemsize else row


contiguous_run = numba.njit(inline="always")(_run)


def _join_two(high: Any, low: Any, out: Any) -> None:
    head_dim, run = out.shape[2], contiguous_run(out)
    first = 0
    for head in range(out.shape[0]):
        for token in range(0, out.shape[1], run // head_dim):
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (run,))
            upper, lower = high[first : first + run], low[first : first + run]
            for i in range(run):
                target[i] = (upper[i] << 7) | (lower[i] >> 1) | ((lower[i] & 1) << 15)
            first += run


def _join_four(plane_3: Any, plane_2: Any, plane_1: Any, plane_0: Any, out: Any) -> None:
    head_dim, run = out.shape[2], contiguous_run(out)
    first = 0
    for head in range(out.shape[0]):
        for token in range(0, out.shape[1], run // head_dim):
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (run,))
            third, second = plane_3[first : first + run], plane_2[first : first + run]
            upper, lower = plane_1[first : first + run], plane_0[first : first + run]
            for i in range(run):
                bits = (
                    (np.uint32(third[i]) << 24) | (np.uint32(second[i]) << 16) | (np.uint32(upper[i]) << 8) | lower[i]
                )
                target[i] = (bits >> 1) | ((bits & 1) << 31)
            first += run


def _dequantize_keys(codes: Any, parameters: Any, group_tokens: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half, shift = narrowing(out)
    scales, offsets = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for head in range(num_heads):
        for first in range(0, num_tokens, group_tokens):
            for i in range(head_dim):
                scales[i] = widened(parameters[0, head, first // group_tokens, i])
                offsets[i] = widened(parameters[1, head, first // group_tokens, i])
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
            for i in range(head_dim):
                scales[i] = widened(parameters[0, head, first // group_tokens, i])
                offsets[i] = widened(parameters[1, head, first // group_tokens, i])
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


def _copy_checked(spans: Any, checks: Any, anything: Any) -> Any:
    for index in range(checks.shape[0]):
        count = checks[index, 1]
        patterns = numba.carray(row_pointer(anything, np.uintp(checks[index, 0])), (2 * count,))
        largest_exponent, largest = np.uint16(0), np.uint16(0)
        for i in range(count):  # byte by byte: nothing is aligned in a file
            pattern = np.uint16(patterns[2 * i]) | np.uint16(np.uint16(patterns[2 * i + 1]) << np.uint16(8))
            largest_exponent = max(largest_exponent, np.uint16(pattern & np.uint16(0x7F80)))
            largest = max(largest, pattern)
        if largest_exponent == 0x7F80 or (checks[index, 2] and largest > 0x8000):
            return False
    for index in range(spans.shape[0]):
        copy_bytes(spans[index, 0], spans[index, 1], spans[index, 2])
    return True


_PLANE = types.Array(types.uint8, 1, "C", readonly=True)
_CODES = types.Array(types.int8, 3, "C", readonly=True)
_NIBBLES = types.Array(types.uint8, 3, "C", readonly=True)
_OUT = {2: types.Array(types.uint16, 3, "A"), 4: types.Array(types.uint32, 3, "A")}

_join = {
    2: compiled(_join_two, types.void(_PLANE, _PLANE, _OUT[2])),
    4: compiled(_join_four, types.void(_PLANE, _PLANE, _PLANE, _PLANE, _OUT[4])),
}
_keys = compiled(
    _dequantize_keys,
    *(types.void(_CODES, types.Array(types.uint16, 4, "C"), types.int64, out) for out in _OUT.values()),
)
_values = compiled(
    _dequantize_values, *(types.void(_CODES, types.Array(types.uint16, 3, "C"), out) for out in _OUT.values())
)
_nibble_keys, _nibble_values = (
    compiled(
        function,
        *(types.void(_NIBBLES, types.Array(types.uint16, 4, "C"), types.int64, out) for out in _OUT.values()),
    )
    for function in (_dequantize_nibble_keys, _dequantize_nibble_values)
)


def _dequantize_segments(segments: Any, signed: Any, unsigned: Any, patterns: Any) -> None:
    for index in range(segments.shape[0]):
        codes_at, scales_at, out_at, head_bytes = segments[index, :4]
        heads, tokens, head_dim, row_bytes, groups, group_width, group_size = segments[index, 4:11]
        count = 2 * heads * groups * group_width
        parameters = np.empty(count, np.uint16)
        copy_bytes(scales_at, np.int64(parameters.ctypes.data), 2 * count)
        shape = heads, tokens, row_bytes
        room = head_bytes // (2 * head_dim)  # tokens from head to head
        whole = numba.carray(row_pointer(patterns, np.uintp(out_at)), (heads, max(room, tokens), head_dim))
        out, by_group = whole[:, :tokens], parameters.reshape((2, heads, groups, group_width))
        if segments[index, 11] == 8:
            codes = numba.carray(row_pointer(signed, np.uintp(codes_at)), shape)
            if segments[index, 12]:
                _keys(codes, by_group, group_size, out)
            else:
                _values(codes, parameters.reshape((2, heads, groups)), out)
        else:
            nibbles = numba.carray(row_pointer(unsigned, np.uintp(codes_at)), shape)
            if segments[index, 12]:
                _nibble_keys(nibbles, by_group, group_size, out)
            else:
                _nibble_values(nibbles, by_group, group_size, out)


_TABLE = types.Array(types.int64, 2, "C")
_checked = compiled(_copy_checked, types.boolean(_TABLE, _TABLE, types.Array(types.uint8, 1, "C")))
_EMPTY = tuple(np.empty(0, dtype) for dtype in (np.int8, np.uint8, np.uint16))
_segments = compiled(
    _dequantize_segments,
    types.void(_TABLE, *(types.Array(kind, 1, "C") for kind in (types.int8, types.uint8, types.uint16))),
)


def copy_checked(spans: NDArray[np.int64], checks: NDArray[np.int64]) -> bool:
    """See `Loops`."""
    return bool(_checked(spans, checks, _EMPTY[1]))


def dequantize_segments(segments: NDArray[np.int64]) -> None:
    """See `Loops`."""
    _segments(segments, *_EMPTY)


around_medians, pack_ranks = compiled_ranks.around_medians, compiled_ranks.pack_ranks
unpack_ranks, decode_ranked = compiled_ranks.unpack_ranks, compiled_ranks.decode_ranked


def join_planes(planes: list[NDArray[np.uint8]], out: Array) -> None:
    """See `Loops`."""
    _join[out.itemsize](*planes, out)


def dequantize_keys(codes: NDArray[np.int8], parameters: NDArray[np.uint16], group_tokens: int, out: Array) -> None:
    """See `Loops`."""
    _keys(codes, parameters, group_tokens, bit_patterns(out))


def dequantize_values(codes: NDArray[np.int8], parameters: NDArray[np.uint16], out: Array) -> None:
    """See `Loops`."""
    _values(codes, parameters, bit_patterns(out))


def dequantize_nibble_keys(
    codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_tokens: int, out: Array
) -> None:
    """See `Loops`."""
    _nibble_keys(codes, parameters, group_tokens, bit_patterns(out))


def dequantize_nibble_values(
    codes: NDArray[np.uint8], parameters: NDArray[np.uint16], group_channels: int, out: Array
) -> None:
    """See `Loops`."""
    _nibble_values(codes, parameters, group_channels, bit_patterns(out))
