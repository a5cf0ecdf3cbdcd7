"""The inner loops of attention over codes by 16-bit integers: vectors of rows over one tile of codes, as LLVM code.

With `key ~ code * scale + offset`, a score is `sum(query * scale * code) + query . offset`: a row's numbers
`query * scale` are rounded to 16 bits of their largest, pairs of products are summed in 32 bits (exactly, so in any
order), and what comes out is a row's factor times that sum, plus its offset. Weighted values are the same with
`weight * scale` of each key and `sum(weight * offset)`, for each group of channels. Maxima, exponentials and
denominators are those of `cpu.attention.panel`, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.code_tile import CHUNK, num_channel_groups
from cag_kernels.cpu.attention.panel import Blocking, Panel
from cag_kernels.cpu.emit import INT8, INT16, INT32, LINE_BYTES, ROUNDING, Emitter, Value
from cag_kernels.cpu.pairs import emit_pairs
from cag_kernels.prefixes import Codes

MAX_CODE_WIDTH = 2  # vectors of rows that meet a tile of codes at once
PAIRS = 2  # in one turn of the loop; with more LLVM reorders sums, and registers do not hold them
_LARGEST = 32767  # of 16 bits
_LARGEST_CODE, _LARGEST_SUM = 128, 2**31 - 1
_LEAST = 2.0**-111  # largest number of a row below which all are taken for zero: the inverse stays finite


class _Numbers(NamedTuple):
    """Numbers of a panel's rows, of a channel or a key, and where its scale and its offset are."""

    rows: list[Value]
    scale: Value
    offset: Value


