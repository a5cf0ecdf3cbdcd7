"""The loops of packer `ranks` in numba: 64 codes a step, as masks of 64 bits and vectors of 64 bytes.

A code's rank is put together as four masks, one a bit; its difference is looked up in a table of 16 bytes by a shuffle.
Codes of the second and third level are dealt out by `pdep` to the places that wait for them. What is read lies inside
of what was measured first: sizes follow from the counts, and positions are compared with these before they are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.emitting import (
    BIT,
    FEATURES,
    INT8,
    INT16,
    INT64,
    array,
    compiled,
    constant,
    copy_bytes,
    extending,
    intrinsic,
    ir,
    load,
    numba,
    pointer,
    store_past,
    types,
)
from cag_store.codecs.ranks import GROUP, PackedRanks
from cag_store.dtypes import Array

HEAD_BYTES = 12 + 13  # counts, table
BYTES, HALVES, WIDE = ir.VectorType(INT8, GROUP), ir.VectorType(INT16, GROUP), ir.VectorType(BIT, GROUP)
_SHUFFLES = {"avx512bw": (64, "llvm.x86.avx512.pshuf.b.512"), "avx2": (32, "llvm.x86.avx2.pshuf.b")}
_MASKS = [types.uint64] * 4


def _lanes(builder: Any, vector: Any, chosen: Any) -> Any:
    """These lanes of a vector."""
    indices = ir.Constant(ir.VectorType(ir.IntType(32), len(chosen)), list(chosen))
    return builder.shuffle_vector(vector, vector, indices)


def _looked_up(builder: Any, table: Any, index: Any) -> Any:
    """`table[index]` of 16 bytes, in each of 64 lanes."""
    for feature, (width, name) in _SHUFFLES.items():
        if FEATURES.get(feature):
            part, repeated = ir.VectorType(INT8, width), _lanes(builder, table, [i % 16 for i in range(width)])
            spans = [range(first, first + width) for first in range(0, GROUP, width)]
            found = [intrinsic(builder, name, part, repeated, _lanes(builder, index, span)) for span in spans]
            whole = ir.Constant(ir.VectorType(ir.IntType(32), GROUP), list(range(GROUP)))
            return builder.shuffle_vector(found[0], found[-1], whole)
    found = constant(BYTES, 0)
    for rank in range(16):
        same = builder.icmp_unsigned("==", index, constant(BYTES, rank))
        found = builder.select(same, _lanes(builder, table, [rank] * GROUP), found)
    return found


def _row(builder: Any, arguments: Any) -> Any:
    """Of four masks and the addresses of a table, of bases and of differences without rank: 64 bytes."""
    *masks, table, base, beside = arguments
    zero, index = INT64(0), constant(BYTES, 0)
    for bit, mask in enumerate(masks):
        lanes = builder.bitcast(mask, WIDE)
        index = builder.or_(index, builder.select(lanes, constant(BYTES, 1 << bit), constant(BYTES, 0)))
    ranked = _looked_up(builder, load(builder, table, zero, ir.VectorType(INT8, 16), 1), index)
    difference = builder.or_(ranked, load(builder, beside, zero, BYTES, 1))
    return builder.add(difference, load(builder, base, zero, BYTES, 1))


def _store_bytes(_: Any, m0: Any, m1: Any, m2: Any, m3: Any, table: Any, base: Any, beside: Any, out: Any) -> Any:  # noqa: ARG001
    """64 bytes to `out`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        *described, out = arguments
        builder.store(_row(builder, described), pointer(builder, out, INT64(0), BYTES), align=1)
        return context.get_dummy_value()

    return types.void(*_MASKS, *[types.int64] * 4), generate


