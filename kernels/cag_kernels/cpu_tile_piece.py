"""A piece of attention by tile products: up to 64 keys and values for up to 48 rows, as one function.

Scores and weights of a piece stay in the first cache, and what the next piece reads is asked for meanwhile.
Knows where a piece's operands lie; not what ranges, heads and tasks they come from (`cpu_tile_attention`).
"""

from __future__ import annotations

import math

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_emit import (
    FLOAT,
    INT8,
    INT16,
    INT32,
    INT64,
    LINE_BYTES,
    POINTER,
    SECOND_CACHE,
    UNSEEN,
    Value,
)
from cag_kernels.cpu_tiles import DEPTH, FEW_TERMS, TILE, TileEmitter
from cag_kernels.prefixes import Codes

PIECE = 64  # keys of one softmax step: scores, turned values and weights of them stay in the first cache
# which share of the next piece is asked for during which phase of this one: about as long as each takes. Memory brings
# a piece in about the time in which it is computed with, but only if it is asked all along.
_AHEAD = {"scores": (0, 0.2), "maxima": (0.2, 0.3), "weights": (0.3, 0.7), "left": (0.7, 0.8), "sums": (0.8, 1)}
_LOG2_E = 1 / math.log(2)
_OF_ROWS, _SHARED = 3, 6  # tiles 0 to 2 hold sums, 3 to 5 operands of rows, 6 the one that all rows meet


def piece_bytes(head_dim: int, codes: Codes | None) -> tuple[int, int]:
    """Bytes in memory of the keys and of the values of a piece."""
    bits = (16, 16) if codes is None else (codes.key_bits, codes.value_bits)
    return PIECE * head_dim * bits[0] // 8, PIECE * head_dim * bits[1] // 8