class CodePanel(Panel):
    """Attention of `width` vectors of rows over one tile of codes, on top of the tiles before.

    Arguments as of a `Panel`, with keys and values of a `CodeTile` and its parameters of both behind what is asked for,
    which are codes in memory.
    """

    name = "code_panel"
    num_pointers = 10

    def __init__(
        self, module: ir.Module, head_dim: int, width: int, blocking: Blocking, has_window: bool, codes: Codes
    ) -> None:
        self.codes = codes
        self.num_groups = num_channel_groups(head_dim, codes)
        self.parts = ir.VectorType(INT16, 2 * blocking.lanes)
        super().__init__(module, head_dim, width, blocking, has_window)

    def _emit_tile(self) -> None:
        pairs = max(self.head_dim, self.blocking.tile) // 2
        self.rounded = self.emit.scratch(pairs * self.row_floats)  # int16 [pairs, rows, 2]
        super()._emit_tile()

    def _emit_scores(self) -> None:
        """Scores of the tile; the last block may score keys behind the last one, which nobody reads."""
        emit, block = self.emit, self.block
        factors, offsets = self._emit_rounded(emit.integer(self.head_dim), self._query_of, self.head_dim)
        with emit.loop(emit.integer(0), self.num_keys, block) as base:
            keys = emit.at(self.keys, emit.builder.mul(base.index, emit.integer(self.head_dim // 2)))
            sums = self._emit_sums(
                keys, self.head_dim // 2, emit.integer(self.head_dim // 2), 1, self._ahead(base.index)
            )
            target = emit.at(self.scores, emit.builder.mul(base.index, emit.integer(self.row_floats)))
            for key in range(block):
                found = [
                    emit.multiply_add(self._float(sums[key * self.width + lane]), factors[lane], offsets[lane])
                    for lane in range(self.width)
                ]
                self._store_rows(found, emit.at(target, key * self.row_floats))

    def _emit_sums(
        self, codes: Value, stride: int, num_pairs: Value, step: int, ahead: Value | None = None
    ) -> list[Value]:
        """Sums over pairs of a block of codes with the rounded rows: pair `p` of code `c` lies `c * stride + p * step`
        int32 from `codes`. Codes from `ahead` on are asked for meanwhile."""
        emit, builder = self.emit, self.emit.builder
        zero = ir.Constant(emit.integers, [0] * emit.lanes)
        with emit.loop(emit.integer(0), num_pairs, PAIRS, [zero] * (self.block * self.width)) as pair:
            sums = list(pair.values)
            if ahead is not None:
                self._emit_asking(ahead, pair.index)
            for turn in range(PAIRS):
                index = builder.add(pair.index, emit.integer(turn))
                source = emit.at(self.rounded, builder.mul(index, emit.integer(self.row_floats)))
                rows = [emit.load_integers(emit.at(source, lane * self.blocking.lanes)) for lane in range(self.width)]
                place = emit.at(codes, builder.mul(index, emit.integer(step)))
                for code in range(self.block):
                    number = builder.load(emit.at(place, code * stride), typ=INT32, align=4)
                    both = emit.spread_integer(number)
                    for lane, row in enumerate(rows):
                        total = code * self.width + lane
                        sums[total] = builder.add(sums[total], emit_pairs(emit, row, both))
            pair.following = sums
        return list(pair.following)

    def _emit_asking(self, ahead: Value, pair: Value) -> None:
        """Ask for the part of one turn of as many bytes as two blocks of keys or values have."""
        emit = self.emit
        pair_bytes = 2 * self.block * max(self.codes.key_bits, self.codes.value_bits) * 2 // 8
        place = emit.at(ahead, emit.builder.mul(pair, emit.integer(pair_bytes)), INT8)
        for line in range(0, pair_bytes * PAIRS, LINE_BYTES):
            emit.prefetch(emit.at(place, line, INT8))

    def _ahead(self, base: Value) -> Value:
        """What of the next tile is asked for while the block from key `base` on is scored: keys in the first half of
        the tile, values in the second one."""
        emit, builder = self.emit, self.emit.builder
        half = emit.integer(self.blocking.tile // 2)
        is_first = builder.icmp_signed("<", base, half)
        token = builder.mul(builder.select(is_first, base, builder.sub(base, half)), emit.integer(2))
        places = [
            emit.at(side, builder.mul(token, emit.integer(self.head_dim * bits // 8)), INT8)
            for side, bits in zip(self.ahead, (self.codes.key_bits, self.codes.value_bits), strict=True)
        ]
        return builder.select(is_first, *places)

    def _emit_weighted(self, corrections: list[Value]) -> None:
        """Add the tile's weighted values, group by group of channels."""
        emit, builder, block = self.emit, self.emit.builder, self.block
        num_weights = self._emit_no_weights()
        num_pairs = builder.udiv(num_weights, emit.integer(2))
        size = min(self.codes.group_channels, self.head_dim)
        with emit.loop(emit.integer(0), emit.integer(self.num_groups), 1) as group:
            factors, offsets = self._emit_rounded(
                num_weights, partial(self._weights_of, group.index), self.blocking.tile
            )
            begin = builder.mul(group.index, emit.integer(size))
            stop = emit.minimum(builder.add(begin, emit.integer(size)), emit.integer(self.head_dim))
            with emit.loop(begin, stop, block) as channel:
                inside = builder.and_(channel.index, emit.integer(CHUNK - 1))
                chunk = builder.mul(builder.sub(channel.index, inside), emit.integer(self.blocking.tile // 2))
                sums = self._emit_sums(emit.at(self.values, builder.add(chunk, inside)), 1, num_pairs, CHUNK)
                for code in range(block):
                    place = self._weighted_at(builder.add(channel.index, emit.integer(code)))
                    found = [
                        emit.multiply_add(self._float(sums[code * self.width + lane]), factors[lane], offsets[lane])
                        for lane in range(self.width)
                    ]
                    older = zip(self._rows(place), corrections, found, strict=True)
                    self._store_rows([emit.multiply_add(*numbers) for numbers in older], place)

    def _emit_no_weights(self) -> Value:
        """Zeros behind the weights of the last key, up to whole turns of loops over keys; how many there are then."""
        emit, builder = self.emit, self.emit.builder
        whole = emit.integer(2 * PAIRS)
        num_weights = builder.mul(emit.rounded_up(self.num_keys, whole), whole)
        is_short = builder.icmp_signed("<", self.num_keys, num_weights)
        with emit.when(is_short), emit.loop(self.num_keys, num_weights, 1) as key:
            place = emit.at(self.scores, builder.mul(key.index, emit.integer(self.row_floats)))
            self._store_rows([emit.constant(0.0)] * self.width, place)
        return num_weights

    def _query_of(self, channel: Value) -> _Numbers:
        scale = self.emit.at(self.others[0], channel)
        rows = self._rows(self.emit.at(self.query, self.emit.builder.mul(channel, self.num_rows)))
        return _Numbers(rows, scale, self.emit.at(scale, self.head_dim))

    def _weights_of(self, group: Value, key: Value) -> _Numbers:
        emit, builder = self.emit, self.emit.builder
        index = builder.add(builder.mul(group, emit.integer(self.blocking.tile)), key)
        scale = emit.at(self.others[1], index)
        rows = self._rows(emit.at(self.scores, builder.mul(key, emit.integer(self.row_floats))))
        return _Numbers(rows, scale, emit.at(scale, self.blocking.tile * self.num_groups))

    def _emit_rounded(
        self, count: Value, numbers: Callable[[Value], _Numbers], num_codes: int
    ) -> tuple[list[Value], list[Value]]:
        """Write `count` numbers of each row, times their scales, in 16 bits, to be multiplied by as many codes, at most
        `num_codes`; the rows' factors, and the sums of their numbers times the offsets: those with even places and
        those with odd ones, each in order."""
        emit, builder, width = self.emit, self.emit.builder, self.width
        nothing, least = emit.constant(0.0), ir.Constant(emit.integers, [0] * emit.lanes)
        with emit.loop(emit.integer(0), count, 2, [least] * width + [nothing] * (2 * width)) as place:
            found = list(place.values)
            for odd in range(2):
                rows, *parameters = numbers(builder.add(place.index, emit.integer(odd)))
                scale, offset = map(emit.spread, parameters)
                for lane, row in enumerate(rows):
                    found[lane] = emit.larger_magnitude(builder.fmul(row, scale), found[lane])
                    index = width * (1 + odd) + lane
                    found[index] = emit.multiply_add(row, offset, found[index])
            place.following = found
        largest, even, uneven = (place.following[part * width : (part + 1) * width] for part in range(3))
        factors, inverses = code_factors(emit, largest, num_codes)
        with emit.loop(emit.integer(0), count, 2) as place:
            both = [numbers(builder.add(place.index, emit.integer(odd))) for odd in range(2)]
            scaled = [[builder.fmul(row, emit.spread(part.scale)) for row in part.rows] for part in both]
            self._store_rounded(place.index, scaled, inverses)
        return factors, [builder.fadd(*pair) for pair in zip(even, uneven, strict=True)]

    def _store_rounded(self, index: Value, numbers: list[list[Value]], inverses: list[Value]) -> None:
        """Two numbers of each row as integers side by side, the pair that begins with number `index`."""
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        target = emit.at(self.rounded, builder.mul(index, emit.integer(self.row_floats // 2)))
        order = [lane + (lane % 2) * 2 * lanes for lane in range(2 * lanes)]
        for lane, inverse in enumerate(inverses):
            low, high = (
                builder.bitcast(emit.multiply_add(part[lane], inverse, emit.constant(ROUNDING)), emit.integers)
                for part in numbers
            )
            high = builder.shl(high, ir.Constant(emit.integers, [16] * lanes))
            low, high = (builder.bitcast(part, self.parts) for part in (low, high))
            both = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(INT32, 2 * lanes), order))
            builder.store(builder.bitcast(both, emit.integers), emit.at(target, lane * lanes), align=4)

    def _exponential(self, value: Value) -> Value:
        return self.emit.short_exponential(value)

    def _float(self, value: Value) -> Value:
        return self.emit.builder.sitofp(value, self.emit.vector)


def code_factors(emit: Emitter, patterns: Sequence[Value], num_codes: int) -> tuple[list[Value], list[Value]]:
    """What integers are multiplied by, and what numbers are to become integers, from the bits of the largest ones: so
    that the sum of products with `num_codes` codes fits into 32 bits."""
    builder = emit.builder
    limit = float(min(_LARGEST, _LARGEST_SUM // (_LARGEST_CODE * num_codes)))
    largest = [builder.bitcast(pattern, emit.vector) for pattern in patterns]
    factors = [builder.fmul(value, emit.constant(1 / limit)) for value in largest]
    inverses = []
    for value in largest:
        is_some = builder.fcmp_ordered(">=", value, emit.constant(_LEAST))
        inverse = builder.fdiv(emit.constant(limit), value)
        inverses.append(builder.select(is_some, inverse, emit.constant(0.0)))
    return factors, inverses