def _store_joined(
    _: Any, m0: Any, m1: Any, m2: Any, m3: Any, table: Any, base: Any, beside: Any, low: Any, out: Any, past: Any  # noqa: ARG001
) -> Any:  # fmt: skip
    """64 elements of 2 bytes to `out`: such bytes above those at `low`, rotated right by a bit. With `past`, `out` is a
    multiple of 64, and they go past the caches."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        *described, low, out, past = arguments
        upper = builder.zext(_row(builder, described), HALVES)
        lower = builder.zext(load(builder, low, INT64(0), BYTES, 1), HALVES)
        pattern = builder.or_(builder.shl(upper, constant(HALVES, 8)), lower)
        rotated = intrinsic(builder, "llvm.fshr.v64i16", HALVES, pattern, pattern, constant(HALVES, 1))
        place = pointer(builder, out, INT64(0), HALVES)
        with builder.if_else(past) as (then, otherwise):
            with then:
                store_past(builder, rotated, place)
            with otherwise:
                builder.store(rotated, place, align=1)
        return context.get_dummy_value()

    return types.void(*_MASKS, *[types.int64] * 5, types.boolean), generate


def _word(_: Any, address: Any) -> Any:  # noqa: ARG001
    """The word at any address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return load(builder, arguments[0], INT64(0), INT64, 1)

    return types.uint64(types.int64), generate


def _popcount(_: Any, mask: Any) -> Any:  # noqa: ARG001
    """How many bits are set."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), generate


def _pdep(_: Any, bits: Any, mask: Any) -> Any:  # noqa: ARG001
    """The lowest of `bits` in the places that `mask` has."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return intrinsic(builder, "llvm.x86.bmi.pdep.64", INT64, *arguments)

    return types.uint64(types.uint64, types.uint64), generate


def _pdep_by_bits(bits: Any, mask: Any) -> Any:
    """`_pdep` where the processor has none."""
    found, one = np.uint64(0), np.uint64(1)
    while mask:
        rest = mask & (mask - one)
        if bits & one:
            found |= mask ^ rest
        bits >>= one
        mask = rest
    return found


store_bytes, store_joined = extending.intrinsic(_store_bytes), extending.intrinsic(_store_joined)
word, popcount = extending.intrinsic(_word), extending.intrinsic(_popcount)
deal_out = extending.intrinsic(_pdep) if FEATURES.get("bmi2") else numba.njit(_pdep_by_bits)


def _count_at(address: Any) -> Any:
    """The 4 bytes at any address as a number."""
    return np.int64(word(address) & np.uint64(0xFFFFFFFF))


count_at = numba.njit(inline="always")(_count_at)


def _bits_at(level: Any, planes: Any, plane: Any, position: Any, last: Any) -> Any:
    """64 bits of a plane from `position` on, of the level at an address, whose last group of words is `last`; behind
    its end they are anything."""
    group, shift = position >> 6, np.uint64(position & 63)
    low = word(level + 8 * (group * planes + plane))
    high = word(level + 8 * (min(group + 1, last) * planes + plane))
    return (low >> shift) | ((high << np.uint64(1)) << (np.uint64(63) - shift))


bits_at = numba.njit(inline="always")(_bits_at)


def _is_padded(level: Any, planes: Any, count: Any) -> Any:
    """Whether the last words of a level are 0 behind its last code."""
    beyond = np.uint64(0)
    if count & 63:
        for plane in range(planes):
            beyond |= word(level + 8 * ((count >> 6) * planes + plane)) >> np.uint64(count & 63)
    return beyond == np.uint64(0)


is_padded = numba.njit(inline="always")(_is_padded)


