"""The inner loops of attention by products of pairs (AVX512_BF16): vectors of rows over one tile of keys, as LLVM code.

All is as in `cpu.attention.panel`, two numbers at a time: a score sums pairs of channels, of a query in bfloat16 and of
keys as they lie; weighted values sum pairs of keys, of weights rounded to bfloat16 and of values laid side by side.
Maxima, exponentials and denominators are of unrounded float32. Queries are not scaled: exponents are.
"""

from __future__ import annotations

import math

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.panel import SUM_CHANNELS, Blocking, Panel
from cag_kernels.cpu.attention.window import emit_reference
from cag_kernels.cpu.dots import FEW_TERMS, DotEmitter
from cag_kernels.cpu.emit import INT16, INT32, LINE_BYTES, UNSEEN, Emitter, Value

PAIRS = 4  # of a score in one turn of the loop
LOG2_E = 1 / math.log(2)  # times the scale: what differences of scores are multiplied by to be exponents of two


def pair_of(emit: Emitter, key: Value, count: Value) -> tuple[Value, Value]:
    """The key behind one of `count`, or itself if it is the last; and the bits of a pair of both that count: of the
    last key of an odd number its own."""
    builder = emit.builder
    following = builder.add(key, emit.integer(1))
    is_pair = builder.icmp_signed("<", following, count)
    bits = builder.select(is_pair, ir.Constant(INT32, -1), ir.Constant(INT32, 0xFFFF))
    return builder.select(is_pair, following, key), emit.spread_integer(bits)


def load_paired(emit: Emitter, even: Value, odd: Value, bits: Value) -> Value:
    """As many bfloat16 from each of two places as a vector has lanes, number by number side by side; of these `bits`,
    zeros else."""
    builder, halves = emit.builder, ir.VectorType(INT16, emit.lanes)
    low, high = (builder.zext(builder.load(place, typ=halves, align=2), emit.integers) for place in (even, odd))
    both = builder.or_(low, builder.shl(high, ir.Constant(emit.integers, [16] * emit.lanes)))
    return builder.and_(both, bits)


