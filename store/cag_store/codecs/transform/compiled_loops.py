"""The loops of `cag_store.codecs.transform.loops.Loops` in numba, compiled for this machine when the module is
imported and kept in
numba's cache.

The integer product is emitted as vector instructions that multiply pairs of 16-bit numbers and add them to 32-bit sums,
in the widest form that this processor has. Sums wrap; no step rounds before `finish`, which rounds as docs/format.md
5.4 says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.compiled_loops import narrowing, row_pointer
from cag_store.codecs.transform.product import PANEL, ROWS
from cag_store.codecs.transform.rans import LANES, LOWEST_STATE, NUM_SYMBOLS, PROBABILITY_BITS
from cag_store.dtypes import Array, bit_patterns

# untyped, and not installed everywhere
numba = importlib.import_module("numba")
types = numba.types
_extending = importlib.import_module("numba.extending")
ir: Any = importlib.import_module("llvmlite.ir")
_binding = importlib.import_module("llvmlite.binding")
cgutils: Any = importlib.import_module("numba.core.cgutils")

_SLOT_MASK = (1 << PROBABILITY_BITS) - 1
_FULL_SHIFT = 32 - PROBABILITY_BITS
_HALF_SYMBOLS = NUM_SYMBOLS // 2


def _compiled(function: Callable[..., Any], *signatures: Any) -> Any:
    """`function` compiled ahead for `signatures`; without numba's cache where no folder for it can be written."""
    try:
        return numba.njit(list(signatures), nogil=True, cache=True)(function)
    except RuntimeError:
        return numba.njit(list(signatures), nogil=True)(function)


