"""The loops of `cag_store.codecs.transform.loops.Loops` in numba, compiled for this machine when the module is
imported and kept (`kept_code`).

What numba cannot vectorize is emitted as instructions (`compiled_decode`, `compiled_product`). No step rounds before
`finish`, which rounds as docs/format.md 5.4 says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.compiled_groups import narrowing
from cag_store.codecs.emitting import array, compiled, numba, row_pointer, types
from cag_store.codecs.transform import compiled_decode
from cag_store.codecs.transform.compiled_costs import add_costs
from cag_store.codecs.transform.compiled_decode import decode_block
from cag_store.codecs.transform.compiled_finish import WIDTH, finish_row
from cag_store.codecs.transform.compiled_product import Operand, PackedRows, integer_product
from cag_store.codecs.transform.rans import LANES, LOWEST_STATE, PROBABILITY_BITS, Layout, Stream, Tables
from cag_store.codecs.transform.symbols import ESCAPE, LEAST_SHIFT, MIDDLE, NUM_SYMBOLS, SHIFTS
from cag_store.dtypes import Array, bit_patterns
from cag_store.scratch import mapped_array

__all__ = ["Operand", "PackedRows", "decode_codes", "encode_codes", "finish", "integer_product", "shift_costs"]

_SLOT_MASK = (1 << PROBABILITY_BITS) - 1
_FULL_SHIFT = 32 - PROBABILITY_BITS
_COST_COLUMNS = 1 << 16  # whose costs, of 28 bits at most each, cannot overflow a sum of 32


def _encode(
    codes: Any, numbers: Any, low: Any, token_shifts: Any, frequencies: Any, starts: Any, states: Any, words: Any,
    escapes: Any,
) -> Any:  # fmt: skip
    """Writes words and escapes from the end of their arrays on; returns where they begin."""
    num_tokens, num_components = codes.shape
    position, escape, last = len(words), len(escapes), len(frequencies) - 1
    for first in range((num_tokens - 1) // LANES * LANES, -1, -LANES):
        count = min(LANES, num_tokens - first)
        for component in range(num_components - 1, -1, -1):
            bits = np.uint32(low[component])
            if bits > 0:
                for lane in range(count - 1, -1, -1):
                    state: Any = np.uint64(states[lane])
                    code: Any = np.int32(codes[first + lane, component])
                    if state >= np.uint64(1) << np.uint64(np.uint32(32) - bits):
                        position -= 1
                        words[position] = np.uint16(state & np.uint64(0xFFFF))
                        state >>= np.uint64(16)
                    below = np.uint64(np.uint32(code) & np.uint32((np.uint32(1) << bits) - np.uint32(1)))
                    states[lane] = np.uint32(state << np.uint64(bits) | below)
            for lane in range(count - 1, -1, -1):
                code = np.int32(codes[first + lane, component])
                table = min(max(numbers[component] + token_shifts[first + lane], 0), last)
                symbol: Any = (code >> np.int32(bits)) + MIDDLE
                if symbol <= ESCAPE or symbol >= NUM_SYMBOLS or frequencies[table, symbol] == 0:
                    symbol = ESCAPE
                    escape -= 1
                    escapes[escape] = np.int16(code)
                state, frequency = np.uint64(states[lane]), np.uint64(frequencies[table, symbol])
                if state >= frequency << np.uint64(_FULL_SHIFT):
                    position -= 1
                    words[position] = np.uint16(state & np.uint64(0xFFFF))
                    state >>= np.uint64(16)
                start = np.uint64(starts[table, symbol])
                states[lane] = np.uint32(
                    (state // frequency << np.uint64(PROBABILITY_BITS)) + state % frequency + start
                )
    return position, escape


def _decode(
    states: Any, words: Any, num_words: Any, escapes: Any, num_escapes: Any, numbers: Any, low: Any, token_shifts: Any,
    slots: Any, codes: Any,
) -> Any:  # fmt: skip
    """One lane after the other: for processors without the instructions of `compiled_decode`."""
    num_tokens, num_components = codes.shape
    position, escape, last = 0, 0, len(slots) - 1
    escaped = np.empty(LANES, np.bool_)
    for first in range(0, num_tokens, LANES):
        count = min(LANES, num_tokens - first)
        for component in range(num_components):
            bits = np.uint32(low[component])
            for lane in range(count):
                state = states[lane]
                table = min(max(numbers[component] + token_shifts[first + lane], 0), last)
                slot = slots[table, state & np.uint32(_SLOT_MASK)]
                frequency = slot >> np.uint32(PROBABILITY_BITS) & np.uint32(_SLOT_MASK)
                state = np.uint32(frequency * (state >> np.uint32(PROBABILITY_BITS)) + (slot & np.uint32(_SLOT_MASK)))
                if state < np.uint32(LOWEST_STATE):
                    if position == num_words:
                        return False
                    state = np.uint32(state << np.uint32(16)) | np.uint32(words[position])
                    position += 1
                states[lane] = state
                symbol = np.int32(slot >> np.uint32(24))
                value = np.int16((symbol - np.int32(MIDDLE)) << np.int32(bits))
                escaped[lane] = symbol == ESCAPE
                if symbol == ESCAPE:
                    if escape == num_escapes:
                        return False
                    value = escapes[escape]
                    escape += 1
                codes[first + lane, component] = value
            if bits > 0:
                mask = np.uint32((np.uint32(1) << bits) - np.uint32(1))
                for lane in range(count):
                    state = states[lane]
                    if not escaped[lane]:
                        codes[first + lane, component] |= np.int16(state & mask)
                    state >>= bits
                    if state < np.uint32(LOWEST_STATE):
                        if position == num_words:
                            return False
                        state = np.uint32(state << np.uint32(16)) | np.uint32(words[position])
                        position += 1
                    states[lane] = state
    for state in states:
        if state != np.uint32(LOWEST_STATE):
            return False
    return position == num_words and escape == num_escapes


def _decode_vectors(
    states: Any, words: Any, num_words: Any, escapes: Any, num_escapes: Any, numbers: Any, low: Any, token_shifts: Any,
    slots: Any, codes: Any,
) -> Any:  # fmt: skip
    """The same, a block at a time; token shifts are padded to whole blocks."""
    stride, cursor = np.int64(codes.strides[0]), np.empty(2, np.int64)
    cursor[0], cursor[1] = words.ctypes.data, escapes.ctypes.data
    end_words, end_escapes = cursor[0] + 2 * np.int64(num_words), cursor[1] + 2 * np.int64(num_escapes)
    for first in range(0, codes.shape[0], LANES):
        good = decode_block(
            np.int64(states.ctypes.data),
            np.int64(numbers.ctypes.data),
            np.int64(low.ctypes.data),
            np.int64(len(numbers)),
            np.int64(token_shifts.ctypes.data + 4 * first),
            np.int64(slots.ctypes.data),
            np.int64(len(slots) - 1),
            np.int64(codes.ctypes.data + stride * first),
            stride,
            np.int64(cursor.ctypes.data),
            end_words,
            end_escapes,
            np.int64(min(LANES, codes.shape[0] - first)),
        )
        if not good:
            return False
    for state in states:
        if state != np.uint32(LOWEST_STATE):
            return False
    return cursor[0] == end_words and cursor[1] == end_escapes


def _shift_costs(symbols: Any, across: Any, own: Any, costs: Any, found: Any) -> None:
    """Costs of a row are added up in one vector of 32 bits, a block of columns at a time."""
    width = np.int64(4 * costs.shape[1])
    held = np.empty(SHIFTS, np.int32)
    for row in range(symbols.shape[0]):
        total = found[row]
        total[:] = 0
        first = costs.ctypes.data + 4 * (np.int64(own[row]) + (SHIFTS + LEAST_SHIFT))
        for column in range(0, symbols.shape[1], _COST_COLUMNS):
            add_costs(
                np.int64(symbols[row, column:].ctypes.data),
                np.int64(across[column:].ctypes.data),
                np.int64(min(_COST_COLUMNS, symbols.shape[1] - column)),
                np.int64(first),
                width,
                np.int64(held.ctypes.data),
            )
            for shift in range(SHIFTS):
                total[shift] += held[shift]


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


def _finish_vectors(sums: Any, scale: Any, mean: Any, cosines: Any, sines: Any, out: Any) -> None:
    """The same for bfloat16, whole vectors of channels, and pairs of halves."""
    num_heads, num_tokens, head_dim = out.shape
    turned, vectors = np.int64(cosines.shape[1] // WIDTH), np.int64(head_dim // WIDTH)
    angle_bytes = np.int64(4 * cosines.shape[1])
    for head in range(num_heads):
        at = np.int64(4 * head * head_dim)
        for token in range(num_tokens):
            finish_row(
                np.int64(sums.ctypes.data + token * sums.strides[0] + at),
                np.int64(scale.ctypes.data + at),
                np.int64(mean.ctypes.data + at),
                np.int64(cosines.ctypes.data + token * angle_bytes),
                np.int64(sines.ctypes.data + token * angle_bytes),
                turned,
                vectors,
                np.int64(out.ctypes.data + head * out.strides[0] + token * out.strides[1]),
            )


_I16, _I32, _I64, _U8, _U16, _U32 = types.int16, types.int32, types.int64, types.uint8, types.uint16, types.uint32
_OUT = {2: types.Array(_U16, 3, "A"), 4: types.Array(_U32, 3, "A")}
_FLOATS = array(types.float32, 1)
_CODER = array(_I32, 1), array(_U8, 1), array(_I32, 1)

_encode_loop = compiled(
    _encode,
    types.UniTuple(_I64, 2)(
        array(_I16, 2), *_CODER, array(_U32, 2), array(_U32, 2), array(_U32, 1), array(_U16, 1), array(_I16, 1)
    ),
)
_DECODED = types.boolean(
    array(_U32, 1),
    array(_U16, 1),
    _I64,
    array(_I16, 1),
    _I64,
    *_CODER,
    array(_U32, 2),
    types.Array(_I16, 2, "A"),
)
decode_lanes = compiled(_decode, _DECODED)
decode_vectors = compiled(_decode_vectors, _DECODED) if compiled_decode.AVAILABLE else None
_costs_loop = compiled(
    _shift_costs, types.void(array(_U8, 2), array(_I32, 1), array(_I32, 1), array(_I32, 2), array(_I64, 2))
)
_finish_loop = compiled(
    _finish,
    *(
        types.void(
            types.Array(_I32, 2, "A"),
            _FLOATS,
            _FLOATS,
            array(types.float32, 2),
            array(types.float32, 2),
            array(_I64, 1),
            array(_I64, 1),
            out,
        )
        for out in _OUT.values()
    ),
)
_finish_vectors_loop = compiled(
    _finish_vectors,
    types.void(
        types.Array(_I32, 2, "A"),
        _FLOATS,
        _FLOATS,
        array(types.float32, 2),
        array(types.float32, 2),
        _OUT[2],
    ),
)


def encode_codes(
    codes: NDArray[np.int16], layout: Layout, tables: Tables
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int16]]:
    """See `Loops`."""
    states = np.full(LANES, LOWEST_STATE, np.uint32)
    # of the most that there can be, which is written from the end on: memory that is not touched is not taken
    words = mapped_array((2 * codes.size,), np.uint16, huge=False)
    escapes = mapped_array((codes.size,), np.int16, huge=False)
    facts = layout.table_numbers, layout.low, layout.token_shifts, tables.frequencies, tables.starts
    first, escape = _encode_loop(codes, *facts, states, words, escapes)
    return states, words[first:], escapes[escape:]


def decode_codes(stream: Stream, layout: Layout, tables: Tables, codes: NDArray[np.int16]) -> bool:
    """See `Loops`."""
    padded = np.append(layout.token_shifts, np.zeros(-len(codes) % LANES, np.int32))
    decode = decode_vectors or decode_lanes
    return bool(
        decode(
            stream.states.copy(),
            stream.words,
            stream.num_words,
            stream.escapes,
            stream.num_escapes,
            layout.table_numbers,
            layout.low,
            padded,
            tables.slots,
            codes,
        )
    )


def shift_costs(
    symbols: NDArray[np.uint8], across: NDArray[np.int32], own: NDArray[np.int32], costs: NDArray[np.int32]
) -> NDArray[np.int64]:
    """See `Loops`."""
    found = np.empty((len(symbols), SHIFTS), np.int64)
    _costs_loop(symbols, across, own, costs, found)
    return found


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
    bits = bit_patterns(out)
    if _is_whole_vectors(pairs, bits):
        _finish_vectors_loop(sums, scale, mean, cosines, sines, bits)
        return
    first, second = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
    _finish_loop(sums, scale, mean, cosines, sines, first, second, bits)


def _is_whole_vectors(pairs: NDArray[np.int64], bits: Array) -> bool:
    """Whether `_finish_vectors` serves: bfloat16, and channels and pairs of halves in multiples of a vector."""
    halves = len(pairs) == 0 or pairs[0, 1] == len(pairs)
    return bits.itemsize == 2 and bits.shape[2] % WIDTH == 0 and len(pairs) % WIDTH == 0 and bool(halves)