class Piece:
    """Up to `PIECE` keys for `width` vectors of rows. The maximum is of scores that are not scaled yet.

    Arguments: the turned query, keys, paired values; maximum, denominator and weighted sums so far; where keys and
    values of the next piece lie in memory; then the number of keys, rows from one channel of the query to the next, and
    the bits of the scale.
    """

    def __init__(self, module: ir.Module, head_dim: int, width: int, piece_bytes: tuple[int, int]) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 8 + [INT64] * 3)
        self.function = ir.Function(module, kind, name=f"piece_{width}")
        self.function.linkage = "internal"
        self.emit = TileEmitter(self.function)
        self.head_dim, self.width, self.row_floats = head_dim, width, width * TILE
        arguments = self.function.args
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = arguments[:6]
        self.ahead, self.piece_bytes = arguments[6:8], piece_bytes
        self.count, self.lanes, scale = arguments[8:]
        emit, builder = self.emit, self.emit.builder
        self.scores = emit.scratch(PIECE * self.row_floats)
        self.weights = emit.bytes_on_stack(2 * PIECE * self.row_floats)
        self.corrections = emit.scratch(self.row_floats)
        factor = builder.bitcast(builder.trunc(scale, INT32), FLOAT)
        self.factor = builder.fmul(emit.spread_number(factor), emit.constant(_LOG2_E))  # of scores, to powers of two
        blocks = builder.sdiv(builder.add(self.count, emit.integer(DEPTH - 1)), emit.integer(DEPTH))
        self.num_keys = builder.mul(blocks, emit.integer(DEPTH))
        self._emit_scores()
        self._emit_unseen()
        self._emit_corrected(self._emit_softmax())
        self._emit_left()
        self._emit_weighted()
        builder.ret_void()

    def _emit_scores(self) -> None:
        emit, builder = self.emit, self.emit.builder
        key_bytes = 2 * self.head_dim
        lane_bytes = builder.mul(self.lanes, emit.integer(4))
        with emit.loop(emit.integer(0), self.count, TILE) as key:
            keys = emit.at(self.keys, builder.mul(key.index, emit.integer(key_bytes)), INT8)
            for lane in range(self.width):
                emit.zero(lane)
            for step in range(self.head_dim // DEPTH):
                emit.load_tile(_SHARED, emit.at(keys, 2 * DEPTH * step, INT8), key_bytes)
                rows = emit.at(self.query, builder.mul(self.lanes, emit.integer(TILE * step)), INT32)
                for lane in range(self.width):
                    emit.load_tile(_OF_ROWS + lane, emit.at(rows, lane * TILE, INT32), lane_bytes)
                    emit.add_product(lane, _SHARED, _OF_ROWS + lane)
            target = emit.at(self.scores, builder.mul(key.index, emit.integer(self.row_floats)))
            for lane in range(self.width):
                emit.store_tile(lane, emit.at(target, lane * TILE), 4 * self.row_floats)
            self._emit_ahead("scores", key.index, TILE, PIECE)

    def _emit_unseen(self) -> None:
        """Scores of what lies behind the last key in its block of 32."""
        emit, builder = self.emit, self.emit.builder
        with (
            emit.when(builder.icmp_signed("<", self.count, self.num_keys)),
            emit.loop(self.count, self.num_keys, 1) as key,
        ):
            place = emit.at(self.scores, builder.mul(key.index, emit.integer(self.row_floats)))
            for lane in range(self.width):
                emit.store(emit.constant(UNSEEN), emit.at(place, lane * TILE))

    def _row(self, pointer: Value, index: Value) -> list[Value]:
        place = self.emit.at(pointer, self.emit.builder.mul(index, self.emit.integer(self.row_floats)))
        return [self.emit.load(self.emit.at(place, lane * TILE)) for lane in range(self.width)]

    def _lanes_of(self, pointer: Value) -> list[Value]:
        return [self.emit.load(self.emit.at(pointer, lane * TILE)) for lane in range(self.width)]

    def _emit_softmax(self) -> list[Value]:
        """Scores to weights, pairs of keys side by side in the scores' memory; the corrections of older sums."""
        emit, builder, lanes = self.emit, self.emit.builder, range(self.width)
        before = self._lanes_of(self.maximum)
        with emit.loop(emit.integer(0), self.num_keys, 2, before) as key:
            even, odd = (
                self._row(self.scores, key.index),
                self._row(self.scores, builder.add(key.index, emit.integer(1))),
            )
            self._emit_ahead("maxima", key.index, 2, PIECE)
            key.following = [emit.larger(odd[i], emit.larger(even[i], key.values[i])) for i in lanes]
        larger = list(key.following)
        corrections = [self._correction(before[i], larger[i]) for i in lanes]
        old = self._lanes_of(self.denominator)
        with emit.loop(emit.integer(0), self.num_keys, 2, [builder.fmul(old[i], corrections[i]) for i in lanes]) as key:
            weights = [
                [
                    self._weight(score, larger[i])
                    for i, score in enumerate(self._row(self.scores, builder.add(key.index, emit.integer(step))))
                ]
                for step in range(2)
            ]
            place = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
            for i in lanes:
                pairs = emit.pairs(weights[0][i], weights[1][i])
                builder.store(pairs, emit.at(self.scores, builder.add(place, emit.integer(i * TILE))), align=4)
            self._emit_ahead("weights", key.index, 2, PIECE)
            key.following = [builder.fadd(key.values[i], builder.fadd(weights[0][i], weights[1][i])) for i in lanes]
        for i in lanes:
            emit.store(larger[i], emit.at(self.maximum, i * TILE))
            emit.store(key.following[i], emit.at(self.denominator, i * TILE))
        return corrections

    def _emit_ahead(self, phase: str, index: Value, step: int, stop: int) -> None:
        """Ask for the next piece's share of one round of a phase's loop, which goes from 0 to `stop` by `step`."""
        emit, builder = self.emit, self.emit.builder
        num_keys, num_lines = (size // LINE_BYTES for size in (self.piece_bytes[0], sum(self.piece_bytes)))
        first, last = (int(num_lines * share) for share in _AHEAD[phase])
        each = -(-(last - first) * step // stop)
        begin = builder.add(
            builder.mul(builder.udiv(index, emit.integer(step)), emit.integer(each)), emit.integer(first)
        )
        for number in range(each):
            line = builder.add(begin, emit.integer(number))
            of_keys = builder.icmp_signed("<", line, emit.integer(num_keys))
            place = builder.select(of_keys, *self.ahead)
            line = builder.select(of_keys, line, builder.sub(line, emit.integer(num_keys)))
            emit.prefetch(emit.at(place, builder.mul(line, emit.integer(LINE_BYTES)), INT8), near=SECOND_CACHE)

    def _correction(self, before: Value, larger: Value) -> Value:
        """What older sums are multiplied by: exactly 1 where the maximum is what it was."""
        same = self.emit.builder.fcmp_ordered("==", before, larger)
        return self.emit.builder.select(same, self.emit.constant(1.0), self._weight(before, larger))

    def _weight(self, score: Value, maximum: Value) -> Value:
        """The difference first: a product of its own for each would round huge scores to more than the maximum."""
        exponent = self.emit.builder.fmul(self.emit.builder.fsub(score, maximum), self.factor)
        return self.emit.power_of_two(exponent, FEW_TERMS)

    def _emit_left(self) -> None:
        """Weights as left operands: `[blocks of 32 keys, width, 16 rows, 32 keys]`."""
        emit, builder = self.emit, self.emit.builder
        with emit.loop(emit.integer(0), self.num_keys, DEPTH) as key:
            first = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
            for lane in range(self.width):
                place = builder.add(first, emit.integer(lane * TILE))
                source = emit.at(self.scores, place, INT32)
                pairs = [emit.load_integers(emit.at(source, pair * self.row_floats, INT32)) for pair in range(TILE)]
                target = emit.at(self.weights, builder.add(first, emit.integer(lane * TILE * TILE)), INT32)
                for row, vector in enumerate(emit.transposed(pairs)):
                    builder.store(vector, emit.at(target, row * TILE, INT32), align=4)
            self._emit_ahead("left", key.index, DEPTH, PIECE)

    def _emit_corrected(self, corrections: list[Value]) -> None:
        """Multiply older sums, 16 rows at a time and only where the maximum of one of these has grown."""
        emit, builder = self.emit, self.emit.builder
        for lane, vector in enumerate(corrections):
            emit.store(vector, emit.at(self.corrections, lane * TILE))
            moved = builder.bitcast(builder.fcmp_unordered("!=", vector, emit.constant(1.0)), INT16)
            first = emit.integer(lane * TILE)
            with (
                emit.when(builder.icmp_signed("!=", moved, ir.Constant(INT16, 0))),
                emit.loop(first, builder.add(first, emit.integer(TILE)), 1) as row,
            ):
                factor = emit.spread(emit.at(self.corrections, row.index))
                place = emit.at(self.weighted, builder.mul(row.index, emit.integer(self.head_dim)))
                for channel in range(0, self.head_dim, TILE):
                    target = emit.at(place, channel)
                    emit.store(builder.fmul(emit.load(target), factor), target)

    def _emit_weighted(self) -> None:
        """Add the piece's weighted values, 16 channels at a time."""
        emit, builder = self.emit, self.emit.builder
        row_bytes = 4 * self.head_dim
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), TILE) as channel:
            places = [
                emit.at(self.weighted, builder.add(channel.index, emit.integer(lane * TILE * self.head_dim)))
                for lane in range(self.width)
            ]
            for lane, place in enumerate(places):
                emit.load_tile(lane, place, row_bytes)
            with emit.loop(emit.integer(0), self.num_keys, DEPTH) as key:
                index = builder.add(
                    builder.mul(key.index, emit.integer(self.head_dim)), builder.mul(channel.index, emit.integer(DEPTH))
                )
                emit.load_tile(_SHARED, emit.at(self.values, index, INT16))
                first = builder.mul(builder.sdiv(key.index, emit.integer(2)), emit.integer(self.row_floats))
                for lane in range(self.width):
                    source = emit.at(self.weights, builder.add(first, emit.integer(lane * TILE * TILE)), INT32)
                    emit.load_tile(_OF_ROWS + lane, source)
                    emit.add_product(lane, _OF_ROWS + lane, _SHARED)
            self._emit_ahead("sums", channel.index, TILE, self.head_dim)
            for lane, place in enumerate(places):
                emit.store_tile(lane, place, row_bytes)
