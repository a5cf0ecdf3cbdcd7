"""The inner loops of attention over codes by 16-bit integers for one query of few rows, as in decoding.

The arithmetic is that of `cpu.attention.code_panel`, sum by sum, so a row has the same bits here as there. Lanes are
other things: keys where scores are summed, channels where values are. Integer sums are exact, so theirs may take any
order; those of offsets and denominators, which are floats, keep a vector of the rows for each key or channel in turn.
Codes are met where they lie, without a tile of them in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.code_panel import PAIRS, code_factors
from cag_kernels.cpu.attention.code_tile import emit_parameters_by_group, num_channel_groups
from cag_kernels.cpu.attention.code_words import (
    codes_of_two,
    interleaved,
    joined_vectors,
    pair_of_codes,
    rounded_pairs,
    side_by_side,
)
from cag_kernels.cpu.attention.few import SUMS_IN_REGISTERS
from cag_kernels.cpu.attention.panel import Blocking
from cag_kernels.cpu.emit import FLOAT, INT8, INT16, INT32, INT64, LINE_BYTES, POINTER, Emitter, Value
from cag_kernels.cpu.pairs import emit_pairs
from cag_kernels.prefixes import Codes

_WORDS = 8  # of four bytes: how much of a key is turned at once
_SHIFTS = {8: (0, 8), 4: (0, 8, 4, 12)}  # bits of a code -> where two of a word begin, each in its half, in order of
# channels: first, second; of 4 bits also those half of the channels behind them


def few_codes_serve(head_dim: int, codes: Codes, blocking: Blocking) -> bool:
    """Whether whole vectors of neighbouring codes belong to one group, and a key has enough of them."""
    pair = 2 * blocking.lanes
    key_bytes, value_bytes = codes.row_bytes(head_dim)
    is_whole = value_bytes % pair == 0 and min(codes.group_channels, head_dim) % pair == 0
    return is_whole and key_bytes >= 4 * _WORDS


class FewCodes:
    """Attention of `rows` rows over one range of codes, on top of what its sums hold.

    Arguments: query `[head_dim, num_lanes]`; codes of the range's keys and values; scales and offsets of the head's
    keys, then those of the range's values, in bfloat16; maxima and denominators `[num_lanes]` and weighted sums
    `[head_dim, num_lanes]`, which the range's join; then the first key, the number of keys and num_lanes. Groups of
    keys are whole tiles, and the first key begins one.
    """

    def __init__(self, module: ir.Module, head_dim: int, rows: int, blocking: Blocking, codes: Codes) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 10 + [INT64] * 3)
        self.function = ir.Function(module, kind, name=f"few_codes_{rows}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, blocking.lanes)
        self.side = self.emit.beside(4 if rows <= 4 else 8)  # a lane a row, and some to spare
        self.head_dim, self.rows, self.blocking, self.codes = head_dim, range(rows), blocking, codes
        self.num_groups = num_channel_groups(head_dim, codes)
        self.group = min(codes.group_channels, head_dim)
        self.row_bytes = codes.row_bytes(head_dim)
        self.query, self.key_codes, self.value_codes, *self.parameters = self.function.args[:7]
        self.maximum, self.denominator, self.weighted = self.function.args[7:10]
        self.first, self.num_keys, self.num_lanes = self.function.args[10:]
        tile, lanes, emit = blocking.tile, blocking.lanes, self.emit
        self.row_query, self.sums, self.query_words = (emit.scratch(rows * head_dim) for _ in range(3))
        self.key_offsets = emit.scratch(head_dim)
        self.value_parameters = emit.scratch(2 * self.num_groups * tile)  # [scales and offsets, group, key]
        self.scores, self.weight_words = (emit.scratch(rows * tile) for _ in range(2))
        self.weights_by_key = emit.scratch(self.side.lanes * tile)
        self.vectors = 2 if 2 * rows <= SUMS_IN_REGISTERS[lanes] else 1  # of keys at once
        self.turned = emit.scratch(self.row_bytes[0] // 4 * self.vectors * lanes)
        self._emit_range()

    def _emit_range(self) -> None:
        emit, builder, rows = self.emit, self.emit.builder, self.rows
        maxima, denominators = self._emit_start()
        with emit.loop(emit.integer(0), self.num_keys, self.blocking.tile, [*maxima, denominators]) as tile:
            count = emit.minimum(builder.sub(self.num_keys, tile.index), emit.integer(self.blocking.tile))
            self._emit_scores(tile.index, count)
            found = [self._emit_softmax(row, count, tile.values[row]) for row in rows]
            corrections = [correction for _, correction in found]
            total = builder.fmul(tile.values[-1], self._beside(corrections))
            self._emit_by_key(count)
            total = self._emit_weighted(tile.index, count, corrections, total)
            tile.following = [maximum for maximum, _ in found] + [total]
        self._emit_end(tile.following)

    # what stands before and behind the range: rows side by side become rows apart, and back

    def _emit_start(self) -> tuple[list[Value], Value]:
        emit, builder = self.emit, self.emit.builder
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 1) as channel:
            for source, target in ((self.query, self.row_query), (self.weighted, self.sums)):
                numbers = emit.at(source, builder.mul(channel.index, self.num_lanes))
                for row in self.rows:
                    number = builder.load(emit.at(numbers, row), typ=FLOAT, align=4)
                    builder.store(number, self._of_row(target, row, channel.index), align=4)
        self._emit_reordered(is_start=True)
        maxima = [emit.spread(emit.at(self.maximum, row)) for row in self.rows]
        return maxima, self.side.load(self.denominator)

    def _emit_end(self, following: Sequence[Value]) -> None:
        emit, builder = self.emit, self.emit.builder
        for row in self.rows:
            builder.store(emit.first_lane(following[row]), emit.at(self.maximum, row), align=4)
            total = builder.extract_element(following[-1], ir.Constant(INT32, row))
            builder.store(total, emit.at(self.denominator, row), align=4)
        self._emit_reordered(is_start=False)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 1) as channel:
            target = emit.at(self.weighted, builder.mul(channel.index, self.num_lanes))
            for row in self.rows:
                number = builder.load(self._of_row(self.sums, row, channel.index), typ=FLOAT, align=4)
                builder.store(number, emit.at(target, row), align=4)
        builder.ret_void()

    def _emit_reordered(self, *, is_start: bool) -> None:
        """Weighted sums from the order of channels to that in which two keys' codes come to lie side by side, or
        back."""
        emit, lanes = self.emit, self.emit.lanes
        order = [number for half in range(2) for number in side_by_side(lanes, half)[::2]]
        order = [order.index(number) for number in range(2 * lanes)] if is_start else order
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 2 * lanes) as channel:
            for row in self.rows:
                places = [emit.at(self._of_row(self.sums, row, channel.index), part * lanes) for part in range(2)]
                first, second = map(emit.load, places)
                for place, value in zip(places, emit.reordered(first, second, order), strict=True):
                    emit.store(value, place)

    def _of_row(self, pointer: Value, row: int, channel: Value) -> Value:
        return self.emit.at(pointer, self.emit.builder.add(channel, self.emit.integer(row * self.head_dim)))

    # keys

    def _emit_scores(self, begin: Value, count: Value) -> None:
        """Scores of a tile, `[row, key]`; places behind the last key repeat its score."""
        emit, builder, lanes = self.emit, self.emit.builder, self.emit.lanes
        factors = self._emit_query(builder.add(self.first, begin))
        even, uneven = self._emit_offsets()
        offsets = self._apart(builder.fadd(even, uneven))
        last = builder.sub(count, emit.integer(1))
        keys = emit.at(self.key_codes, builder.mul(begin, emit.integer(self.row_bytes[0])), INT8)
        with emit.loop(emit.integer(0), count, self.vectors * lanes) as base:
            for vector in range(self.vectors):
                self._emit_turned(keys, builder.add(base.index, emit.integer(vector * lanes)), last, vector)
            sums = self._emit_products()
            for row in self.rows:
                for vector in range(self.vectors):
                    score = emit.multiply_add(self._float(sums[row][vector]), factors[row], offsets[row])
                    place = builder.add(base.index, emit.integer(row * self.blocking.tile + vector * lanes))
                    emit.store(score, emit.at(self.scores, place))

    def _emit_query(self, token: Value) -> list[Value]:
        """Write the rows, times the scales of a token's group, in 16 bits; offsets in float32. The rows' factors.

        A channel's number lies beside that of the second one behind it, as in a word of codes.
        """
        emit, builder, lanes = self.emit, self.emit.builder, self.emit.lanes
        group = builder.udiv(token, emit.integer(self.codes.group_tokens))
        index = builder.mul(group, emit.integer(self.head_dim))
        scales, offsets = (emit.at(pointer, index, INT16) for pointer in self.parameters[:2])
        nothing = [ir.Constant(emit.integers, [0] * lanes)] * len(self.rows)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), lanes, nothing) as channel:
            emit.store(
                emit.load_bfloat16(emit.at(offsets, channel.index, INT16)), emit.at(self.key_offsets, channel.index)
            )
            scale = emit.load_bfloat16(emit.at(scales, channel.index, INT16))
            rows = [emit.load(self._of_row(self.row_query, row, channel.index)) for row in self.rows]
            channel.following = [
                emit.larger_magnitude(builder.fmul(row, scale), before)
                for row, before in zip(rows, channel.values, strict=True)
            ]
        largest = [emit.across(row, emit.larger_integer) for row in channel.following]
        factors, inverses = code_factors(emit, largest, self.head_dim)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), lanes) as channel:
            scale = emit.load_bfloat16(emit.at(scales, channel.index, INT16))
            for row, inverse in zip(self.rows, inverses, strict=True):
                number = builder.fmul(emit.load(self._of_row(self.row_query, row, channel.index)), scale)
                words = rounded_pairs(emit, number, inverse, 2)
                builder.store(words, self._of_row(self.query_words, row, channel.index), align=4)
        return factors

    def _emit_offsets(self) -> tuple[Value, Value]:
        """What the rows find in the offsets of even and of odd channels."""
        emit, side, builder = self.emit, self.side, self.emit.builder
        nothing = [side.constant(0.0)] * 2
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 2, nothing) as channel:
            found = []
            for odd, before in enumerate(channel.values):
                index = builder.add(channel.index, emit.integer(odd))
                row = side.load(emit.at(self.query, builder.mul(index, self.num_lanes)))
                found.append(side.multiply_add(row, side.spread(emit.at(self.key_offsets, index)), before))
            channel.following = found
        return channel.following[0], channel.following[1]

    def _emit_turned(self, keys: Value, first: Value, last: Value, vector: int) -> None:
        """Lay a vector of keys out word by word, a lane a key, and ask for the same ones of the next tile."""
        emit, builder, lanes, size = self.emit, self.emit.builder, self.emit.lanes, self.row_bytes[0]
        words, halves = ir.VectorType(INT32, _WORDS), range(0, lanes, _WORDS)
        rows = []
        for lane in range(lanes):
            token = emit.minimum(builder.add(first, emit.integer(lane)), last)
            rows.append(emit.at(keys, builder.mul(token, emit.integer(size)), INT8))
        for row in rows:
            for line in range(0, size, LINE_BYTES):
                emit.prefetch(emit.at(row, self.blocking.tile * size + line, INT8))
        for begin in range(0, size, 4 * _WORDS):
            start = min(begin, size - 4 * _WORDS)
            loads = [builder.load(emit.at(row, start, INT8), typ=words, align=1) for row in rows]
            joined = [joined_vectors(builder, [loads[half + key] for half in halves]) for key in range(_WORDS)]
            for number, turned in enumerate(emit.transposed(joined)):
                place = (start // 4 + number) * self.vectors * lanes + vector * lanes
                builder.store(turned, emit.at(self.turned, place), align=4)

    def _emit_products(self) -> list[list[Value]]:
        """Sums of products of the turned keys with each row: of a row, of a vector of keys."""
        emit, builder, lanes, vectors = self.emit, self.emit.builder, self.emit.lanes, range(self.vectors)
        nothing = [ir.Constant(emit.integers, [0] * lanes)] * (len(self.rows) * self.vectors)
        with emit.loop(emit.integer(0), emit.integer(self.row_bytes[0] // 4), 1, nothing) as word:
            place = emit.at(self.turned, builder.mul(word.index, emit.integer(self.vectors * lanes)))
            words = [emit.load_integers(emit.at(place, vector * lanes)) for vector in vectors]
            sums = list(word.values)
            channel = builder.mul(word.index, emit.integer(4))
            for number, shift in enumerate(_SHIFTS[self.codes.key_bits]):
                keys = [pair_of_codes(emit, found, shift, self.codes.key_bits) for found in words]
                behind = number % 2 + (number // 2) * self.head_dim // 2
                for row in self.rows:
                    index = builder.add(channel, emit.integer(row * self.head_dim + behind))
                    query = emit.spread_integer(builder.load(emit.at(self.query_words, index), typ=INT32, align=4))
                    for vector in vectors:
                        total = row * self.vectors + vector
                        sums[total] = builder.add(sums[total], emit_pairs(emit, keys[vector], query))
            word.following = sums
        return [list(word.following[row * self.vectors : (row + 1) * self.vectors]) for row in self.rows]

    # weights

    def _emit_softmax(self, row: int, count: Value, maximum: Value) -> tuple[Value, Value]:
        """Turn a row's scores into weights, zeros behind the last key of its vector; the new maximum and the correction
        of older sums, alike in all lanes."""
        emit, builder, lanes = self.emit, self.emit.builder, self.emit.lanes
        scores = emit.at(self.scores, row * self.blocking.tile)
        with emit.loop(emit.integer(0), count, lanes, [maximum]) as key:
            key.following = [emit.larger(emit.load(emit.at(scores, key.index)), key.values[0])]
        larger = emit.across(key.following[0], emit.larger)
        numbers = ir.Constant(emit.integers, list(range(lanes)))
        with emit.loop(emit.integer(0), count, lanes) as key:
            place = emit.at(scores, key.index)
            weight = emit.short_exponential(builder.fsub(emit.load(place), larger))
            left = emit.spread_integer(builder.trunc(builder.sub(count, key.index), INT32))
            is_key = builder.icmp_signed("<", numbers, left)
            emit.store(builder.select(is_key, weight, emit.constant(0.0)), place)
        return larger, emit.short_exponential(builder.fsub(maximum, larger))

    def _emit_by_key(self, count: Value) -> None:
        """The weights of all rows key by key."""
        emit, builder, lanes, size = self.emit, self.emit.builder, self.emit.lanes, self.side.lanes
        with emit.loop(emit.integer(0), count, lanes) as key:
            rows = [
                emit.load(emit.at(self.scores, builder.add(key.index, emit.integer(row * self.blocking.tile))))
                for row in self.rows
            ]
            rows += [emit.constant(0.0)] * (size - len(rows))
            target = emit.at(self.weights_by_key, builder.mul(key.index, emit.integer(size)))
            for number, vector in enumerate(interleaved(builder, rows)):
                emit.store(vector, emit.at(target, number * lanes))

    def _beside(self, numbers: Sequence[Value]) -> Value:
        """What is alike in all lanes, of each row, in a vector with a lane a row."""
        found = self.side.constant(0.0)
        for row, number in enumerate(numbers):
            found = self.emit.builder.insert_element(found, self.emit.first_lane(number), ir.Constant(INT32, row))
        return found

    def _apart(self, numbers: Value) -> list[Value]:
        """A row's lane in all lanes, of each row."""
        builder = self.emit.builder
        lanes = [builder.extract_element(numbers, ir.Constant(INT32, row)) for row in self.rows]
        return [self.emit.spread_number(lane) for lane in lanes]

    # values

    def _emit_weighted(self, begin: Value, count: Value, corrections: list[Value], total: Value) -> Value:
        """Add the tile's weighted values, group by group of channels, and its weights to the denominators."""
        emit, builder = self.emit, self.emit.builder
        for part, pointer in enumerate(self.parameters[2:]):
            source = emit.at(pointer, builder.mul(begin, emit.integer(self.num_groups)), INT16)
            target = emit.at(self.value_parameters, part * self.num_groups * self.blocking.tile)
            emit_parameters_by_group(emit, source, count, target, self.num_groups, self.blocking.tile)
        values = emit.at(self.value_codes, builder.mul(begin, emit.integer(self.row_bytes[1])), INT8)
        for group in range(self.num_groups):
            factors = self._emit_weight_words(group, count)
            total, offsets = self._emit_chains(group, count, total, is_first=not group)
            for blocks in self._passes(group):
                self._emit_blocks(values, count, blocks, corrections, factors, offsets)
        return total

    def _emit_weight_words(self, group: int, count: Value) -> list[Value]:
        """Write the weights, times the scales of the values of a group, in 16 bits, two keys' side by side; the rows'
        factors."""
        emit, builder, lanes, tile = self.emit, self.emit.builder, self.emit.lanes, self.blocking.tile
        scales, nothing = emit.at(self.value_parameters, group * tile), ir.Constant(emit.integers, [0] * lanes)
        with emit.loop(emit.integer(0), count, lanes, [nothing] * len(self.rows)) as key:
            scale = emit.load(emit.at(scales, key.index))
            key.following = [
                emit.larger_magnitude(builder.fmul(self._weights(row, key.index), scale), before)
                for row, before in zip(self.rows, key.values, strict=True)
            ]
        largest = [emit.across(row, emit.larger_integer) for row in key.following]
        factors, inverses = code_factors(emit, largest, tile)
        with emit.loop(emit.integer(0), count, lanes) as key:
            scale = emit.load(emit.at(scales, key.index))
            for row, inverse in zip(self.rows, inverses, strict=True):
                words = rounded_pairs(emit, builder.fmul(self._weights(row, key.index), scale), inverse, 1)
                place = builder.add(key.index, emit.integer(row * tile))
                builder.store(words, emit.at(self.weight_words, place), align=4)
        return factors

    def _weights(self, row: int, key: Value) -> Value:
        place = self.emit.builder.add(key, self.emit.integer(row * self.blocking.tile))
        return self.emit.load(self.emit.at(self.scores, place))

    def _num_weights(self, count: Value) -> Value:
        """Keys up to whole turns of the panel's loops: behind the last one weights are zeros."""
        whole = self.emit.integer(2 * PAIRS)
        return self.emit.builder.mul(self.emit.rounded_up(count, whole), whole)

    def _emit_chains(self, group: int, count: Value, total: Value, *, is_first: bool) -> tuple[Value, list[Value]]:
        """Denominators with the weights, added once, and what the rows find in the offsets of a group."""
        emit, side, builder = self.emit, self.side, self.emit.builder
        offsets = emit.at(self.value_parameters, (self.num_groups + group) * self.blocking.tile)
        start = [side.constant(0.0), side.constant(0.0), total]
        with emit.loop(emit.integer(0), self._num_weights(count), 2, start) as key:
            sums = list(key.values)
            for odd in range(2):
                index = builder.add(key.index, emit.integer(odd))
                weights = side.load(emit.at(self.weights_by_key, builder.mul(index, emit.integer(side.lanes))))
                sums[odd] = side.multiply_add(weights, side.spread(emit.at(offsets, index)), sums[odd])
                if is_first:
                    sums[2] = builder.fadd(sums[2], weights)
            key.following = sums
        even, uneven, total = key.following
        return total, self._apart(builder.fadd(even, uneven))

    def _passes(self, group: int) -> list[list[int]]:
        """First channels of blocks of two vectors, as many at once as registers hold sums of."""
        size = 2 * self.emit.lanes
        blocks = list(range(group * self.group, min((group + 1) * self.group, self.head_dim), size))
        most = max(1, SUMS_IN_REGISTERS[self.emit.lanes] // (2 * len(self.rows)))
        return [blocks[first : first + most] for first in range(0, len(blocks), most)]

    def _emit_blocks(
        self,
        values: Value,
        count: Value,
        blocks: list[int],
        corrections: list[Value],
        factors: list[Value],
        offsets: list[Value],
    ) -> None:
        """Add the weighted values of some blocks of channels, two keys at a time."""
        emit, builder, lanes, tile = self.emit, self.emit.builder, self.emit.lanes, self.blocking.tile
        places = [(row, block, part) for row in self.rows for block in blocks for part in range(2)]
        nothing = [ir.Constant(emit.integers, [0] * lanes)] * len(places)
        last, size = builder.sub(count, emit.integer(1)), self.row_bytes[1]
        with emit.loop(emit.integer(0), count, 2, nothing) as key:
            tokens = [key.index, emit.minimum(builder.add(key.index, emit.integer(1)), last)]
            keys = [emit.at(values, builder.mul(token, emit.integer(size)), INT8) for token in tokens]
            self._emit_asking(keys, blocks)
            codes = {block: self._codes_of_two(keys, block) for block in blocks}
            words = [
                emit.spread_integer(
                    builder.load(
                        emit.at(self.weight_words, builder.add(key.index, emit.integer(row * tile))),
                        typ=INT32,
                        align=4,
                    )
                )
                for row in self.rows
            ]
            key.following = [
                builder.add(before, emit_pairs(emit, codes[block][part], words[row]))
                for before, (row, block, part) in zip(key.values, places, strict=True)
            ]
        for found, (row, block, part) in zip(key.following, places, strict=True):
            place = emit.at(self.sums, row * self.head_dim + block + part * lanes)
            number = emit.multiply_add(self._float(found), factors[row], offsets[row])
            emit.store(emit.multiply_add(emit.load(place), corrections[row], number), place)

    def _emit_asking(self, keys: list[Value], blocks: list[int]) -> None:
        """Ask for the same codes of the next tile."""
        places = [block * self.codes.value_bits // 8 for block in blocks]
        span = 2 * self.emit.lanes * self.codes.value_bits // 8
        lines = {place // LINE_BYTES * LINE_BYTES for first in places for place in (first, first + span - 1)}
        for key in keys:
            for line in sorted(lines):
                ahead = self.blocking.tile * self.row_bytes[1] + line
                self.emit.prefetch(self.emit.at(key, ahead, INT8))

    def _codes_of_two(self, keys: list[Value], block: int) -> list[Value]:
        """Codes of two keys, from channel `block` on: two vectors of channels."""
        half = self.head_dim // 2
        if self.codes.value_bits == 8 or block < half:
            return codes_of_two(self.emit, keys, block, self.codes.value_bits)
        return codes_of_two(self.emit, keys, block - half, 4, is_upper=True)

    def _float(self, value: Value) -> Value:
        return self.emit.builder.sitofp(value, self.emit.vector)