def _encode(symbols: Any, classes: Any, frequencies: Any, starts: Any, states: Any, words: Any) -> Any:
    num_tokens, num_components = symbols.shape
    position = len(words)
    for token in range(num_tokens - 1, -1, -1):
        for component in range(num_components - 1, -1, -1):
            lane = (token * num_components + component) % LANES
            symbol = symbols[token, component]
            frequency = np.uint64(frequencies[classes[component], symbol])
            state = np.uint64(states[lane])
            if state >= frequency << np.uint64(_FULL_SHIFT):
                position -= 1
                words[position] = np.uint16(state & np.uint64(0xFFFF))
                state >>= np.uint64(16)
            start = np.uint64(starts[classes[component], symbol])
            states[lane] = np.uint32((state // frequency << np.uint64(PROBABILITY_BITS)) + state % frequency + start)
    return position


def _decode(states: Any, words: Any, classes: Any, slots: Any, shifts: Any, low: Any, escapes: Any, codes: Any) -> Any:
    num_components = len(classes)
    position, limit, lane, escape = 0, len(words), 0, 0
    bit: Any = 0
    for token in range(codes.shape[0]):
        row = codes[token]
        for component in range(num_components):
            state = states[lane]
            slot = slots[classes[component], state & np.uint32(_SLOT_MASK)]
            frequency = slot >> np.uint32(PROBABILITY_BITS) & np.uint32(_SLOT_MASK)
            state = np.uint32(frequency * (state >> np.uint32(PROBABILITY_BITS)) + (slot & np.uint32(_SLOT_MASK)))
            if state < np.uint32(LOWEST_STATE):
                if position == limit:
                    return False
                state = np.uint32(state << np.uint32(16)) | np.uint32(words[position])
                position += 1
            states[lane] = state
            lane = (lane + 1) & (LANES - 1)
            symbol = np.int32(slot >> np.uint32(24))
            shift = np.int32(shifts[component])
            value: Any = (symbol - np.int32(_HALF_SYMBOLS)) << shift
            if shift > 0:
                first = bit >> 3
                window = np.uint32(low[first]) | np.uint32(low[first + 1]) << 8 | np.uint32(low[first + 2]) << 16
                value += np.int32((window >> np.uint32(bit & 7)) & np.uint32((1 << shift) - 1))
                bit += shift
            if symbol == 0:
                if escape == len(escapes):
                    return False
                value = np.int32(escapes[escape])
                escape += 1
            row[component] = np.int16(value)
    for state in states:
        if state != np.uint32(LOWEST_STATE):
            return False
    return position == limit and escape == len(escapes)


def _madd(builder: Any, sums: Any, left: Any, right: Any, lanes: int, features: Any) -> Any:
    """`sums + left.low * right.low + left.high * right.high` on vectors of `lanes` pairs of 16-bit numbers."""
    words, halves = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(ir.IntType(16), 2 * lanes)
    module = builder.module
    if lanes == 16 and features.get("avx512vnni"):
        function = module.declare_intrinsic(
            "llvm.x86.avx512.vpdpwssd.512", fnty=ir.FunctionType(words, [words, words, words])
        )
        return builder.call(function, [sums, left, right])
    names = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd"}
    if lanes in names:
        function = module.declare_intrinsic(names[lanes], fnty=ir.FunctionType(words, [halves, halves]))
        return builder.add(sums, builder.call(function, [builder.bitcast(v, halves) for v in (left, right)]))
    by = ir.Constant(words, [16] * lanes)
    high = builder.mul(builder.ashr(left, by), builder.ashr(right, by))
    low = builder.mul(*(builder.ashr(builder.shl(v, by), by) for v in (left, right)))
    return builder.add(sums, builder.add(high, low))


def _vector_shape() -> tuple[int, int, Any]:
    """32-bit lanes of a vector, vectors of a row that are summed together, and the processor's features."""
    features = dict(_binding.get_host_cpu_features())
    if features.get("avx512bw"):
        return 16, 4, features
    return (8, 2, features) if features.get("avx2") else (4, 2, features)


def _tile(
    typing_context: Any,  # noqa: ARG001
    codes: Any,
    stride: Any,
    packed: Any,
    pairs: Any,
    sums: Any,
    width: Any,
) -> Any:
    """Sums of ROWS tokens by PANEL channels, from addresses of codes, packed rows and sums; `stride` is in bytes
    between
    tokens of codes, `width` between those of sums."""
    del codes, stride, packed, pairs, sums, width

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        address, step, rows, count, target, row_bytes = arguments
        lanes, vectors, features = _vector_shape()
        vector = ir.VectorType(ir.IntType(32), lanes)
        index = ir.IntType(64)

        def pointer(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), ir.PointerType(kind))

        def spread(number: Any) -> Any:
            single = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.IntType(32)(0))
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            return builder.shuffle_vector(single, single, mask)

        for part in range(0, PANEL, lanes * vectors):
            held = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(ROWS)]
            for row in held:
                for slot in row:
                    builder.store(ir.Constant(vector, [0] * lanes), slot)
            with cgutils.for_range(builder, count, intp=index) as loop:
                base = builder.mul(loop.index, index(4 * PANEL))
                right = [
                    builder.load(pointer(rows, builder.add(base, index(4 * (part + lanes * i))), vector), align=4)
                    for i in range(vectors)
                ]
                for number, row in enumerate(held):
                    offset = builder.add(builder.mul(step, index(number)), builder.mul(loop.index, index(4)))
                    left = spread(builder.load(pointer(address, offset, ir.IntType(32)), align=4))
                    for slot, vectored in zip(row, right, strict=True):
                        builder.store(_madd(builder, builder.load(slot), left, vectored, lanes, features), slot)
            for number, row in enumerate(held):
                for i, slot in enumerate(row):
                    offset = builder.add(builder.mul(row_bytes, index(number)), index(4 * (part + lanes * i)))
                    builder.store(builder.load(slot), pointer(target, offset, vector), align=4)
        return context.get_dummy_value()

    return types.void(types.uintp, types.int64, types.uintp, types.int64, types.uintp, types.int64), generate


tile = _extending.intrinsic(_tile)


def _product(codes: Any, packed: Any, sums: Any) -> None:
    """`codes` [multiple of ROWS, even], `sums` [as many, multiple of PANEL]; `packed` as `pack_rows` gives it."""
    stride, width = np.int64(2 * codes.shape[1]), np.int64(4 * sums.shape[1])
    panels, pairs = packed.shape[0], np.int64(packed.shape[1])
    first_code, first_row, first_sum = codes.ctypes.data, packed.ctypes.data, sums.ctypes.data
    for panel in range(panels):
        rows = first_row + panel * pairs * 4 * PANEL
        for token in range(0, codes.shape[0], ROWS):
            tile(
                np.uintp(first_code + token * stride),
                stride,
                np.uintp(rows),
                pairs,
                np.uintp(first_sum + token * width + panel * 4 * PANEL),
                width,
            )


