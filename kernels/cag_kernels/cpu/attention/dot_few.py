"""The inner loops for fewer rows than a vector has lanes by products of pairs (AVX512_BF16).

What `cpu.attention.few` is to `cpu.attention.panel`, this is to `cpu.attention.dot_panel`: keys are turned in pairs of
channels, and the same channels of two keys' values are laid side by side. Each sum takes its turns as there, pair by
pair, so a row has the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from llvmlite import ir  # type: ignore[import-untyped]

from cag_kernels.cpu.attention.dot_panel import load_paired, pair_of
from cag_kernels.cpu.attention.few import FewRows, emit_outer
from cag_kernels.cpu.attention.panel import SUM_CHANNELS, Blocking
from cag_kernels.cpu.dots import DEPTH, FEW_TERMS, DotEmitter
from cag_kernels.cpu.emit import FLOAT, INT16, INT32, INT64, POINTER, Emitter, Value


class DotFewRows(FewRows):
    """Attention of `rows` rows over one range of keys in bfloat16.

    Arguments as of `FewRows`, with a query in pairs `[head_dim / 2, num_lanes]`, and the factor of exponents, a vector
    in memory, behind them. Maxima are those of scores without a scale.
    """

    name = "dot_few"
    num_pointers = 7
    emit: DotEmitter

    def __init__(self, module: ir.Module, head_dim: int, rows: int, blocking: Blocking) -> None:
        super().__init__(module, head_dim, rows, blocking, torch.bfloat16)

    def make_emitter(self) -> Emitter:
        """See `FewRows`."""
        return DotEmitter(self.function)

    def columns(self) -> int:
        """Of turned keys: pairs of channels."""
        return self.head_dim // 2

    def turning_function(self, module: ir.Module) -> ir.Function:
        """See `FewRows`."""
        kind = ir.FunctionType(ir.VoidType(), [POINTER, INT64, INT64, POINTER])
        function = ir.Function(module, kind, name="turn_pairs")
        function.linkage = "internal"
        emit, lanes = DotEmitter(function), self.blocking.lanes
        builder, (keys, first, last, target) = emit.builder, function.args
        tokens = [emit.minimum(builder.add(first, emit.integer(key)), last) for key in range(lanes)]
        rows = [emit.at(keys, builder.mul(token, emit.integer(self.head_dim)), INT16) for token in tokens]
        with emit.loop(emit.integer(0), emit.integer(self.columns()), lanes) as block:
            turned = emit.transposed([emit.load_integers(emit.at(row, block.index, INT32)) for row in rows])
            for number, pairs in enumerate(turned):
                place = builder.mul(builder.add(block.index, emit.integer(number)), emit.integer(self.vectors * lanes))
                builder.store(pairs, emit.at(target, place, INT32), align=4)
        builder.ret_void()
        return function

    def _emit_start(self) -> None:
        """See `FewRows`; the query's pairs are copied."""
        emit, builder = self.emit, self.emit.builder
        with emit.loop(emit.integer(0), emit.integer(self.columns()), 1) as pair:
            source = emit.at(self.query, builder.mul(pair.index, self.num_lanes), INT32)
            for row in self.rows:
                both = builder.load(emit.at(source, row, INT32), typ=INT32, align=4)
                place = builder.add(pair.index, emit.integer(row * self.columns()))
                builder.store(both, emit.at(self.row_query, place, INT32), align=4)
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), emit.lanes) as channel:
            for row in self.rows:
                place = builder.add(channel.index, emit.integer(row * self.head_dim))
                emit.store(emit.constant(0.0), emit.at(self.sums, place))
        self.factor = emit.load(self.others[0])

    def _emit_products(self, first: int, ahead: Value) -> list[Value]:
        """See `FewRows`."""
        emit, builder, vectors = self.emit, self.emit.builder, range(self.vectors)
        nothing = [emit.constant(0.0)] * (len(self.rows) * len(vectors))
        stop, size = min(first + SUM_CHANNELS, self.head_dim), self.vectors * emit.lanes
        with emit.loop(emit.integer(first // 2), emit.integer(stop // 2), 1, nothing) as pair:
            keys = emit.at(self.turned, builder.mul(pair.index, emit.integer(size)), INT32)
            for part in range(0, 2 * size, self.line):
                index = builder.add(builder.mul(pair.index, emit.integer(2 * size)), emit.integer(part))
                emit.prefetch(emit.at(ahead, index, INT16))
            query = emit.at(self.row_query, pair.index, INT32)
            pair.following, _ = emit_outer(
                self._add,
                [partial(self._spread_pair, emit.at(query, row * self.columns(), INT32)) for row in self.rows],
                [partial(emit.load_integers, emit.at(keys, vector * emit.lanes, INT32)) for vector in vectors],
                pair.values,
            )
        return list(pair.following)

    def _weight(self, score: Value, largest: Value) -> Value:
        builder = self.emit.builder
        return self.emit.power_of_two(builder.fmul(builder.fsub(score, largest), self.factor), FEW_TERMS)

    def _emit_weighted(
        self, values: Value, count: Value, corrections: list[Value], denominators: Sequence[Value]
    ) -> list[Value]:
        """See `FewRows`. Weights are rounded first, to where scores of two keys were; behind an odd number of keys
        stands one that weighs nothing."""
        emit, builder = self.emit, self.emit.builder
        totals = [builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        with emit.when(builder.trunc(count, ir.IntType(1))):
            for row in self.rows:
                place = emit.at(self.scores, self._score_index(row, count))
                builder.store(ir.Constant(FLOAT, 0.0), place, align=4)
        with emit.loop(emit.integer(0), count, 1, totals) as key:
            weights = (emit.spread(emit.at(self.scores, self._score_index(row, key.index))) for row in self.rows)
            key.following = [builder.fadd(*pair) for pair in zip(key.values, weights, strict=True)]
        with emit.loop(emit.integer(0), count, DEPTH) as keys:
            for row in self.rows:
                place = emit.at(self.scores, self._score_index(row, keys.index))
                rounded = emit.narrowed_row(emit.load(place), emit.load(emit.at(place, emit.lanes)))
                half = builder.lshr(keys.index, emit.integer(1))
                builder.store(rounded, emit.at(self.scores, self._score_index(row, half), INT32), align=4)
        passes = self._passes()
        for number, chunks in enumerate(passes):
            self._emit_pairs(values, count, corrections, chunks, self._lines(number, len(passes)))
        return list(key.following)

    def _emit_pairs(
        self, values: Value, count: Value, corrections: list[Value], chunks: range, lines: list[int]
    ) -> None:
        """Weighted values of some channels, two keys at a time; at the channels `lines` the next tile is asked for."""
        emit, builder, one = self.emit, self.emit.builder, self.emit.integer(1)
        places = [self._chunk(self.sums, row, chunk) for row in self.rows for chunk in chunks]
        factors = [corrections[row] for row in self.rows for _ in chunks]
        start = [builder.fmul(emit.load(place), factor) for place, factor in zip(places, factors, strict=True)]
        with emit.loop(emit.integer(0), builder.lshr(builder.add(count, one), one), 1, start) as pair:
            even = builder.shl(pair.index, one)
            odd, bits = pair_of(emit, even, count)
            sources = [emit.at(values, builder.mul(key, emit.integer(self.head_dim)), INT16) for key in (even, odd)]
            for line in lines:
                for source in sources:
                    emit.prefetch(emit.at(source, self.blocking.tile * self.head_dim + line, INT16))
            weights = (emit.at(self.scores, self._score_index(row, pair.index), INT32) for row in self.rows)
            pair.following, _ = emit_outer(
                self._add,
                [partial(self._spread_pair, place) for place in weights],
                [partial(self._load_pair, sources, bits, chunk) for chunk in chunks],
                pair.values,
            )
        for place, total in zip(places, pair.following, strict=True):
            emit.store(total, place)

    def _load_pair(self, sources: Sequence[Value], bits: Value, chunk: int) -> Value:
        even, odd = (self.emit.at(source, chunk * self.emit.lanes, INT16) for source in sources)
        return load_paired(self.emit, even, odd, bits)

    def _spread_pair(self, place: Value) -> Value:
        return self.emit.spread_integer(self.emit.builder.load(place, typ=INT32, align=4))

    def _add(self, left: Value, right: Value, total: Value) -> Value:
        return self.emit.add_pairs(total, left, right)
