"""A piece of attention by tile products: 64 keys and values for one vector of 16 rows, as a step of a pipeline.

Tiles multiply while vectors compute. So a step does three things at once, a few instructions of each in turn: the
scores of the rows that come next, the weights of the present ones, and the weighted values of those before. Scores and
weights stay in the first cache, and what later pieces read is asked for meanwhile.
Knows where a step's operands lie; not what ranges, heads and tasks they come from (`cpu.attention.tile_segments`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from cag_kernels.cpu.attention.window import emit_hidden, emit_reference
from cag_kernels.cpu.dots import FEW_TERMS
from cag_kernels.cpu.emit import FLOAT, INT8, INT16, INT32, INT64, LINE_BYTES, SECOND_CACHE, UNSEEN, Value
from cag_kernels.cpu.tiles import DEPTH, ROW_BYTES, TILE, TileEmitter

PIECE = 64  # keys of one softmax step
TILE_BYTES = TILE * ROW_BYTES
_LOG2_E = 1 / math.log(2)
# floats from the scores of one turn to those of the other: half a page more than they are, since a load of what lies a
# whole page behind a store that is under way waits for it
_TURN_FLOATS = PIECE * TILE + 512
_ROUNDS = PIECE // DEPTH  # of a step; one turns the weights of 32 keys
_CHAINS = 4  # sums and maxima that are joined in the end: one alone would wait for itself
# Tiles. Two loads for each product hold vectors up, one does not (docs/design/010). So what meets many others stays
# where it is during a step.
_SUMS = 0, 1  # of scores, then of weighted values
_QUERY = 2, 3
_WEIGHTS = 4, 5
_OTHERS = 6, 7  # keys, then values


class Coming(NamedTuple):
    """Rows whose scores are next: the keys, `[PIECE, head_dim]` bfloat16, and the rows' turned query."""

    keys: Value
    query: Value


class Rows(NamedTuple):
    """Rows whose weights are under way: places of their maxima and denominators, how many keys there are, and with a
    window how many of the first ones each row does not see."""

    maximum: Value
    denominator: Value
    count: Value
    num_hidden: Value | None = None


class Going(NamedTuple):
    """Rows whose weights wait for values: these, as right operands, and the place of the sums."""

    values: Value
    weighted: Value


class Ahead(NamedTuple):
    """What memory is asked for during a step, of keys or of values: `NUM_ASKING` lines from `place` on, `each` times
    as many behind each other."""

    place: Value
    each: Value


NUM_ASKING = PIECE // 2  # once for each pair of keys


