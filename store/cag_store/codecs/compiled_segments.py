"""From verified bytes to numbers or codes, segment by segment, in one call for all segments of a job.

Each segment is hashed and at once decoded, while a core's cache holds it; between the segments nobody asks for the
interpreter's lock. What is not plain (packed codes, planes by zstd, damage, tiny segments) is left for others, who say
what is wrong with it. Layouts: docs/format.md 5.1 to 5.3; rows and results: `cag_store.codecs.loops.Loops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.compiled_groups import keys_at, nibble_keys_at, nibble_values_at, values_at
from cag_store.codecs.compiled_ranks import decode_segment
from cag_store.codecs.compiled_xxh3 import SECRET, is_hash_of
from cag_store.codecs.emitting import array, compiled, copy_bytes, fence, numba, row_pointer, types
from cag_store.codecs.loops import XXH3_ABOVE_BYTES, ChunkSpan

_HEAD_BYTES = 12


def _verified(pieces: Any, hashes: Any, index: Any, secret: Any, sums: Any) -> Any:
    """Whether piece `index` has its hash, or no hashes are given."""
    if hashes.shape[0] == 0:
        return True
    data, size = pieces[index, 0], pieces[index, 1]
    return size > XXH3_ABOVE_BYTES and is_hash_of(data, size, hashes[index], secret, sums)


def _number_at(address: Any, width: Any, anything: Any) -> Any:
    """The little-endian number of `width` bytes at an address, which need not be aligned."""
    found, value = numba.carray(row_pointer(anything, np.uintp(address)), (width,)), np.int64(0)
    for i in range(width):
        value |= np.int64(found[i]) << np.int64(8 * i)
    return value


def _are_finite(address: Any, count: Any, anything: Any) -> Any:
    """Whether `count` scales and as many offsets behind them are finite, and no scale is below 0."""
    patterns = numba.carray(row_pointer(anything, np.uintp(address)), (4 * count,))
    largest_exponent, largest = np.uint16(0), np.uint16(0)
    for i in range(2 * count):  # byte by byte: nothing is aligned in a file
        pattern = np.uint16(patterns[2 * i]) | np.uint16(np.uint16(patterns[2 * i + 1]) << np.uint16(8))
        largest_exponent = max(largest_exponent, np.uint16(pattern & np.uint16(0x7F80)))
        if i < count:
            largest = max(largest, pattern)
    return largest_exponent != 0x7F80 and largest <= 0x8000


verified, number_at, are_finite = (
    numba.njit(inline="always")(function) for function in (_verified, _number_at, _are_finite)
)


def _place(row: Any, span: Any, data: Any, size: Any, anything: Any) -> Any:
    """Groups of a head along tokens and along channels, and where in the segment exact tokens and codes begin. The
    codes are at 0 unless the segment is the one that `row` and `span` describe, with codes unpacked."""
    heads, head_dim, bits, is_keys, group_size, mark, itemsize = row[0], row[1], row[2], row[3], row[4], row[5], row[6]
    tokens, num_first, num_recent = span[1], span[2], span[3]
    groups = -(-tokens // group_size) if is_keys else tokens
    width = head_dim if is_keys else -(-head_dim // group_size)
    exact_at = _HEAD_BYTES + 4 * heads * groups * width
    codes_at = exact_at + heads * (num_first + num_recent) * head_dim * itemsize
    codes_bytes = heads * tokens * (-(-head_dim * bits // 8))
    if size != codes_at + codes_bytes:
        return groups, width, exact_at, 0
    head = number_at(data, 4, anything), number_at(data + 4, 4, anything), number_at(data + 8, 4, anything)
    is_plain = head == (np.int64(0 if is_keys else 1) | (mark << 16), num_first, codes_bytes)
    is_plain = is_plain and are_finite(data + _HEAD_BYTES, heads * groups * width, anything)
    return groups, width, exact_at, codes_at if is_plain else 0


place = numba.njit(inline="always")(_place)


def _dequantize(row: Any, tokens: Any, groups: Any, width: Any, scales: Any, codes: Any, out: Any, kinds: Any) -> Any:
    """`tokens` tokens of codes at address `codes` to the numbers at address `out`; `row` as in `decode_grouped`."""
    heads, head_dim, bits, is_keys, group_size, head_bytes = row[0], row[1], row[2], row[3], row[4], row[8]
    signed, unsigned, patterns = kinds
    count = 2 * heads * groups * width
    parameters = np.empty(count, np.uint16)
    copy_bytes(scales, np.int64(parameters.ctypes.data), 2 * count)
    by_group = parameters.reshape((2, heads, groups, width))
    room = head_bytes // (2 * head_dim)  # tokens from head to head
    whole = numba.carray(row_pointer(patterns, np.uintp(out)), (heads, max(room, tokens), head_dim))
    target, shape = whole[:, :tokens], (heads, tokens, -(-head_dim * bits // 8))
    if bits == 8:
        bytewise = numba.carray(row_pointer(signed, np.uintp(codes)), shape)
        if is_keys:
            keys_at(bytewise, by_group, group_size, target)
        else:
            values_at(bytewise, parameters.reshape((2, heads, groups)), target)
    else:
        nibbles = numba.carray(row_pointer(unsigned, np.uintp(codes)), shape)
        if is_keys:
            nibble_keys_at(nibbles, by_group, group_size, target)
        else:
            nibble_values_at(nibbles, by_group, group_size, target)


_TABLE, _HASHES, _DONE = array(types.int64, 2), array(types.uint64, 2), array(types.boolean, 1)
_ROW, _SPAN, _BYTES, _SUMS = array(types.int64, 1), array(types.int64, 1), array(types.uint8, 1), array(types.uint64, 1)
KINDS = types.Tuple((array(types.int8, 1), _BYTES, array(types.uint16, 1)))
dequantize = compiled(_dequantize, types.void(_ROW, *[types.int64] * 6, KINDS))


def _decode_grouped(
    pieces: Any, hashes: Any, rows: Any, span: Any, secret: Any, sums: Any, kinds: Any, done: Any
) -> None:
    start, tokens, num_first, num_recent = span[0], span[1], span[2], span[3]
    for index in range(pieces.shape[0]):
        if not verified(pieces, hashes, index, secret, sums):
            continue
        data, row = pieces[index, 0], rows[index]
        groups, width, exact_at, codes_at = place(row, span, data, pieces[index, 1], kinds[1])
        if codes_at == 0:
            continue
        token_bytes = row[1] * row[6]
        out = row[7] + start * token_bytes
        dequantize(row, tokens, groups, width, data + _HEAD_BYTES, data + codes_at, out, kinds)
        exact = data + exact_at
        for head in range(row[0]):
            target = out + head * row[8]
            copy_bytes(exact, target, num_first * token_bytes)
            exact += num_first * token_bytes
            copy_bytes(exact, target + (tokens - num_recent) * token_bytes, num_recent * token_bytes)
            exact += num_recent * token_bytes
        done[index] = True


def _keep_grouped(
    pieces: Any, hashes: Any, rows: Any, span: Any, secret: Any, sums: Any, anything: Any, done: Any
) -> None:
    start, tokens, num_first, num_recent = span[0], span[1], span[2], span[3]
    coded = tokens - num_recent
    for index in range(pieces.shape[0]):
        if not verified(pieces, hashes, index, secret, sums):
            continue
        data, row = pieces[index, 0], rows[index]
        groups, width, exact_at, codes_at = place(row, span, data, pieces[index, 1], anything)
        if codes_at == 0:
            continue
        heads, row_bytes, token_bytes = row[0], -(-row[1] * row[2] // 8), row[1] * row[6]
        before, kept = (start // row[4], -(-coded // row[4])) if row[3] else (start, coded)
        scales, exact = data + _HEAD_BYTES, data + exact_at
        offsets = scales + 2 * heads * groups * width
        for head in range(heads):
            codes, group = data + codes_at + head * tokens * row_bytes, 2 * head * groups * width
            copy_bytes(codes, row[7] + head * row[8] + start * row_bytes, coded * row_bytes)
            copy_bytes(scales + group, row[9] + head * row[10] + 2 * before * width, 2 * kept * width)
            copy_bytes(offsets + group, row[11] + head * row[12] + 2 * before * width, 2 * kept * width)
            copy_bytes(exact, row[13] + head * row[14] + start * token_bytes, num_first * token_bytes)
            exact += num_first * token_bytes
            copy_bytes(exact, row[15] + head * row[16], num_recent * token_bytes)
            exact += num_recent * token_bytes
        done[index] = True


def _decode_ranked(
    pieces: Any, hashes: Any, rows: Any, span: Any, kind: Any, secret: Any, sums: Any, done: Any
) -> None:
    past = hashes.shape[0] > 0  # a second pass over bytes that the cache holds: nothing else waits for memory
    for index in range(pieces.shape[0]):
        if verified(pieces, hashes, index, secret, sums):
            heads, head_dim, out, head_bytes = rows[index, 0], rows[index, 1], rows[index, 2], rows[index, 3]
            shape = heads, span[1], head_dim
            data, size = pieces[index, 0], pieces[index, 1]
            done[index] = decode_segment(data, size, out + 2 * span[0] * head_dim, head_bytes, shape, kind, past)
    if past:
        fence()


_COMMON = (_TABLE, _HASHES, _TABLE, _SPAN)
grouped = compiled(_decode_grouped, types.void(*_COMMON, _BYTES, _SUMS, KINDS, _DONE))
kept = compiled(_keep_grouped, types.void(*_COMMON, _BYTES, _SUMS, _BYTES, _DONE))
ranked = compiled(_decode_ranked, types.void(*_COMMON, types.int64, _BYTES, _SUMS, _DONE))
EMPTY = tuple(np.empty(0, dtype) for dtype in (np.int8, np.uint8, np.uint16))


def decode_ranked(
    pieces: NDArray[np.int64], hashes: NDArray[np.uint64], rows: NDArray[np.int64], span: ChunkSpan, kind: int
) -> NDArray[np.bool_]:
    """See `Loops`."""
    done = np.zeros(len(pieces), np.bool_)
    ranked(pieces, hashes, rows, np.array(span, np.int64), kind, SECRET, np.empty(8, np.uint64), done)
    return done


def decode_grouped(
    pieces: NDArray[np.int64], hashes: NDArray[np.uint64], rows: NDArray[np.int64], span: ChunkSpan
) -> NDArray[np.bool_]:
    """See `Loops`."""
    done = np.zeros(len(pieces), np.bool_)
    grouped(pieces, hashes, rows, np.array(span, np.int64), SECRET, np.empty(8, np.uint64), EMPTY, done)
    return done


def keep_grouped(
    pieces: NDArray[np.int64], hashes: NDArray[np.uint64], rows: NDArray[np.int64], span: ChunkSpan
) -> NDArray[np.bool_]:
    """See `Loops`."""
    done = np.zeros(len(pieces), np.bool_)
    kept(pieces, hashes, rows, np.array(span, np.int64), SECRET, np.empty(8, np.uint64), EMPTY[1], done)
    return done