class PairedTile:
    """A tile of keys and values on the stack of the function that serves a call's tasks, as panels want them.

    Keys lie as in the prefix, `[tile, head_dim]`; values by vectors of channels, `[head_dim / lanes, tile / 2, lanes]`
    pairs of two keys; beside the last one of an odd number stand zeros.
    """

    def __init__(self, emit: Emitter, head_dim: int, blocking: Blocking) -> None:
        self.emit, self.head_dim, self.blocking = emit, head_dim, blocking
        self.keys, self.values = (emit.bytes_on_stack(2 * blocking.tile * head_dim) for _ in range(2))

    def emit_widened(self, keys: Value, values: Value, count: Value) -> None:
        """`count` keys and values from memory. What is behind the last key is any number."""
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        zero, one = emit.integer(0), emit.integer(1)
        with emit.loop(zero, builder.mul(count, emit.integer(self.head_dim // 2)), lanes) as pair:
            number = emit.load_integers(emit.at(keys, pair.index, INT32))
            builder.store(number, emit.at(self.keys, pair.index, INT32), align=4)
        with emit.loop(zero, count, 2) as key:
            following, bits = pair_of(emit, key.index, count)
            even, odd = (builder.mul(number, emit.integer(self.head_dim)) for number in (key.index, following))
            place = builder.mul(builder.lshr(key.index, one), emit.integer(lanes))
            for channel in range(0, self.head_dim, lanes):
                low, high = (emit.at(values, builder.add(row, emit.integer(channel)), INT16) for row in (even, odd))
                target = emit.at(self.values, channel * self.blocking.tile // 2, INT32)
                builder.store(load_paired(emit, low, high, bits), emit.at(target, place, INT32), align=4)


class DotPanel(Panel):
    """Attention of `width` vectors of rows over one tile of keys, on top of the tiles before.

    Arguments as of a `Panel`, with a query in pairs `[head_dim / 2, num_lanes]`, keys and values of a `PairedTile`, and
    the factor of exponents, a vector in memory, behind what is asked for. Maxima are those of scores without a scale.
    """

    name = "dot_panel"
    num_pointers = 9
    num_further = 1
    emit: DotEmitter

    def make_emitter(self) -> Emitter:
        """See `Panel`."""
        return DotEmitter(self.function)

    def _pairs(self, pointer: Value) -> list[Value]:
        places = (self.emit.at(pointer, lane * self.blocking.lanes) for lane in range(self.width))
        return [self.emit.load_integers(place) for place in places]

    def _emit_products(self, keys: Value, first_key: Value, first: int) -> list[Value]:
        """See `Panel`; `keys` lies where the block's would in float32."""
        emit, builder = self.emit, self.emit.builder
        begin = builder.mul(first_key, emit.integer(self.head_dim))
        keys = emit.at(self.keys, begin, INT16)
        stop = min(first + SUM_CHANNELS, self.head_dim)
        nothing = [emit.constant(0.0)] * (self.block * self.width)
        with emit.loop(emit.integer(first // 2), emit.integer(stop // 2), PAIRS, nothing) as pair:
            sums = list(pair.values)
            # each turn asks for its part of `block` keys: by the end of the loop all of them
            asked = builder.add(begin, builder.mul(pair.index, emit.integer(2 * self.block)))
            for side in self.ahead:
                for line in range(0, 2 * PAIRS * 2 * self.block, LINE_BYTES):
                    emit.prefetch(emit.at(side, builder.add(asked, emit.integer(line // 2)), INT16))
            for step in range(PAIRS):
                place = builder.add(pair.index, emit.integer(step))
                rows = self._pairs(emit.at(self.query, builder.mul(place, self.num_rows)))
                for key in range(self.block):
                    source = emit.at(emit.at(keys, pair.index, INT32), key * self.head_dim // 2 + step, INT32)
                    both = emit.spread_integer(builder.load(source, typ=INT32, align=4))
                    for lane, row in enumerate(rows):
                        index = key * self.width + lane
                        sums[index] = emit.add_pairs(sums[index], row, both)
            pair.following = sums
        return list(pair.following)

    def _emit_softmax(
        self, maxima: list[Value], denominators: list[Value]
    ) -> tuple[list[Value], list[Value], list[Value]]:
        """See `Panel`; two keys' weights, rounded, take the place of a row of scores. Behind an odd number of keys
        stands one that weighs nothing."""
        emit, builder, width = self.emit, self.emit.builder, self.width
        elements = builder.mul(self.num_keys, emit.integer(self.row_floats))
        self._store_rows([emit.constant(UNSEEN)] * width, emit.at(self.scores, elements))
        with emit.loop(emit.integer(0), elements, self.row_floats, maxima) as key:
            rows = self._rows(emit.at(self.scores, key.index))
            key.following = [emit.larger(old, new) for new, old in zip(key.values, rows, strict=True)]
        larger = list(key.following)
        factor = emit.load(self.others[0])

        def weight(score: Value, reference: Value) -> Value:
            return emit.power_of_two(builder.fmul(builder.fsub(score, reference), factor), FEW_TERMS)

        corrections = [weight(old, new) for old, new in zip(maxima, larger, strict=True)]
        sums = [builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        references = [emit_reference(emit, maximum) for maximum in larger] if self.windows else larger
        with emit.loop(emit.integer(0), elements, 2 * self.row_floats, sums) as key:
            place = emit.at(self.scores, key.index)
            odd = self._rows(emit.at(place, self.row_floats))
            target = emit.at(self.scores, builder.lshr(key.index, emit.integer(1)))
            totals = list(key.values)
            for lane, scores in enumerate(zip(self._rows(place), odd, strict=True)):
                weights = [weight(score, references[lane]) for score in scores]
                for one in weights:
                    totals[lane] = builder.fadd(totals[lane], one)
                spot = emit.at(target, lane * self.blocking.lanes)
                builder.store(emit.narrowed_pairs(*weights), spot, align=4)
            key.following = totals
        return larger, corrections, list(key.following)

    def _emit_weighted(self, corrections: list[Value]) -> None:
        """See `Panel`."""
        emit, tile, lanes = self.emit, self.blocking.tile, self.blocking.lanes
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), lanes) as channels:
            source = emit.at(self.values, emit.builder.mul(channels.index, emit.integer(tile // 2)), INT32)
            for shift in range(0, lanes, self.block):
                self._emit_channels(emit.at(source, shift, INT32), channels.index, shift, corrections)

    def _emit_channels(self, source: Value, channel: Value, shift: int, corrections: list[Value]) -> None:
        emit, builder, width, block = self.emit, self.emit.builder, self.width, self.block
        places = [self._weighted_at(builder.add(channel, emit.integer(shift + offset))) for offset in range(block)]
        sums = [
            builder.fmul(value, corrections[lane]) for place in places for lane, value in enumerate(self._rows(place))
        ]
        num_pairs = builder.lshr(builder.add(self.num_keys, emit.integer(1)), emit.integer(1))
        with emit.loop(emit.integer(0), num_pairs, 1, sums) as pair:
            weights = self._pairs(emit.at(self.scores, builder.mul(pair.index, emit.integer(self.row_floats))))
            spreads = emit.at(source, builder.mul(pair.index, emit.integer(self.blocking.lanes)), INT32)
            found = list(pair.values)
            for offset in range(block):
                number = builder.load(emit.at(spreads, offset, INT32), typ=INT32, align=4)
                both = emit.spread_integer(number)
                for lane, row in enumerate(weights):
                    index = offset * width + lane
                    found[index] = emit.add_pairs(found[index], row, both)
            pair.following = found
        for offset, place in enumerate(places):
            self._store_rows(list(pair.following[offset * width : (offset + 1) * width]), place)