def _finish(sums: Any, scale: Any, mean: Any, cosines: Any, sines: Any, first: Any, second: Any, out: Any) -> None:
    num_heads, num_tokens, head_dim = out.shape
    half, shift = narrowing(out)
    num_pairs = len(first)
    halves = num_pairs > 0 and second[0] == num_pairs
    values, turned = np.empty(head_dim, np.float32), np.empty(head_dim, np.float32)
    for head in range(num_heads):
        begin = head * head_dim
        for token in range(num_tokens):
            row = sums[token, begin : begin + head_dim]
            for i in range(head_dim):
                values[i] = np.float32(np.float32(row[i]) * scale[begin + i]) + mean[begin + i]
            if halves:
                cosine_row, sine_row = cosines[token], sines[token]
                for i in range(num_pairs):
                    turned[i] = np.float32(values[i] * cosine_row[i]) - np.float32(values[i + num_pairs] * sine_row[i])
                for i in range(num_pairs):
                    other = values[i + num_pairs]
                    values[i + num_pairs] = np.float32(other * cosine_row[i]) + np.float32(values[i] * sine_row[i])
                for i in range(num_pairs):
                    values[i] = turned[i]
            else:
                for i in range(num_pairs):
                    one, two = values[first[i]], values[second[i]]
                    cosine, sine = cosines[token, i], sines[token, i]
                    values[first[i]] = np.float32(one * cosine) - np.float32(two * sine)
                    values[second[i]] = np.float32(two * cosine) + np.float32(one * sine)
            target = numba.carray(row_pointer(out, out[head, token].ctypes.data), (head_dim,))
            for i in range(head_dim):
                target[i] = (np.float32(values[i]).view(np.uint32) + half) >> shift


def _array(kind: Any, ndim: int, readonly: bool = False) -> Any:
    return types.Array(kind, ndim, "C", readonly=readonly)


_U8, _U16, _U32 = types.uint8, types.uint16, types.uint32
_OUT = {2: types.Array(_U16, 3, "A"), 4: types.Array(_U32, 3, "A")}

_encode_loop = _compiled(
    _encode,
    types.int64(_array(_U8, 2), _array(_U8, 1), _array(_U32, 2), _array(_U32, 2), _array(_U32, 1), _array(_U16, 1)),
)
_decode_loop = _compiled(
    _decode,
    types.boolean(
        _array(_U32, 1),
        _array(_U16, 1),
        _array(_U8, 1),
        _array(_U32, 2),
        _array(_U8, 1),
        _array(_U8, 1, readonly=True),
        _array(types.int16, 1),
        types.Array(types.int16, 2, "A"),
    ),
)
_product_loop = _compiled(_product, types.void(_array(types.int16, 2), _array(types.int16, 4), _array(types.int32, 2)))
_FLOATS = _array(types.float32, 1)
_finish_loop = _compiled(
    _finish,
    *(
        types.void(
            types.Array(types.int32, 2, "A"),
            _FLOATS,
            _FLOATS,
            _array(types.float32, 2),
            _array(types.float32, 2),
            _array(types.int64, 1),
            _array(types.int64, 1),
            out,
        )
        for out in _OUT.values()
    ),
)


def encode_symbols(
    symbols: NDArray[np.uint8],
    classes: NDArray[np.uint8],
    frequencies: NDArray[np.uint32],
    starts: NDArray[np.uint32],
) -> tuple[NDArray[np.uint32], NDArray[np.uint16]]:
    """See `Loops`."""
    states = np.full(LANES, LOWEST_STATE, np.uint32)
    words = np.empty(symbols.size, np.uint16)
    first = _encode_loop(symbols, classes, frequencies, starts, states, words)
    return states, words[first:]


def decode_codes(
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
    classes: NDArray[np.uint8],
    slots: NDArray[np.uint32],
    shifts: NDArray[np.uint8],
    low: NDArray[np.uint8],
    escapes: NDArray[np.int16],
    codes: NDArray[np.int16],
) -> bool:
    """See `Loops`."""
    return bool(_decode_loop(states, words, classes, slots, shifts, low, escapes, codes))


def integer_product(codes: NDArray[np.int16], packed: NDArray[np.int16], sums: NDArray[np.int32]) -> None:
    """See `Loops`."""
    _product_loop(codes, packed, sums)


def finish(
    sums: NDArray[np.int32],
    scale: NDArray[np.float32],
    mean: NDArray[np.float32],
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
    pairs: NDArray[np.int64],
    out: Array,
) -> None:
    """See `Loops`."""
    first, second = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    _finish_loop(sums, scale, mean, cosines, sines, first, second, bit_patterns(out))
