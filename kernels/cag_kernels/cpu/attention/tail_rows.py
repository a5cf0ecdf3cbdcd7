"""The inner loops of attention over tails: a few rows over one block of keys, as LLVM code.

Keys come turned, so that lanes are keys: scores are one broadcast number of a row against vectors of keys. Weighted
values are one broadcast weight against vectors of channels. Each row sees keys of its own; those of the block that it
does not see weigh exactly nothing. Sums of a row take the same turns whatever rows stand beside it.
"""

from __future__ import annotations

from functools import partial

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.few import SUMS_IN_REGISTERS, emit_outer
from cag_kernels.cpu.attention.panel import SUM_CHANNELS
from cag_kernels.cpu.attention.window import emit_reference
from cag_kernels.cpu.emit import ELEMENTS, INT32, INT64, LINE_BYTES, POINTER, UNSEEN, Emitter, Value
from cag_kernels.prefixes import BLOCK_TOKENS


class TailRows:
    """Attention of `rows` rows over one block of a tail's keys, on top of what their sums hold.

    Arguments: turned keys `[head_dim, BLOCK_TOKENS]`, values `[count, head_dim]` as `kept`, the next block's values,
    which are asked for; scaled query `[rows, head_dim]`, the first key that each row sees and the one behind its last,
    int32 `[rows]`; maxima and denominators `[rows]` and weighted sums `[rows, head_dim]`, which the block's join; then
    the block's first key and `count`.
    """

    def __init__(self, module: ir.Module, head_dim: int, rows: int, lanes: int, kept: torch.dtype) -> None:
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 9 + [INT64] * 2)
        self.function = ir.Function(module, kind, name=f"rows_{rows}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, lanes)
        self.head_dim, self.rows, self.kept, self.element = head_dim, range(rows), kept, ELEMENTS[kept]
        self.most_sums = SUMS_IN_REGISTERS[max(8, lanes)]
        self.keys, self.values, self.ahead, self.query, self.firsts, self.lasts = self.function.args[:6]
        self.maxima, self.denominators, self.sums, self.token, self.count = self.function.args[6:]
        self.scores = self.emit.scratch(rows * BLOCK_TOKENS)
        self._emit_scores()
        corrections = [self._emit_softmax(row) for row in self.rows]
        chunks, at_once = range(head_dim // lanes), max(1, self.most_sums // rows)
        for first in range(0, len(chunks), at_once):
            self._emit_weighted(chunks[first : first + at_once], corrections)
        self.emit.builder.ret_void()

    def _emit_scores(self) -> None:
        """Scores of the block, `[row, key]`, by as many vectors of keys at once as registers hold sums of."""
        emit, vectors = self.emit, range(BLOCK_TOKENS // self.emit.lanes)
        at_once = max(1, self.most_sums // len(self.rows))
        for first in range(0, len(vectors), at_once):
            some = vectors[first : first + at_once]
            sums = self._emit_products(some, 0)
            for channel in range(SUM_CHANNELS, self.head_dim, SUM_CHANNELS):
                more = self._emit_products(some, channel)
                sums = [emit.builder.fadd(*pair) for pair in zip(sums, more, strict=True)]
            for row in self.rows:
                for index, vector in enumerate(some):
                    emit.store(sums[row * len(some) + index], self._score(row, vector))

    def _emit_products(self, vectors: range, first: int) -> list[Value]:
        emit, builder = self.emit, self.emit.builder
        nothing = [emit.constant(0.0)] * (len(self.rows) * len(vectors))
        stop = min(first + SUM_CHANNELS, self.head_dim)
        with emit.loop(emit.integer(first), emit.integer(stop), 1, nothing) as channel:
            keys = emit.at(self.keys, builder.mul(channel.index, emit.integer(BLOCK_TOKENS)))
            query = emit.at(self.query, channel.index)
            channel.following, _ = emit_outer(
                emit.multiply_add,
                [partial(emit.spread, emit.at(query, row * self.head_dim)) for row in self.rows],
                [partial(emit.load, emit.at(keys, vector * emit.lanes)) for vector in vectors],
                channel.values,
            )
        return list(channel.following)

    def _score(self, row: int, vector: int) -> Value:
        return self.emit.at(self.scores, row * BLOCK_TOKENS + vector * self.emit.lanes)

    def _emit_softmax(self, row: int) -> Value:
        """Turn a row's scores into weights; the correction of older sums, in all lanes."""
        emit, builder = self.emit, self.emit.builder
        vectors = range(BLOCK_TOKENS // emit.lanes)
        seen = [self._seen(row, vector) for vector in vectors]
        old = emit.spread(emit.at(self.maxima, row))
        found = [
            builder.select(one, emit.load(self._score(row, vector)), emit.constant(UNSEEN))
            for vector, one in zip(vectors, seen, strict=True)
        ]
        largest = old
        for scores in found:
            largest = emit.larger(scores, largest)
        largest = emit.across(largest, emit.larger)
        reference = emit_reference(emit, largest)
        weights = [emit.exponential(builder.fsub(scores, reference)) for scores in found]
        total = weights[0]
        for more in weights[1:]:
            total = builder.fadd(total, more)
        for vector, weight in zip(vectors, weights, strict=True):
            emit.store(weight, self._score(row, vector))
        correction = emit.exponential(builder.fsub(old, largest))
        place = emit.at(self.denominators, row)
        before = builder.fmul(emit.spread(place), correction)
        total = builder.fadd(before, emit.across(total, builder.fadd))
        builder.store(emit.first_lane(total), place, align=4)
        builder.store(emit.first_lane(largest), emit.at(self.maxima, row), align=4)
        return correction

    def _seen(self, row: int, vector: int) -> Value:
        """Which keys of a vector a row sees."""
        emit, builder = self.emit, self.emit.builder
        keys = ir.Constant(emit.integers, [vector * emit.lanes + lane for lane in range(emit.lanes)])
        token = emit.spread_integer(builder.trunc(self.token, INT32))
        bounds = (builder.load(emit.at(side, row, INT32), typ=INT32, align=4) for side in (self.firsts, self.lasts))
        first, last = (builder.sub(emit.spread_integer(bound), token) for bound in bounds)
        return builder.and_(builder.icmp_signed(">=", keys, first), builder.icmp_signed("<", keys, last))

    def _emit_weighted(self, chunks: range, corrections: list[Value]) -> None:
        """Add the block's weighted values, of some vectors of channels."""
        emit, builder = self.emit, self.emit.builder
        places = [emit.at(self.sums, row * self.head_dim + chunk * emit.lanes) for row in self.rows for chunk in chunks]
        factors = [corrections[row] for row in self.rows for _ in chunks]
        start = [builder.fmul(emit.load(place), factor) for place, factor in zip(places, factors, strict=True)]
        line = LINE_BYTES // self.kept.itemsize
        lines = range(chunks.start * emit.lanes // line * line, chunks.stop * emit.lanes, line)
        with emit.loop(emit.integer(0), self.count, 1, start) as key:
            row_of = builder.mul(key.index, emit.integer(self.head_dim))
            source = emit.at(self.values, row_of, self.element)
            for first in lines:
                emit.prefetch(emit.at(emit.at(self.ahead, row_of, self.element), first, self.element))
            scores = emit.at(self.scores, key.index)
            key.following, _ = emit_outer(
                emit.multiply_add,
                [partial(emit.spread, emit.at(scores, row * BLOCK_TOKENS)) for row in self.rows],
                [partial(self._load, source, chunk) for chunk in chunks],
                key.values,
            )
        for place, total in zip(places, key.following, strict=True):
            emit.store(total, place)

    def _load(self, source: Value, chunk: int) -> Value:
        return self.emit.load_float(self.emit.at(source, chunk * self.emit.lanes, self.element), self.kept)


def turning_function(module: ir.Module, head_dim: int, lanes: int, kept: torch.dtype) -> ir.Function:
    """Function that lays a block of keys out channel by channel, `[head_dim, BLOCK_TOKENS]` float32.

    Arguments: the block's keys; the next block's, and the block's own values, which are asked for; how many keys the
    block has, and where their numbers go. Places behind the last key repeat it. bfloat16 are turned in pairs, where a
    row has them.
    """
    kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER, INT64, POINTER])
    function = ir.Function(module, kind, name="turn")
    function.linkage = "internal"
    emit, element = Emitter(function, lanes), ELEMENTS[kept]
    builder, (keys, ahead, values, count, target) = emit.builder, function.args
    last = builder.sub(count, emit.integer(1))
    by_pairs = kept is torch.bfloat16 and lanes > 1
    with emit.loop(emit.integer(0), emit.integer(BLOCK_TOKENS), lanes) as block:
        tokens = [builder.add(block.index, emit.integer(lane)) for lane in range(lanes)]
        rows, further, beside = (
            [emit.at(side, builder.mul(emit.minimum(token, last), emit.integer(head_dim)), element) for token in tokens]
            for side in (keys, ahead, values)
        )
        line = LINE_BYTES // kept.itemsize
        channel = 0
        while channel < head_dim:
            size = 2 * lanes if by_pairs and head_dim - channel >= 2 * lanes else lanes
            for row in further + beside:
                for first in range(-(-channel // line) * line, channel + size, line):
                    emit.prefetch(emit.at(row, first, element))
            places = [emit.at(row, channel, element) for row in rows]
            if size > lanes:
                columns = emit.load_transposed(places, kept)
            else:
                columns = emit.transposed([emit.load_float(place, kept) for place in places])
            for number, wide in enumerate(columns):
                place = builder.add(block.index, emit.integer((channel + number) * BLOCK_TOKENS))
                emit.store(wide, emit.at(target, place))
            channel += size
    builder.ret_void()
    return function
