"""Words of two numbers in 16 bits each, as products of pairs want them, and how vectors are laid out for that, as LLVM
code. Knows codes of 8 and of 4 bits; not what they are multiplied by.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.emit import INT8, INT16, INT32, ROUNDING, Emitter, Value


def rounded_pairs(emit: Emitter, numbers: Value, inverse: Value, distance: int) -> Value:
    """Each lane's number, times `inverse`, in 16 bits, and in the upper half that of the lane `distance` behind it; any
    in the last ones."""
    builder, lanes = emit.builder, emit.lanes
    rounded = builder.bitcast(emit.multiply_add(numbers, inverse, emit.constant(ROUNDING)), emit.integers)
    order = ir.Constant(emit.integers, [(lane + distance) % lanes for lane in range(lanes)])
    other = builder.shuffle_vector(rounded, rounded, order)
    low = builder.and_(rounded, ir.Constant(emit.integers, [0xFFFF] * lanes))
    return builder.or_(low, builder.shl(other, ir.Constant(emit.integers, [16] * lanes)))


def pair_of_codes(emit: Emitter, words: Value, shift: int, bits: int) -> Value:
    """The codes at bit `shift` of both halves of each word: of 8 bits, at 0 or 8, with a sign; of 4 bits without."""
    builder, lanes = emit.builder, emit.lanes
    if bits == 4:
        if shift:
            words = builder.lshr(words, ir.Constant(emit.integers, [shift] * lanes))
        return builder.and_(words, ir.Constant(emit.integers, [0x000F000F] * lanes))
    kind = ir.VectorType(INT16, 2 * lanes)
    eight, halves = ir.Constant(kind, [8] * (2 * lanes)), builder.bitcast(words, kind)
    if not shift:
        halves = builder.shl(halves, eight)
    return builder.bitcast(builder.ashr(halves, eight), emit.integers)


def codes_of_two(emit: Emitter, keys: Sequence[Value], byte: int, bits: int, *, is_upper: bool = False) -> list[Value]:
    """Codes of two keys side by side in words, in the order of `side_by_side`: two vectors, from a byte of each key on;
    of 4 bits the upper or the lower ones."""
    builder, lanes = emit.builder, emit.lanes
    kind, wide = ir.VectorType(INT8, 2 * lanes), ir.VectorType(INT16, 2 * lanes)
    loads = [builder.load(emit.at(key, byte, INT8), typ=kind, align=1) for key in keys]
    rows = [builder.sext(load, wide) if bits == 8 else builder.zext(load, wide) for load in loads]
    found = []
    for half in range(2):
        order = ir.Constant(ir.VectorType(INT32, 2 * lanes), side_by_side(lanes, half))
        words = builder.bitcast(builder.shuffle_vector(*rows, order), emit.integers)
        found.append(words if bits == 8 else pair_of_codes(emit, words, 4 * is_upper, 4))
    return found


def side_by_side(lanes: int, half: int) -> list[int]:
    """Which of two rows' `2 * lanes` numbers each, one row behind the other, come to lie in a vector of pairs: as
    processors do it quickly, the lower (0) or the upper (1) four of each eight."""
    firsts = [eight + 4 * half + number for eight in range(0, 2 * lanes, 8) for number in range(4)]
    return [number for first in firsts for number in (first, 2 * lanes + first)]


def joined_vectors(builder: ir.IRBuilder, parts: Sequence[Value]) -> Value:
    """One vector, or two behind each other."""
    if len(parts) == 1:
        return parts[0]
    order = list(range(sum(part.type.count for part in parts)))
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(INT32, len(order)), order))


def interleaved(builder: ir.IRBuilder, vectors: Sequence[Value]) -> list[Value]:
    """Lane 0 of all vectors, then lane 1 of all, and so on, in as many vectors: a power of two of them."""
    if len(vectors) == 1:
        return list(vectors)
    even, odd = interleaved(builder, vectors[::2]), interleaved(builder, vectors[1::2])
    lanes, found = vectors[0].type.count, []
    for first, second in zip(even, odd, strict=True):
        for half in range(2):
            order = [part + lane + half * lanes // 2 for lane in range(lanes // 2) for part in (0, lanes)]
            found.append(builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(INT32, lanes), order)))
    return found
