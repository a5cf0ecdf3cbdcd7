"""The inner loops for fewer rows than a vector has lanes, as in decoding: lanes are channels or keys, never padding.

Products with a key are kept as vectors of partial sums; those of as many keys as a vector has lanes are then summed by
a tree of shuffles into one vector of scores. Weighted values are one broadcast weight against vectors of channels.
"""

from __future__ import annotations

from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu_emit import FLOAT, INT16, INT64, POINTER, UNSEEN, Emitter, Value
from cag_kernels.cpu_panel import Blocking

_SUMS_IN_REGISTERS = 24


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
        self.partial = self.emit.scratch(rows * blocking.lanes * blocking.lanes)
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
            softmax = [self._emit_softmax(row, count, tile.values[row], tile.values[len(rows) + row]) for row in rows]
            self._emit_weighted(emit.at(self.values, first, INT16), count, [correction for _, correction, _ in softmax])
            tile.following = [maximum for maximum, _, _ in softmax] + [total for _, _, total in softmax]
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
            total = emit.across(following[len(self.rows) + row], builder.fadd)
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
        last = builder.sub(count, emit.integer(1))
        with emit.loop(emit.integer(0), count, lanes) as base:
            with emit.loop(emit.integer(0), emit.integer(lanes), 1) as key:
                token = emit.minimum(builder.add(base.index, key.index), last)
                wide = self._load_chunks(emit.at(keys, builder.mul(token, emit.integer(self.head_dim)), INT16))
                for row in self.rows:
                    place = builder.mul(builder.add(key.index, emit.integer(row * lanes)), emit.integer(lanes))
                    emit.store(self._partial_product(row, wide), emit.at(self.partial, place))
            for row in self.rows:
                vectors = [emit.load(emit.at(self.partial, (row * lanes + key) * lanes)) for key in range(lanes)]
                place = builder.add(base.index, emit.integer(row * self.blocking.tile))
                emit.store(emit.sums_of(vectors), emit.at(self.scores, place))

    def _load_chunks(self, source: Value, chunks: range | None = None) -> list[Value]:
        """Widened vectors of one token's channels; the same place of the next tile is asked for."""
        emit, lanes = self.emit, self.blocking.lanes
        wide = []
        for chunk in self.chunks if chunks is None else chunks:
            place = emit.at(source, chunk * lanes, INT16)
            if chunk % 2 == 0:
                emit.prefetch(emit.at(place, self.blocking.tile * self.head_dim, INT16))
            wide.append(emit.load_bfloat16(place))
        return wide

    def _partial_product(self, row: int, wide: list[Value]) -> Value:
        emit = self.emit
        total = emit.builder.fmul(emit.load(self._chunk(self.row_query, row, 0)), wide[0])
        for chunk in self.chunks[1:]:
            total = emit.multiply_add(emit.load(self._chunk(self.row_query, row, chunk)), wide[chunk], total)
        return total

    def _emit_softmax(self, row: int, count: Value, maximum: Value, denominator: Value) -> tuple[Value, Value, Value]:
        """Turn a row's scores into weights; `(maximum, correction, denominator)`, the first two alike in all lanes."""
        emit, builder, lanes = self.emit, self.emit.builder, self.blocking.lanes
        scores = emit.at(self.scores, row * self.blocking.tile)
        with emit.loop(emit.integer(0), count, lanes, [maximum]) as key:
            key.following = [emit.larger(emit.load(emit.at(scores, key.index)), key.values[0])]
        larger = emit.across(key.following[0], emit.larger)
        correction = emit.exponential(builder.fsub(maximum, larger))
        with emit.loop(emit.integer(0), count, lanes, [builder.fmul(denominator, correction)]) as key:
            place = emit.at(scores, key.index)
            weights = emit.exponential(builder.fsub(emit.load(place), larger))
            weights = emit.first_lanes(weights, builder.sub(count, key.index))
            emit.store(weights, place)
            key.following = [builder.fadd(key.values[0], weights)]
        return larger, correction, key.following[0]

    def _emit_weighted(self, values: Value, count: Value, corrections: list[Value]) -> None:
        """Add the tile's weighted values, as many channels at a time as registers hold for all rows."""
        step = max(1, _SUMS_IN_REGISTERS // len(self.rows))
        for first in range(0, len(self.chunks), step):
            self._emit_channels(values, count, corrections, self.chunks[first : first + step])

    def _emit_channels(self, values: Value, count: Value, corrections: list[Value], chunks: range) -> None:
        emit, builder = self.emit, self.emit.builder
        places = [self._chunk(self.sums, row, chunk) for row in self.rows for chunk in chunks]
        factors = [corrections[row] for row in self.rows for _ in chunks]
        start = [builder.fmul(emit.load(place), factor) for place, factor in zip(places, factors, strict=True)]
        with emit.loop(emit.integer(0), count, 1, start) as key:
            source = emit.at(values, builder.mul(key.index, emit.integer(self.head_dim)), INT16)
            wide = self._load_chunks(source, chunks)
            weights = [emit.spread(emit.at(self.scores, self._score_index(row, key.index))) for row in self.rows]
            products = [(weights[row], part) for row in self.rows for part in wide]
            key.following = [
                emit.multiply_add(weight, part, total)
                for (weight, part), total in zip(products, key.values, strict=True)
            ]
        for place, total in zip(places, key.following, strict=True):
            emit.store(total, place)

    def _score_index(self, row: int, key: Value) -> Value:
        return self.emit.builder.add(key, self.emit.integer(row * self.blocking.tile))