def _unpack(data: Any, num_bytes: Any, low: Any, out: Any, head_bytes: Any, shape: Any, past: Any) -> Any:
    """Unpack `num_bytes` of ranks at the address `data`, of an array of `shape`, to heads at `out` that are
    `head_bytes` apart: elements of 2 bytes, joined with the bytes at the address `low`; of one byte where that is 0.
    With `past`, `out` and `head_bytes` are multiples of 64, and elements of 2 bytes go past the caches.

    Returns False, and leaves anything at `out`, where sizes are not as they should be, or codes contradict the counts.
    """
    heads, run, channels = shape[0], shape[1] * shape[2], shape[2]
    if num_bytes < HEAD_BYTES:
        return False
    num_second, num_third, num_rest = count_at(data), count_at(data + 4), count_at(data + 8)
    if not num_rest <= num_third <= num_second <= heads * run:
        return False
    groups = heads * ((run + 63) >> 6), (num_second + 63) >> 6, (num_third + 63) >> 6
    first = data + HEAD_BYTES + heads * channels
    second = first + 16 * groups[0]
    third = second + 16 * groups[1]
    rest = third + 24 * groups[2]
    if rest + num_rest != data + num_bytes:
        return False
    table, bases = np.zeros(16, np.uint8), np.empty(channels + 63, np.uint8)
    copy_bytes(data + 12, table.ctypes.data, 3)
    copy_bytes(data + 15, table[4:].ctypes.data, 3)
    copy_bytes(data + 18, table[8:].ctypes.data, 7)
    none, one, width = np.uint64(0), np.uint64(1), 2 if low else 1
    beside, spare, spare_low = np.zeros(64, np.uint8), np.empty(128, np.uint8), np.zeros(64, np.uint8)
    at_second = at_third = at_rest = 0
    for head in range(heads):
        channel, target = 0, out + head * head_bytes
        for begin in range(0, channels + 63, channels):
            base = data + HEAD_BYTES + head * channels
            copy_bytes(base, bases[begin:].ctypes.data, min(channels, channels + 63 - begin))
        for done in range(0, run, 64):
            count, a0, a1 = min(64, run - done), word(first), word(first + 8)
            first += 16
            if count < 64 and (a0 | a1) >> np.uint64(count):
                return False
            e1, e2, e3, b0, b1, c0, c1, c2 = a0 & a1, none, none, none, none, none, none, none
            if e1:
                begin, at_second = at_second, at_second + popcount(e1)
                if at_second > num_second:
                    return False
                b0 = deal_out(bits_at(second, 2, 0, begin, groups[1] - 1), e1)
                b1 = deal_out(bits_at(second, 2, 1, begin, groups[1] - 1), e1)
                e2 = b0 & b1
            if e2:
                begin, at_third = at_third, at_third + popcount(e2)
                if at_third > num_third:
                    return False
                c0 = deal_out(bits_at(third, 3, 0, begin, groups[2] - 1), e2)
                c1 = deal_out(bits_at(third, 3, 1, begin, groups[2] - 1), e2)
                c2 = deal_out(bits_at(third, 3, 2, begin, groups[2] - 1), e2)
                e3 = c0 & c1 & c2
            if e3:
                if at_rest + popcount(e3) > num_rest:
                    return False
                left = e3
                while left:
                    copy_bytes(rest + at_rest, beside[popcount((left - one) & ~left) :].ctypes.data, 1)
                    at_rest += 1
                    left &= left - one
            m0, m1 = (a0 & ~e1) | (b0 & ~e2) | c0, (a1 & ~e1) | (b1 & ~e2) | c1
            m2, m3 = (e1 & ~e2) | c2, e2
            base, place, lower = bases[channel:].ctypes.data, target + done * width, low
            if count < 64:
                place, lower = spare.ctypes.data, spare_low.ctypes.data
                if low:
                    copy_bytes(low, lower, count)
            if low:
                store_joined(
                    m0, m1, m2, m3, table.ctypes.data, base, beside.ctypes.data, lower, place, past and count == 64
                )
                low += count
            else:
                store_bytes(m0, m1, m2, m3, table.ctypes.data, base, beside.ctypes.data, place)
            if count < 64:
                copy_bytes(place, target + done * width, count * width)
            if e3:
                beside[:] = 0
            channel = (channel + 64) % channels
    if at_second != num_second or at_third != num_third or at_rest != num_rest:
        return False
    return is_padded(second, 2, num_second) and is_padded(third, 3, num_third)


_shape = types.UniTuple(types.int64, 3)
_unpack_at = compiled(_unpack, types.boolean(*[types.int64] * 5, _shape, types.boolean))


def _decode_segment(data: Any, num_bytes: Any, out: Any, head_bytes: Any, shape: Any, kind: Any, past: Any) -> Any:
    """Decode a segment of `lossless` of 2-byte elements that is ranks, packed as `kind` says, and a raw plane; whether
    it is one, and whole. `past`: as in `_unpack`, where that is possible."""
    size = shape[0] * shape[1] * shape[2]
    if num_bytes < 16 + size:
        return False
    head, length, low_length = word(data) & np.uint64(0xFFFF), count_at(data + 2), count_at(data + 7)
    low_kind = word(data + 3) >> np.uint64(24) & np.uint64(0xFF)
    if head != np.uint64(2 + 256 * kind) or low_kind != 0 or low_length != size or num_bytes != 11 + length + size:
        return False
    past = past and (out | head_bytes) & 63 == 0
    return _unpack_at(data + 11, length, data + 11 + length, out, head_bytes, shape, past)