class Pipeline:
    """Memory of the steps under way, in the function that they are emitted into, and the steps.

    Steps take two turns, 0 and 1: in one turn's memory scores are read while the other's is written.
    """

    def __init__(self, emit: TileEmitter, head_dim: int, lanes: Value, scale: Value) -> None:
        self.emit, self.head_dim, self.lanes = emit, head_dim, lanes
        self.holds_query = head_dim // DEPTH <= len(_QUERY)
        self.scores = emit.scratch(2 * _TURN_FLOATS)
        # left operands: `[blocks of 32 keys, 16 rows, 32 keys]`
        self.weights = emit.bytes_on_stack(_ROUNDS * TILE_BYTES)
        self.corrections = emit.scratch(2 * TILE)
        self.nowhere = emit.scratch(TILE * head_dim)
        factor = emit.builder.bitcast(emit.builder.trunc(scale, INT32), FLOAT)
        self.factor = emit.builder.fmul(emit.spread_number(factor), emit.constant(_LOG2_E))  # of scores, to powers of 2

    def emit_begin(self, coming: Coming) -> None:
        """Scores of the first step, which has turn 0 and nothing before it."""
        emit = self.emit
        emit.store(emit.constant(1.0), self._corrections(emit.integer(1)))
        self._emit_held(coming)
        with emit.loop(emit.integer(0), emit.integer(_ROUNDS), 1) as part:
            for operation in self._score_operations(part.index, coming, self._scores(emit.integer(0))):
                operation()

    def emit_step(self, turn: Value, coming: Coming, rows: Rows, going: Going, ahead: Sequence[Ahead]) -> None:
        """Weights of the rows whose scores the step before has left, and what goes on beside them."""
        emit, builder = self.emit, self.emit.builder
        other = builder.sub(emit.integer(1), turn)
        scores = self._scores(turn)
        self._emit_held(coming)
        self._emit_corrected(other, going.weighted)
        self._emit_unseen(scores, rows.count)
        if rows.num_hidden is not None:
            emit_hidden(emit, scores, [rows.num_hidden], emit.integer(PIECE))
        larger, started = self._emit_maxima(turn, scores, rows)
        if rows.num_hidden is not None:
            larger = emit_reference(emit, larger)
        nothing = emit.constant(0.0)
        with emit.loop(emit.integer(0), emit.integer(_ROUNDS), 1, [started, nothing]) as part:
            beside = [
                *self._score_operations(part.index, coming, self._scores(other)),
                *self._weighted_operations(part.index, going),
            ]
            pairs, part.following = self._emit_weights(part.index, scores, larger, part.values, beside, ahead)
            target = emit.at(self.weights, builder.mul(part.index, emit.integer(TILE_BYTES)), INT8)
            for row, vector in enumerate(emit.transposed(pairs)):
                builder.store(vector, emit.at(target, row * ROW_BYTES, INT8), align=4)
        emit.store(builder.fadd(*part.following), rows.denominator)

    def emit_end(self, turn: Value, going: Going) -> None:
        """Weighted values of the last step, which would have been followed by one of this turn."""
        emit = self.emit
        other = emit.builder.sub(emit.integer(1), turn)
        self._emit_corrected(other, going.weighted)
        self._emit_held_weights()
        with emit.loop(emit.integer(0), emit.integer(_ROUNDS), 1) as part:
            for operation in self._weighted_operations(part.index, going):
                operation()

    def _scores(self, turn: Value) -> Value:
        return self.emit.at(self.scores, self.emit.builder.mul(turn, self.emit.integer(_TURN_FLOATS)))

    def _corrections(self, turn: Value) -> Value:
        return self.emit.at(self.corrections, self.emit.builder.mul(turn, self.emit.integer(TILE)))

    def _emit_held(self, coming: Coming) -> None:
        """Load the tiles that stay during a step: the query of the rows that come, if it is that small, and the weights
        of those that go; before the first step those are of nobody."""
        if self.holds_query:
            for step, place in enumerate(self._queries(coming)):
                self.emit.load_tile(_QUERY[step], place, self._lane_bytes())
        self._emit_held_weights()

    def _emit_held_weights(self) -> None:
        for block in range(_ROUNDS):
            self.emit.load_tile(_WEIGHTS[block], self.emit.at(self.weights, block * TILE_BYTES, INT8))

    def _queries(self, coming: Coming) -> list[Value]:
        """Where each 32 channels of the rows lie."""
        emit, builder = self.emit, self.emit.builder
        shift = builder.mul(self.lanes, emit.integer(TILE))
        steps = range(self.head_dim // DEPTH)
        return [emit.at(coming.query, builder.mul(shift, emit.integer(step)), INT32) for step in steps]

    def _lane_bytes(self) -> Value:
        return self.emit.builder.mul(self.lanes, self.emit.integer(4))

    def _score_operations(self, part: Value, coming: Coming, scores: Value) -> list[Callable[[], None]]:
        """Scores of the 32 keys of one round, `[key, row]`."""
        emit, builder = self.emit, self.emit.builder
        key_bytes = 2 * self.head_dim
        keys = emit.at(coming.keys, builder.mul(part, emit.integer(DEPTH * key_bytes)), INT8)
        queries, lane_bytes = self._queries(coming), self._lane_bytes()
        scores = emit.at(scores, builder.mul(part, emit.integer(DEPTH * TILE)))
        tiles, steps = range(DEPTH // TILE), range(self.head_dim // DEPTH)
        found: list[Callable[[], None]] = [partial(emit.zero, _SUMS[tile]) for tile in tiles]
        for step in steps:
            query = _QUERY[step % 2]
            if not self.holds_query:
                found.append(partial(emit.load_tile, query, queries[step], lane_bytes))
            for tile in tiles:
                place = emit.at(keys, tile * TILE * key_bytes + 2 * DEPTH * step, INT8)
                found.append(partial(emit.load_tile, _OTHERS[tile], place, key_bytes))
                found.append(partial(emit.add_product, _SUMS[tile], _OTHERS[tile], query))
        return found + [partial(emit.store_tile, _SUMS[tile], emit.at(scores, tile * TILE * TILE)) for tile in tiles]

    def _weighted_operations(self, part: Value, going: Going) -> list[Callable[[], None]]:
        """Add a round's share of the channels of weighted values: all 64 keys, 16 channels at a time."""
        emit, builder = self.emit, self.emit.builder
        tiles, row_bytes = self.head_dim // TILE, 4 * self.head_dim
        share = tiles // _ROUNDS
        sums = emit.at(going.weighted, builder.mul(part, emit.integer(share * TILE)))
        values = emit.at(going.values, builder.mul(part, emit.integer(share * TILE_BYTES)), INT8)
        found: list[Callable[[], None]] = []
        for first in range(0, share, 2):
            pair = range(first, min(first + 2, share))
            places = {tile: emit.at(sums, tile * TILE) for tile in pair}
            found += [partial(emit.load_tile, _SUMS[tile % 2], places[tile], row_bytes) for tile in pair]
            for block in range(_ROUNDS):
                for tile in pair:
                    others = _OTHERS[tile % 2]
                    place = emit.at(values, (block * tiles + tile) * TILE_BYTES, INT8)
                    found.append(partial(emit.load_tile, others, place))
                    found.append(partial(emit.add_product, _SUMS[tile % 2], _WEIGHTS[block], others))
            found += [partial(emit.store_tile, _SUMS[tile % 2], places[tile], row_bytes) for tile in pair]
        return found

    def _emit_unseen(self, scores: Value, count: Value) -> None:
        """Scores of what lies behind the last key."""
        emit, builder = self.emit, self.emit.builder
        whole = emit.integer(PIECE)
        with emit.when(builder.icmp_signed("<", count, whole)), emit.loop(count, whole, 1) as key:
            emit.store(emit.constant(UNSEEN), emit.at(scores, builder.mul(key.index, emit.integer(TILE))))

    def _emit_maxima(self, turn: Value, scores: Value, rows: Rows) -> tuple[Value, Value]:
        """The new maxima, and the denominators so far relative to these; corrections of older sums go to their
        place."""
        emit, builder = self.emit, self.emit.builder
        before = emit.load(rows.maximum)
        chains = [before] * _CHAINS
        for key in range(PIECE):
            chains[key % _CHAINS] = emit.larger(chains[key % _CHAINS], emit.load(emit.at(scores, key * TILE)))
        larger = emit.larger(emit.larger(chains[0], chains[1]), emit.larger(chains[2], chains[3]))
        same = builder.fcmp_ordered("==", before, larger)  # then exactly 1, which the polynomial is not
        correction = builder.select(same, emit.constant(1.0), self._weight(before, larger))
        emit.store(larger, rows.maximum)
        emit.store(correction, self._corrections(turn))
        return larger, builder.fmul(emit.load(rows.denominator), correction)

    def _emit_weights(
        self,
        part: Value,
        scores: Value,
        larger: Value,
        sums: Sequence[Value],
        beside: list[Callable[[], None]],
        ahead: Sequence[Ahead],
    ) -> tuple[list[Value], list[Value]]:
        """Weights of 32 keys, in pairs, and sums of the even and of the odd ones; what runs beside them in between."""
        emit, builder = self.emit, self.emit.builder
        scores = emit.at(scores, builder.mul(part, emit.integer(DEPTH * TILE)))
        pairs, slots = [], TILE + 2
        for pair in range(TILE):
            for operation in beside[pair * len(beside) // slots : (pair + 1) * len(beside) // slots]:
                operation()
            self._emit_ahead(builder.add(builder.mul(part, emit.integer(TILE)), emit.integer(pair)), ahead)
            weights = [self._weight(emit.load(emit.at(scores, (2 * pair + odd) * TILE)), larger) for odd in range(2)]
            pairs.append(emit.pairs(*weights))
            sums = [builder.fadd(total, weight) for total, weight in zip(sums, weights, strict=True)]
        for operation in beside[TILE * len(beside) // slots :]:
            operation()
        return pairs, list(sums)

    def _emit_ahead(self, number: Value, ahead: Sequence[Ahead]) -> None:
        """Ask for the first line of each side's share; for more of them only where there are few rows."""
        emit, builder = self.emit, self.emit.builder
        for side in ahead:
            place = emit.at(side.place, builder.mul(number, emit.integer(LINE_BYTES)), INT8)
            emit.prefetch(place, near=SECOND_CACHE)
            with (
                emit.when(builder.icmp_signed(">", side.each, emit.integer(1))),
                emit.loop(emit.integer(1), side.each, 1) as line,
            ):
                shift = builder.mul(line.index, emit.integer(NUM_ASKING * LINE_BYTES))
                emit.prefetch(emit.at(place, shift, INT8), near=SECOND_CACHE)

    def _weight(self, score: Value, maximum: Value) -> Value:
        """The difference first: a product of its own for each would round huge scores to more than the maximum."""
        exponent = self.emit.builder.fmul(self.emit.builder.fsub(score, maximum), self.factor)
        return self.emit.power_of_two(exponent, FEW_TERMS)

    def _emit_corrected(self, turn: Value, weighted: Value) -> None:
        """Multiply sums before a step's values are added, of rows whose maximum has grown."""
        emit, builder = self.emit, self.emit.builder
        corrections = self._corrections(turn)
        moved = builder.bitcast(builder.fcmp_unordered("!=", emit.load(corrections), emit.constant(1.0)), INT16)
        with emit.bits(builder.zext(moved, INT64)) as row:
            factor = emit.spread(emit.at(corrections, row))
            place = emit.at(weighted, builder.mul(row, emit.integer(self.head_dim)))
            for channel in range(0, self.head_dim, TILE):
                target = emit.at(place, channel)
                emit.store(builder.fmul(emit.load(target), factor), target)
