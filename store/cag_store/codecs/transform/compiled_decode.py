"""The entropy decoder as AVX-512 instructions: the 32 lanes of a block are two vectors of 16 states.

Gathers look up slots, an expansion hands the next words to the lanes that need one, and scatters put two codes of each
token into its row.
"""

from __future__ import annotations

from typing import Any

from cag_store.codecs.emitting import (
    BIT,
    FEATURES,
    INT8,
    INT16,
    INT32,
    INT64,
    POINTER,
    cgutils,
    constant,
    extending,
    intrinsic,
    ir,
    load,
    pointer,
    splat,
    types,
)
from cag_store.codecs.transform.rans import LANES, LOWEST_STATE, PROBABILITY_BITS
from cag_store.codecs.transform.symbols import MIDDLE

AVAILABLE = all(FEATURES.get(name) for name in ("avx512f", "avx512bw", "avx512vl"))
CURSOR_WORDS, CURSOR_ESCAPES = 0, 1

_WIDTH = 16
_VECTORS = LANES // _WIDTH
_STATES = ir.VectorType(INT32, _WIDTH)
_WORDS = ir.VectorType(INT16, _WIDTH)
_MASK = ir.VectorType(BIT, _WIDTH)


class _Block:
    """Emits the decoding of one block of lanes; addresses are integers."""

    def __init__(self, builder: Any, arguments: Any) -> None:
        self.builder = builder
        (
            self.states, self.numbers, self.low, self.num_components, self.token_shifts, self.slots, self.last_table,
            self.codes, self.stride, self.cursor, self.end_words, self.end_escapes, self.num_lanes,
        ) = arguments  # fmt: skip
        self.good = cgutils.alloca_once_value(builder, INT64(1))
        self.state = [cgutils.alloca_once(builder, _STATES) for _ in range(_VECTORS)]
        self.next_word = cgutils.alloca_once_value(builder, load(builder, self.cursor, INT64(0), INT64, 8))
        self.next_escape = cgutils.alloca_once_value(builder, load(builder, self.cursor, INT64(8), INT64, 8))
        self.shifts, self.active, self.offsets = [], [], []
        lanes = splat(builder, builder.trunc(self.num_lanes, INT32), _STATES)
        stride = splat(builder, builder.trunc(self.stride, INT32), _STATES)
        for vector in range(_VECTORS):
            at = INT64(4 * _WIDTH * vector)
            numbers = ir.Constant(_STATES, list(range(_WIDTH * vector, _WIDTH * (vector + 1))))
            builder.store(load(builder, self.states, at, _STATES, 4), self.state[vector])
            self.shifts.append(load(builder, self.token_shifts, at, _STATES, 4))
            self.active.append(builder.icmp_unsigned("<", numbers, lanes))
            self.offsets.append(builder.mul(numbers, stride))

    def emit(self) -> Any:
        """All components, two at a time; returns 0 where words or escapes ran out."""
        builder = self.builder
        pairs = builder.lshr(self.num_components, INT64(1))
        with cgutils.for_range(builder, pairs, intp=INT64) as loop:
            component = builder.shl(loop.index, INT64(1))
            even = self._component(component)
            odd = self._component(builder.add(component, INT64(1)))
            self._put(component, [self._joined(one, other) for one, other in zip(even, odd, strict=True)])
            self._stop_behind_the_end(loop)
        with builder.if_then(builder.trunc(self.num_components, BIT)):
            component = builder.sub(self.num_components, INT64(1))
            zero = constant(_STATES, 0)
            self._put(component, [self._joined(value, zero) for value in self._component(component)])
        for vector, state in enumerate(self.state):
            at = INT64(4 * _WIDTH * vector)
            builder.store(builder.load(state), pointer(builder, self.states, at, _STATES), align=4)
        builder.store(builder.load(self.next_word), pointer(builder, self.cursor, INT64(0), INT64))
        builder.store(builder.load(self.next_escape), pointer(builder, self.cursor, INT64(8), INT64))
        self._check()
        return builder.load(self.good)

    def _component(self, component: Any) -> list[Any]:
        """The codes of all lanes, as 32-bit numbers."""
        builder = self.builder
        number = load(builder, self.numbers, builder.shl(component, INT64(2)), INT32, 4)
        bits = builder.zext(load(builder, self.low, component, INT8, 1), INT32)
        wide = splat(builder, bits, _STATES)
        values, escaped = [], []
        for vector in range(_VECTORS):
            symbol = self._symbol(vector, number)
            values.append(cgutils.alloca_once(builder, _STATES))
            value = builder.shl(builder.sub(symbol, constant(_STATES, MIDDLE)), wide)
            builder.store(value, values[vector])
            none = builder.icmp_unsigned("==", symbol, constant(_STATES, 0))
            escaped.append(builder.and_(none, self.active[vector]))
        with builder.if_then(builder.icmp_unsigned("!=", bits, INT32(0)), likely=False):
            for vector in range(_VECTORS):
                self._add_low_bits(vector, wide, values[vector])
        some = builder.or_(*(builder.bitcast(mask, INT16) for mask in escaped))
        with builder.if_then(builder.icmp_unsigned("!=", some, INT16(0)), likely=False):
            for value, mask in zip(values, escaped, strict=True):
                found = self._next(self.next_escape, mask)
                builder.store(builder.select(mask, found, builder.load(value)), value)
        return [builder.load(value) for value in values]

    def _symbol(self, vector: int, number: Any) -> Any:
        builder = self.builder
        state = builder.load(self.state[vector])
        table = builder.add(splat(builder, number, _STATES), self.shifts[vector])
        last = splat(builder, builder.trunc(self.last_table, INT32), _STATES)
        table = intrinsic(builder, "llvm.smax.v16i32", _STATES, table, constant(_STATES, 0))
        table = intrinsic(builder, "llvm.smin.v16i32", _STATES, table, last)
        mask = constant(_STATES, (1 << PROBABILITY_BITS) - 1)
        by = constant(_STATES, PROBABILITY_BITS)
        place = builder.or_(builder.shl(table, by), builder.and_(state, mask))
        slots = builder.inttoptr(self.slots, POINTER)
        every = constant(_MASK, 1)
        name = "llvm.x86.avx512.mask.gather.dpi.512"
        slot = intrinsic(builder, name, _STATES, constant(_STATES, 0), slots, place, every, INT32(4))
        frequency = builder.and_(builder.lshr(slot, by), mask)
        following = builder.add(builder.mul(frequency, builder.lshr(state, by)), builder.and_(slot, mask))
        self._refill(vector, following)
        return builder.lshr(slot, constant(_STATES, 24))

    def _add_low_bits(self, vector: int, bits: Any, value: Any) -> None:
        builder = self.builder
        state = builder.load(self.state[vector])
        mask = builder.sub(builder.shl(constant(_STATES, 1), bits), constant(_STATES, 1))
        builder.store(builder.or_(builder.load(value), builder.and_(state, mask)), value)
        self._refill(vector, builder.lshr(state, bits))

    def _refill(self, vector: int, state: Any) -> None:
        """Store the state, with words where it is too small; lanes without a token keep theirs."""
        builder, active = self.builder, self.active[vector]
        small = builder.icmp_unsigned("<", state, constant(_STATES, LOWEST_STATE))
        small = builder.and_(small, active)
        word = builder.and_(self._next(self.next_word, small), constant(_STATES, 0xFFFF))
        filled = builder.or_(builder.shl(state, constant(_STATES, 16)), word)
        found = builder.select(small, filled, state)
        builder.store(builder.select(active, found, builder.load(self.state[vector])), self.state[vector])

    def _next(self, place: Any, mask: Any) -> Any:
        """The next 16-bit numbers of a list for the lanes in `mask`, in their order; moves on by as many."""
        builder = self.builder
        address = builder.load(place)
        numbers = builder.zext(load(builder, address, INT64(0), _WORDS, 2), _STATES)
        found = intrinsic(builder, "llvm.x86.avx512.mask.expand.v16i32", _STATES, numbers, constant(_STATES, 0), mask)
        count = intrinsic(builder, "llvm.ctpop.i16", INT16, builder.bitcast(mask, INT16))
        builder.store(builder.add(address, builder.shl(builder.zext(count, INT64), INT64(1))), place)
        return found

    def _joined(self, even: Any, odd: Any) -> Any:
        builder = self.builder
        return builder.or_(builder.and_(even, constant(_STATES, 0xFFFF)), builder.shl(odd, constant(_STATES, 16)))

    def _put(self, component: Any, pairs: list[Any]) -> None:
        """Two codes of each lane into its row of codes."""
        builder = self.builder
        base = builder.inttoptr(builder.add(self.codes, builder.shl(component, INT64(1))), POINTER)
        for vector, pair in enumerate(pairs):
            name, nothing = "llvm.x86.avx512.mask.scatter.dpi.512", ir.VoidType()
            intrinsic(builder, name, nothing, base, self.active[vector], self.offsets[vector], pair, INT32(1))

    def _check(self) -> None:
        builder = self.builder
        ended = builder.icmp_unsigned("<=", builder.load(self.next_word), self.end_words)
        right = builder.and_(ended, builder.icmp_unsigned("<=", builder.load(self.next_escape), self.end_escapes))
        builder.store(builder.and_(builder.load(self.good), builder.zext(right, INT64)), self.good)

    def _stop_behind_the_end(self, loop: Any) -> None:
        self._check()
        stop = self.builder.icmp_unsigned("==", self.builder.load(self.good), INT64(0))
        with self.builder.if_then(stop, likely=False):
            loop.do_break()


def _decode_block(
    typing_context: Any,  # noqa: ARG001
    states: Any,
    numbers: Any,
    low: Any,
    num_components: Any,
    token_shifts: Any,
    slots: Any,
    last_table: Any,
    codes: Any,
    stride: Any,
    cursor: Any,
    end_words: Any,
    end_escapes: Any,
    num_lanes: Any,
) -> Any:
    """States, table numbers, low bits, number of components, token shifts, slots, last table, codes, bytes between
    rows of codes, cursor (addresses of the next word and escape), ends of words and escapes, number of lanes: all
    addresses or counts. `rans.SPARE_WORDS` zeros stand behind words and escapes."""
    del states, numbers, low, num_components, token_shifts, slots, last_table, codes, stride, cursor
    del end_words, end_escapes, num_lanes

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return _Block(builder, arguments).emit()

    return types.int64(*[types.int64] * 13), generate


decode_block = extending.intrinsic(_decode_block)
