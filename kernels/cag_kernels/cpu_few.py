"""The inner loops for fewer rows than a vector has lanes, as in decoding: lanes are keys, then channels, never padding.

Keys are turned, so that their channels stand in vectors of keys: scores are one broadcast number of a row against
these. Weighted values are one broadcast weight against vectors of channels. Each sum takes its turns as in `cpu_panel`,
channel by channel and key by key, so a row has the same bits here as there.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_emit import FLOAT, INT16, INT64, POINTER, UNSEEN, Emitter, Value
from cag_kernels.cpu_panel import SUM_CHANNELS, Blocking

_SUMS_IN_REGISTERS = {16: 24, 8: 12}  # lanes of a register -> sums beside what they meet
_TURNED_BYTES = 8192  # of turned keys at most: the first cache has more to hold


class FewRows:
    """Attention of `rows` rows over one range of keys; arguments and results as those of `cpu_panel.Panel`."""

    def __init__(self, module: ir.Module, head_dim: int, rows: int, blocking: Blocking) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 6 + [INT64] * 2)
        self.function = ir.Function(module, kind, name=f"few_{rows}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, blocking.lanes)
        self.head_dim = head_dim
        self.rows = range(rows)
        self.blocking = blocking
        self.chunks = range(head_dim // blocking.lanes)
        arguments = self.function.args
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = arguments[:6]
        self.num_keys, self.num_lanes = arguments[6:]
        self.row_query = self.emit.scratch(rows * head_dim)
        self.sums = self.emit.scratch(rows * head_dim)
        self.vectors = _vectors_of_keys(rows, head_dim, blocking)
        self.turned = self.emit.scratch(head_dim * self.vectors * blocking.lanes)
        self.scores = self.emit.scratch(rows * blocking.tile)
        self._emit_range()

    def _chunk(self, pointer: Value, row: int, chunk: int) -> Value:
        return self.emit.at(pointer, row * self.head_dim + chunk * self.blocking.lanes)

    def _emit_range(self) -> None:
        emit, zero, rows = self.emit, self.emit.integer(0), self.rows
        self._emit_start()
        start = [emit.constant(UNSEEN)] * len(rows) + [emit.constant(0.0)] * len(rows)
        with emit.loop(zero, self.num_keys, self.blocking.tile, start) as tile:
            count = emit.minimum(emit.builder.sub(self.num_keys, tile.index), emit.integer(self.blocking.tile))
            first = emit.builder.mul(tile.index, emit.integer(self.head_dim))
            self._emit_scores(emit.at(self.keys, first, INT16), count)
            softmax = [self._emit_softmax(row, count, tile.values[row]) for row in rows]
            corrections = [correction for _, correction in softmax]
            denominators = tile.values[len(rows) :]
            totals = self._emit_weighted(emit.at(self.values, first, INT16), count, corrections, denominators)
            tile.following = [maximum for maximum, _ in softmax] + totals
        self._emit_end(tile.following)

    def _emit_start(self) -> None:
        """Copy the query with a row's channels side by side, and begin with nothing summed."""
        emit, builder = self.emit, self.emit.builder
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 1) as channel:
            source = emit.at(self.query, builder.mul(channel.index, self.num_lanes))
            for row in self.rows:
                number = builder.load(emit.at(source, row), typ=FLOAT, align=4)
                place = builder.add(channel.index, emit.integer(row * self.head_dim))
                builder.store(number, emit.at(self.row_query, place), align=4)
                builder.store(ir.Constant(FLOAT, 0.0), emit.at(self.sums, place), align=4)

    def _emit_end(self, following: list[Value]) -> None:
        emit, builder = self.emit, self.emit.builder
        emit.store(emit.constant(0.0), self.maximum)
        emit.store(emit.constant(1.0), self.denominator)
        for row in self.rows:
            total = following[len(self.rows) + row]
            builder.store(emit.first_lane(following[row]), emit.at(self.maximum, row), align=4)
            builder.store(emit.first_lane(total), emit.at(self.denominator, row), align=4)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 1) as channel:
            target = emit.at(self.weighted, builder.mul(channel.index, self.num_lanes))
            for row in self.rows:
                place = emit.at(self.sums, builder.add(channel.index, emit.integer(row * self.head_dim)))
                builder.store(builder.load(place, typ=FLOAT, align=4), emit.at(target, row), align=4)
        builder.ret_void()

    def _emit_scores(self, keys: Value, count: Value) -> None:
        """Scores of a tile, `[row, key]`; places behind the last key repeat its score."""
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        step, last = self.vectors * lanes, builder.sub(count, emit.integer(1))
        with emit.loop(emit.integer(0), count, step) as base:
            with emit.loop(emit.integer(0), emit.integer(step), lanes) as lane:
                self._emit_turned(keys, builder.add(base.index, lane.index), last, emit.at(self.turned, lane.index))
            sums = self._emit_products(0)
            for channel in range(SUM_CHANNELS, self.head_dim, SUM_CHANNELS):
                sums = [builder.fadd(*pair) for pair in zip(sums, self._emit_products(channel), strict=True)]
            for row in self.rows:
                place = emit.at(self.scores, builder.add(base.index, emit.integer(row * self.blocking.tile)))
                for vector in range(self.vectors):
                    emit.store(sums[row * self.vectors + vector], emit.at(place, vector * lanes))

    def _emit_turned(self, keys: Value, first: Value, last: Value, target: Value) -> None:
        """A vector of keys from `first` on, channel by channel; the same places of the next tile are asked for.

        Turned are numbers of four bytes, pairs of channels; the last block may begin within the one before.
        """
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        tokens = [emit.minimum(builder.add(first, emit.integer(key)), last) for key in range(lanes)]
        rows = [emit.at(keys, builder.mul(token, emit.integer(self.head_dim)), INT16) for token in tokens]
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), 2 * lanes) as block:
            channel = emit.minimum(block.index, emit.integer(self.head_dim - 2 * lanes))
            places = [emit.at(row, channel, INT16) for row in rows]
            for place in places:
                emit.prefetch(emit.at(place, self.blocking.tile * self.head_dim, INT16))
            pairs = emit.transposed([builder.load(place, typ=emit.integers, align=2) for place in places])
            step = emit.integer(self.vectors * lanes)
            for number, pair in enumerate(pairs):
                for odd, wide in enumerate(emit.widened_pair(pair)):
                    index = builder.mul(builder.add(channel, emit.integer(2 * number + odd)), step)
                    emit.store(wide, emit.at(target, index))

    def _emit_products(self, first: int) -> list[Value]:
        """Scores of the turned keys, row by row, by the channels from `first` on."""
        emit, builder, vectors = self.emit, self.emit.builder, range(self.vectors)
        nothing = [emit.constant(0.0)] * (len(self.rows) * len(vectors))
        stop = min(first + SUM_CHANNELS, self.head_dim)
        with emit.loop(emit.integer(first), emit.integer(stop), 1, nothing) as channel:
            keys = emit.at(self.turned, builder.mul(channel.index, emit.integer(self.vectors * emit.lanes)))
            wide = [emit.load(emit.at(keys, vector * emit.lanes)) for vector in vectors]
            query = emit.at(self.row_query, channel.index)
            numbers = [emit.spread(emit.at(query, row * self.head_dim)) for row in self.rows]
            products = [(number, part) for number in numbers for part in wide]
            channel.following = [
                emit.multiply_add(*product, total) for product, total in zip(products, channel.values, strict=True)
            ]
        return list(channel.following)

    def _load_chunks(self, source: Value, chunks: range) -> list[Value]:
        """Widened vectors of one token's channels; the same place of the next tile is asked for."""
        emit, lanes = self.emit, self.blocking.lanes
        wide = []
        for chunk in chunks:
            place = emit.at(source, chunk * lanes, INT16)
            if chunk % 2 == 0:
                emit.prefetch(emit.at(place, self.blocking.tile * self.head_dim, INT16))
            wide.append(emit.load_bfloat16(place))
        return wide

    def _emit_softmax(self, row: int, count: Value, maximum: Value) -> tuple[Value, Value]:
        """Turn a row's scores into weights; the new maximum and the correction of older sums, alike in all lanes."""
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        scores = emit.at(self.scores, row * self.blocking.tile)
        with emit.loop(emit.integer(0), count, lanes, [maximum]) as key:
            key.following = [emit.larger(emit.load(emit.at(scores, key.index)), key.values[0])]
        larger = emit.across(key.following[0], emit.larger)
        with emit.loop(emit.integer(0), count, lanes) as key:
            place = emit.at(scores, key.index)
            emit.store(emit.exponential(builder.fsub(emit.load(place), larger)), place)
        return larger, emit.exponential(builder.fsub(maximum, larger))

    def _emit_weighted(
        self, values: Value, count: Value, corrections: list[Value], denominators: Sequence[Value]
    ) -> list[Value]:
        """Add the tile's weighted values, as many channels at a time as registers hold for all rows, and its weights
        to the denominators, which are alike in all lanes."""
        step = max(1, _SUMS_IN_REGISTERS[self.blocking.lanes] // len(self.rows))
        totals = [self.emit.builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        for first in range(0, len(self.chunks), step):
            totals = self._emit_channels(values, count, corrections, self.chunks[first : first + step], totals)
        return totals

    def _emit_channels(
        self, values: Value, count: Value, corrections: list[Value], chunks: range, totals: list[Value]
    ) -> list[Value]:
        """Of some channels; `totals` get the weights with the first ones."""
        emit, builder, adds = self.emit, self.emit.builder, chunks.start == 0
        places = [self._chunk(self.sums, row, chunk) for row in self.rows for chunk in chunks]
        factors = [corrections[row] for row in self.rows for _ in chunks]
        start = [builder.fmul(emit.load(place), factor) for place, factor in zip(places, factors, strict=True)]
        with emit.loop(emit.integer(0), count, 1, [*start, *(totals if adds else [])]) as key:
            source = emit.at(values, builder.mul(key.index, emit.integer(self.head_dim)), INT16)
            wide = self._load_chunks(source, chunks)
            weights = [emit.spread(emit.at(self.scores, self._score_index(row, key.index))) for row in self.rows]
            products = [(weights[row], part) for row in self.rows for part in wide]
            sums, before = key.values[: len(start)], key.values[len(start) :]
            added = [builder.fadd(*pair) for pair in zip(before, weights, strict=True)] if adds else []
            key.following = [
                emit.multiply_add(*product, total) for product, total in zip(products, sums, strict=True)
            ] + added
        for place, total in zip(places, key.following, strict=False):
            emit.store(total, place)
        return list(key.following[len(start) :]) if adds else totals

    def _score_index(self, row: int, key: Value) -> Value:
        return self.emit.builder.add(key, self.emit.integer(row * self.blocking.tile))


def _vectors_of_keys(rows: int, head_dim: int, blocking: Blocking) -> int:
    """How many are turned at once: so that enough sums are under way, in registers and in the first cache."""
    room = min(_SUMS_IN_REGISTERS[blocking.lanes] // rows, _TURNED_BYTES // (4 * head_dim * blocking.lanes))
    return max(1, min(1 << (room.bit_length() - 1), blocking.tile // blocking.lanes)) if room else 1
