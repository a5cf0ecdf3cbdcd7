"""The inner loops for fewer rows than a vector has lanes, as in decoding: lanes are keys, then channels, never padding.

Keys are turned, so that their channels stand in vectors of keys: scores are one broadcast number of a row against
these. Weighted values are one broadcast weight against vectors of channels. Each sum takes its turns as in
`cpu.attention.panel`, channel by channel and key by key, so a row has the same bits here as there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.panel import SUM_CHANNELS, Blocking
from cag_kernels.cpu.emit import ELEMENTS, FLOAT, INT64, LINE_BYTES, POINTER, UNSEEN, Emitter, Value

SUMS_IN_REGISTERS = {16: 24, 8: 12}  # lanes of a register -> sums beside what they meet
_TURNED_BYTES = 8192  # of turned keys at most: the first cache has more to hold


class FewRows:
    """Attention of `rows` rows over one range of keys.

    Arguments: query `[head_dim, num_lanes]`, keys and values `[num_keys, head_dim]` as `kept`, and where the maxima and
    denominators `[num_lanes]` and the weighted sums `[head_dim, num_lanes]` go; then the number of keys and num_lanes.
    """

    name = "few"
    num_pointers = 6

    def __init__(self, module: ir.Module, head_dim: int, rows: int, blocking: Blocking, kept: torch.dtype) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * self.num_pointers + [INT64] * 2)
        self.function = ir.Function(module, kind, name=f"{self.name}_{rows}")
        self.function.linkage = "internal"
        self.head_dim = head_dim
        self.rows = range(rows)
        self.blocking, self.kept, self.element = blocking, kept, ELEMENTS[kept]
        self.emit = self.make_emitter()
        self.line = LINE_BYTES // kept.itemsize  # numbers in a line of the cache
        self.chunks = range(head_dim // blocking.lanes)
        arguments = self.function.args
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = arguments[:6]
        self.others, (self.num_keys, self.num_lanes) = arguments[6:-2], arguments[-2:]
        self.row_query = self.emit.scratch(rows * head_dim)
        self.sums = self.emit.scratch(rows * head_dim)
        self.vectors = _vectors_of_keys(rows, self.columns(), blocking)
        self.turned = self.emit.scratch(self.columns() * self.vectors * blocking.lanes)
        self.turn = self.turning_function(module)
        self.scores = self.emit.scratch(rows * blocking.tile)
        self._emit_range()

    def make_emitter(self) -> Emitter:
        """What the function's instructions are made with."""
        return Emitter(self.function, self.blocking.lanes)

    def columns(self) -> int:
        """Of turned keys: channels."""
        return self.head_dim

    def turning_function(self, module: ir.Module) -> ir.Function:
        """Lays a vector of keys out column by column. Arguments: the tile's keys, the first one of the vector, the last
        one of the tile, and where its numbers go, lanes from a column's to the next `vectors` apart."""
        return _turning_function(module, self.head_dim, self.vectors, self.blocking, self.kept)

    def _chunk(self, pointer: Value, row: int, chunk: int) -> Value:
        return self.emit.at(pointer, row * self.head_dim + chunk * self.blocking.lanes)

    def _emit_range(self) -> None:
        emit, zero, rows = self.emit, self.emit.integer(0), self.rows
        self._emit_start()
        start = [emit.constant(UNSEEN)] * len(rows) + [emit.constant(0.0)] * len(rows)
        with emit.loop(zero, self.num_keys, self.blocking.tile, start) as tile:
            count = emit.minimum(emit.builder.sub(self.num_keys, tile.index), emit.integer(self.blocking.tile))
            first = emit.builder.mul(tile.index, emit.integer(self.head_dim))
            self._emit_scores(emit.at(self.keys, first, self.element), count)
            softmax = [self._emit_softmax(row, count, tile.values[row]) for row in rows]
            corrections = [correction for _, correction in softmax]
            denominators = tile.values[len(rows) :]
            totals = self._emit_weighted(emit.at(self.values, first, self.element), count, corrections, denominators)
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
                first, target = builder.add(base.index, lane.index), emit.at(self.turned, lane.index)
                builder.call(self.turn, [keys, first, last, target])
            ahead = builder.mul(builder.add(base.index, emit.integer(self.blocking.tile)), emit.integer(self.head_dim))
            ahead = emit.at(keys, ahead, self.element)
            sums = self._emit_products(0, ahead)
            for channel in range(SUM_CHANNELS, self.head_dim, SUM_CHANNELS):
                sums = [builder.fadd(*pair) for pair in zip(sums, self._emit_products(channel, ahead), strict=True)]
            for row in self.rows:
                place = emit.at(self.scores, builder.add(base.index, emit.integer(row * self.blocking.tile)))
                for vector in range(self.vectors):
                    emit.store(sums[row * self.vectors + vector], emit.at(place, vector * lanes))

    def _emit_products(self, first: int, ahead: Value) -> list[Value]:
        """Scores of the turned keys, row by row, by the channels from `first` on.

        As many keys from `ahead` on are asked for, a part with each channel: memory brings a few lines at a time, and
        whoever asks for more of them waits.
        """
        emit, builder, vectors = self.emit, self.emit.builder, range(self.vectors)
        nothing = [emit.constant(0.0)] * (len(self.rows) * len(vectors))
        stop = min(first + SUM_CHANNELS, self.head_dim)
        with emit.loop(emit.integer(first), emit.integer(stop), 1, nothing) as channel:
            keys = emit.at(self.turned, builder.mul(channel.index, emit.integer(self.vectors * emit.lanes)))
            size = self.vectors * emit.lanes  # of the keys that are asked for
            for part in range(0, size, self.line):
                index = builder.add(builder.mul(channel.index, emit.integer(size)), emit.integer(part))
                emit.prefetch(emit.at(ahead, index, self.element))
            query = emit.at(self.row_query, channel.index)
            channel.following, _ = emit_outer(
                emit.multiply_add,
                [partial(emit.spread, emit.at(query, row * self.head_dim)) for row in self.rows],
                [partial(emit.load, emit.at(keys, vector * emit.lanes)) for vector in vectors],
                channel.values,
            )
        return list(channel.following)

    def _emit_softmax(self, row: int, count: Value, maximum: Value) -> tuple[Value, Value]:
        """Turn a row's scores into weights; the new maximum and the correction of older sums, alike in all lanes."""
        emit, lanes = self.emit, self.blocking.lanes
        scores = emit.at(self.scores, row * self.blocking.tile)
        with emit.loop(emit.integer(0), count, lanes, [maximum]) as key:
            key.following = [emit.larger(emit.load(emit.at(scores, key.index)), key.values[0])]
        larger = emit.across(key.following[0], emit.larger)
        with emit.loop(emit.integer(0), count, lanes) as key:
            place = emit.at(scores, key.index)
            emit.store(self._weight(emit.load(place), larger), place)
        return larger, self._weight(maximum, larger)

    def _weight(self, score: Value, largest: Value) -> Value:
        return self.emit.exponential(self.emit.builder.fsub(score, largest))

    def _emit_weighted(
        self, values: Value, count: Value, corrections: list[Value], denominators: Sequence[Value]
    ) -> list[Value]:
        """Add the tile's weighted values, as many channels at a time as registers hold for all rows, and its weights
        to the denominators, which are alike in all lanes."""
        totals = [self.emit.builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        passes, found = self._passes(), []
        rows, most = len(self.rows), SUMS_IN_REGISTERS[self.blocking.lanes]
        if (len(passes[-1]) + 1) * rows > most:  # denominators are summed with the last channels, if there is room
            passes.append(self.chunks[:0])
        for number, chunks in enumerate(passes):
            added = totals if number == len(passes) - 1 else []
            lines = self._lines(number, len(passes))
            found = self._emit_channels(values, count, corrections, chunks, added, lines)
        return found

    def _passes(self) -> list[range]:
        """Vectors of channels by the pass that sums them, as many as registers hold sums of."""
        rows, most = len(self.rows), SUMS_IN_REGISTERS[self.blocking.lanes]
        num_passes = -(-len(self.chunks) // max(1, most // rows))
        size = -(-len(self.chunks) // num_passes)
        return [self.chunks[first : first + size] for first in range(0, len(self.chunks), size)]

    def _lines(self, number: int, num_passes: int) -> list[int]:
        """Channels of the next tile that a pass asks for, each the first of a line."""
        return [line for line in range(0, self.head_dim, self.line) if line * num_passes // self.head_dim == number]

    def _emit_channels(
        self,
        values: Value,
        count: Value,
        corrections: list[Value],
        chunks: range,
        totals: list[Value],
        lines: list[int],
    ) -> list[Value]:
        """Of some channels, which may be none; `totals`, if any, get the weights. `lines`: channels at which the next
        tile is asked for."""
        emit, builder = self.emit, self.emit.builder
        places = [self._chunk(self.sums, row, chunk) for row in self.rows for chunk in chunks]
        factors = [corrections[row] for row in self.rows for _ in chunks]
        start = [builder.fmul(emit.load(place), factor) for place, factor in zip(places, factors, strict=True)]
        with emit.loop(emit.integer(0), count, 1, [*start, *totals]) as key:
            source = emit.at(values, builder.mul(key.index, emit.integer(self.head_dim)), self.element)
            for line in lines:
                emit.prefetch(emit.at(source, self.blocking.tile * self.head_dim + line, self.element))
            sums, weights = emit_outer(
                emit.multiply_add,
                [partial(emit.spread, emit.at(self.scores, self._score_index(row, key.index))) for row in self.rows],
                [partial(self._load, source, chunk) for chunk in chunks],
                key.values[: len(start)],
            )
            before = key.values[len(start) :]
            key.following = sums + [builder.fadd(*pair) for pair in zip(before, weights, strict=False)]
        for place, total in zip(places, key.following, strict=False):
            emit.store(total, place)
        return list(key.following[len(start) :])

    def _load(self, values: Value, chunk: int) -> Value:
        return self.emit.load_float(self.emit.at(values, chunk * self.emit.lanes, self.element), self.kept)

    def _score_index(self, row: int, key: Value) -> Value:
        return self.emit.builder.add(key, self.emit.integer(row * self.blocking.tile))


def _turning_function(
    module: ir.Module, head_dim: int, vectors: int, blocking: Blocking, kept: torch.dtype
) -> ir.Function:
    """Function that lays a vector of keys out channel by channel.

    Arguments: the tile's keys, the first one of the vector, the last one of the tile, and where its numbers go, lanes
    from a channel's to the next `vectors` apart. The last block of channels may begin within the one before. It is a
    function of its own so that what it keeps in registers is not kept in the loops beside it.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, INT64, INT64, POINTER]), name="turn")
    function.linkage = "internal"
    emit, lanes = Emitter(function, blocking.lanes), blocking.lanes
    builder, (keys, first, last, target) = emit.builder, function.args
    tokens = [emit.minimum(builder.add(first, emit.integer(key)), last) for key in range(lanes)]
    element, size = ELEMENTS[kept], emit.columns_at_once(kept)
    rows = [emit.at(keys, builder.mul(token, emit.integer(head_dim)), element) for token in tokens]
    with emit.loop(emit.integer(0), emit.integer(head_dim), size) as block:
        channel = emit.minimum(block.index, emit.integer(head_dim - size))
        step = emit.integer(vectors * lanes)
        for number, wide in enumerate(emit.load_transposed([emit.at(row, channel, element) for row in rows], kept)):
            index = builder.mul(builder.add(channel, emit.integer(number)), step)
            emit.store(wide, emit.at(target, index))
    builder.ret_void()
    return function


def emit_outer(
    add: Callable[[Value, Value, Value], Value],
    left: list[Callable[[], Value]],
    right: list[Callable[[], Value]],
    totals: Sequence[Value],
) -> tuple[list[Value], list[Value]]:
    """`totals [left, right]` and the products of what is loaded, and the left ones; `add(left, right, total)`. The
    fewer ones are held; the others come one at a time, as sums fill the registers."""
    sums, width = list(totals), len(right)
    if len(left) <= width:
        lefts = [load() for load in left]
        for column, load in enumerate(right):
            number = load()
            for row, held in enumerate(lefts):
                sums[row * width + column] = add(held, number, sums[row * width + column])
        return sums, lefts
    rights, lefts = [load() for load in right], []
    for row, load in enumerate(left):
        lefts.append(load())
        for column, held in enumerate(rights):
            sums[row * width + column] = add(lefts[row], held, sums[row * width + column])
    return sums, lefts


def _vectors_of_keys(rows: int, columns: int, blocking: Blocking) -> int:
    """How many are turned at once: so that enough sums are under way, in registers and in the first cache."""
    room = min(SUMS_IN_REGISTERS[blocking.lanes] // rows, _TURNED_BYTES // (4 * columns * blocking.lanes))
    return max(1, min(1 << (room.bit_length() - 1), blocking.tile // blocking.lanes)) if room else 1