decode_segment = compiled(_decode_segment, types.boolean(*[types.int64] * 4, _shape, types.int64, types.boolean))


def _around_medians(plane: Any) -> Any:
    heads, tokens, channels = plane.shape
    found = np.zeros((heads * channels, 256), np.int64)
    medians, counts = np.zeros(heads * channels, np.int64), np.empty(256, np.int64)
    for head in range(heads):
        for token in range(tokens):
            for channel in range(channels):
                found[head * channels + channel, plane[head, token, channel]] += 1
    for channel in range(heads * channels):
        median, below = 0, found[channel, 0]
        while 2 * below < tokens:
            median += 1
            below += found[channel, median]
        counts[:] = found[channel]
        found[channel, : 256 - median] = counts[median:]
        found[channel, 256 - median :] = counts[:median]
        medians[channel] = median
    return medians, found


def _pack(plane: Any, base: Any, rank_of: Any, words: Any, rest: Any) -> Any:
    """Codes of all levels to `words` (one flat array a level, zeros), differences without rank to `rest`; returns how
    many codes the second and the third level have, and how many are in `rest`."""
    heads, tokens, channels = plane.shape
    first, second, third = words
    group = num_second = num_third = num_rest = 0
    for head in range(heads):
        position = 0
        for token in range(tokens):
            for channel in range(channels):
                difference = np.uint8(plane[head, token, channel] - base[head, channel])
                rank = np.int64(rank_of[difference])
                code, bit = np.uint64(rank if rank < 3 else 3), np.uint64(position & 63)
                at = 2 * (group + (position >> 6))
                first[at] |= (code & np.uint64(1)) << bit
                first[at + 1] |= (code >> np.uint64(1)) << bit
                position += 1
                if rank >= 3:
                    code, bit, at = (
                        np.uint64(rank - 3 if rank < 6 else 3),
                        np.uint64(num_second & 63),
                        2 * (num_second >> 6),
                    )
                    second[at] |= (code & np.uint64(1)) << bit
                    second[at + 1] |= (code >> np.uint64(1)) << bit
                    num_second += 1
                if rank >= 6:
                    code, bit, at = (
                        np.uint64(rank - 6 if rank < 13 else 7),
                        np.uint64(num_third & 63),
                        3 * (num_third >> 6),
                    )
                    for plane_bit in range(3):
                        third[at + plane_bit] |= ((code >> np.uint64(plane_bit)) & np.uint64(1)) << bit
                    num_third += 1
                if rank >= 13:
                    rest[num_rest] = difference
                    num_rest += 1
        group += (position + 63) >> 6
    return num_second, num_third, num_rest


_bytes, _words = array(types.uint8, 1), array(types.uint64, 1)
_plane = array(types.uint8, 3, readonly=True)
around_medians = compiled(_around_medians, types.Tuple((array(types.int64, 1), array(types.int64, 2)))(_plane))
_pack_ranks = compiled(
    _pack,
    types.UniTuple(types.int64, 3)(_plane, array(types.uint8, 2), _bytes, types.UniTuple(_words, 3), _bytes),
)


def pack_ranks(plane: NDArray[np.uint8], base: NDArray[np.uint8], rank_of: NDArray[np.uint8]) -> PackedRanks:
    """See `Loops`."""
    groups = -(-plane.size // GROUP)
    words = (
        np.zeros(2 * plane.shape[0] * -(-plane[0].size // GROUP), np.uint64),
        np.zeros(2 * groups, np.uint64),
        np.zeros(3 * groups, np.uint64),
    )
    rest = np.empty(plane.size, np.uint8)
    second, third, num_rest = _pack_ranks(plane, base, rank_of, words, rest)
    used = words[0], words[1][: 2 * -(-second // GROUP)], words[2][: 3 * -(-third // GROUP)]
    return PackedRanks((second, third, num_rest), [part.tobytes() for part in used], rest[:num_rest].tobytes())


def unpack_ranks(data: NDArray[np.uint8], out: Array) -> bool:
    """See `Loops`."""
    return bool(_unpack_at(data.ctypes.data, data.size, 0, out.ctypes.data, out.strides[0], out.shape, False))
