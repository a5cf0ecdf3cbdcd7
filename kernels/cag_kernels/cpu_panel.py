"""The inner loops of compiled segment attention: vectors of rows over one range of keys, as LLVM code.

Scores stand transposed, `[key, row]`, and so do the weighted sums, `[head_dim, row]`: rows are the lanes of a vector,
so maxima, exponentials and corrections need no sum across lanes, and both products are one broadcast against a few
vectors of rows. Up to three vectors of rows by a block of keys (or of head_dim) stay in registers; accumulation is in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import llvmlite.binding as llvm  # type: ignore[import-untyped]
from llvmlite import ir

from cag_kernels.cpu_emit import INT16, INT32, INT64, POINTER, UNSEEN, Emitter, Value
from cag_kernels.cpu_window import emit_hidden, emit_num_hidden, emit_reference

MAX_WIDTH = 3  # vectors of rows that one pass over the keys serves
SUM_CHANNELS = 64  # of a score that are summed at once: one long sum would round each product against all before it


@dataclass(frozen=True)
class Blocking:
    """How the work is cut, from the processor's registers and caches.

    `lanes` float32 fill a vector; `block` keys are scored at once; `tile` keys share one softmax step and fit the first
    cache; `range_tokens` keys are one piece of parallel work: results depend on it, not on the number of threads.
    """

    lanes: int
    block: int
    tile: int = 64
    range_tokens: int = 512


def host_blocking() -> Blocking:
    """What suits this processor: 32 registers of 16 numbers with AVX-512, else 16 of 8 (or twice as many of 4)."""
    return Blocking(16, 8) if llvm.get_host_cpu_features().get("avx512f", False) else Blocking(8, 4)


class Panel:
    """Attention of `width` vectors of rows over one range of keys; with a window, the first keys of the rows and the
    key that the range begins with are further arguments."""

    def __init__(self, module: ir.Module, head_dim: int, width: int, blocking: Blocking, has_window: bool) -> None:
        windows = [POINTER, INT64] if has_window else []
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * 6 + [INT64] * 2 + windows)
        self.function = ir.Function(module, kind, name=f"panel_{width}")
        self.function.linkage = "internal"
        self.emit = Emitter(self.function, blocking.lanes)
        self.head_dim = head_dim
        self.width = width
        self.blocking = blocking
        self.row_floats = width * blocking.lanes
        arguments = self.function.args
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = arguments[:6]
        self.num_keys, self.num_rows = arguments[6:8]
        self.windows = arguments[8:]
        self.scores = self.emit.scratch(blocking.tile * self.row_floats)
        self.wide_keys = self.emit.scratch(blocking.block * head_dim)
        self.wide_values = self.emit.scratch(blocking.tile * blocking.lanes)
        self._emit_range()

    def _rows(self, pointer: Value) -> list[Value]:
        return [self.emit.load(self.emit.at(pointer, lane * self.blocking.lanes)) for lane in range(self.width)]

    def _store_rows(self, values: list[Value], pointer: Value) -> None:
        for lane, value in enumerate(values):
            self.emit.store(value, self.emit.at(pointer, lane * self.blocking.lanes))

    def _emit_range(self) -> None:
        emit, zero = self.emit, self.emit.integer(0)
        nothing = [emit.constant(0.0)] * self.width
        with emit.loop(zero, emit.integer(self.head_dim), 1) as channel:
            self._store_rows(nothing, self._weighted_at(channel.index))
        # denormal leftovers on the stack would slow down the block behind the last key
        with emit.loop(zero, emit.integer(self.blocking.block * self.head_dim), emit.lanes) as element:
            emit.store(emit.constant(0.0), emit.at(self.wide_keys, element.index))
        start = [emit.constant(UNSEEN)] * self.width + nothing
        with emit.loop(zero, self.num_keys, self.blocking.tile, start) as tile:
            count = emit.minimum(emit.builder.sub(self.num_keys, tile.index), emit.integer(self.blocking.tile))
            first = emit.builder.mul(tile.index, emit.integer(self.head_dim))
            self._emit_scores(emit.at(self.keys, first, INT16), count)
            if self.windows:
                self._emit_hidden(tile.index, count)
            maxima, denominators = tile.values[: self.width], tile.values[self.width :]
            larger, corrections, sums = self._emit_softmax(count, maxima, denominators)
            self._emit_weighted(emit.at(self.values, first, INT16), count, corrections)
            tile.following = larger + sums
        self._store_rows(list(tile.following[: self.width]), self.maximum)
        self._store_rows(list(tile.following[self.width :]), self.denominator)
        emit.builder.ret_void()

    def _weighted_at(self, channel: Value) -> Value:
        return self.emit.at(self.weighted, self.emit.builder.mul(channel, self.num_rows))

    def _emit_scores(self, keys: Value, count: Value) -> None:
        """Scores of a tile; the last block may score rows of scratch behind the last key, which nobody reads."""
        emit, block = self.emit, self.blocking.block
        with emit.loop(emit.integer(0), count, block) as base:
            present = emit.minimum(emit.builder.sub(count, base.index), emit.integer(block))
            elements = emit.builder.mul(present, emit.integer(self.head_dim))
            source = emit.at(keys, emit.builder.mul(base.index, emit.integer(self.head_dim)), INT16)
            with emit.loop(emit.integer(0), elements, self.blocking.lanes) as element:
                wide = self._load_and_prefetch(emit.at(source, element.index, INT16))
                emit.store(wide, emit.at(self.wide_keys, element.index))
            target = emit.at(self.scores, emit.builder.mul(base.index, emit.integer(self.row_floats)))
            for channel in range(0, self.head_dim, SUM_CHANNELS):
                sums = self._emit_products(block, channel)
                for key in range(block):
                    found, place = (
                        sums[key * self.width : (key + 1) * self.width],
                        emit.at(target, key * self.row_floats),
                    )
                    if channel:
                        found = [emit.builder.fadd(*pair) for pair in zip(self._rows(place), found, strict=True)]
                    self._store_rows(found, place)

    def _emit_hidden(self, tile: Value, count: Value) -> None:
        first_keys, begin = self.windows
        token = self.emit.builder.add(begin, tile)
        places = [self.emit.at(first_keys, lane * self.blocking.lanes, INT32) for lane in range(self.width)]
        emit_hidden(self.emit, self.scores, [emit_num_hidden(self.emit, place, token) for place in places], count)

    def _load_and_prefetch(self, place: Value) -> Value:
        self.emit.prefetch(self.emit.at(place, self.blocking.tile * self.head_dim, INT16))
        return self.emit.load_bfloat16(place)

    def _emit_products(self, block: int, first: int) -> list[Value]:
        """Scores of one block of widened keys, in registers, by the channels from `first` on."""
        emit = self.emit
        zeros = [emit.constant(0.0)] * (block * self.width)
        stop = min(first + SUM_CHANNELS, self.head_dim)
        with emit.loop(emit.integer(first), emit.integer(stop), 1, zeros) as channel:
            rows = self._rows(emit.at(self.query, emit.builder.mul(channel.index, self.num_rows)))
            spreads = self.emit.at(self.wide_keys, channel.index)
            channel.following = [
                emit.multiply_add(rows[lane], number, channel.values[key * self.width + lane])
                for key in range(block)
                for number in [emit.spread(emit.at(spreads, key * self.head_dim))]
                for lane in range(self.width)
            ]
        return list(channel.following)

    def _emit_softmax(
        self, count: Value, maxima: list[Value], denominators: list[Value]
    ) -> tuple[list[Value], list[Value], list[Value]]:
        """Turn the tile's scores into weights; new maxima, corrections of older sums and new denominators."""
        emit, width = self.emit, self.width
        elements = emit.builder.mul(count, emit.integer(self.row_floats))
        with emit.loop(emit.integer(0), elements, self.row_floats, maxima) as key:
            rows = self._rows(emit.at(self.scores, key.index))
            key.following = [emit.larger(old, new) for new, old in zip(key.values, rows, strict=True)]
        larger = list(key.following)
        corrections = [emit.exponential(emit.builder.fsub(old, new)) for old, new in zip(maxima, larger, strict=True)]
        sums = [emit.builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        references = [emit_reference(emit, maximum) for maximum in larger] if self.windows else larger
        with emit.loop(emit.integer(0), elements, self.row_floats, sums) as key:
            place = emit.at(self.scores, key.index)
            shifted = [emit.builder.fsub(score, references[lane]) for lane, score in enumerate(self._rows(place))]
            weights = [emit.exponential(value) for value in shifted]
            self._store_rows(weights, place)
            key.following = [emit.builder.fadd(key.values[lane], weights[lane]) for lane in range(width)]
        return larger, corrections, list(key.following)

    def _emit_weighted(self, values: Value, count: Value, corrections: list[Value]) -> None:
        """Add the tile's weighted values, a block of channels in registers at a time."""
        emit, lanes = self.emit, self.blocking.lanes
        with emit.loop(emit.integer(0), emit.integer(self.head_dim), lanes) as channels:
            source = emit.at(values, channels.index, INT16)
            with emit.loop(emit.integer(0), count, 1) as key:
                row = emit.at(source, emit.builder.mul(key.index, emit.integer(self.head_dim)), INT16)
                place = emit.at(self.wide_values, emit.builder.mul(key.index, emit.integer(lanes)))
                emit.store(self._load_and_prefetch(row), place)
            for shift in range(0, lanes, self.blocking.block):
                self._emit_channels(channels.index, shift, count, corrections)

    def _emit_channels(self, channel: Value, shift: int, count: Value, corrections: list[Value]) -> None:
        emit, width, block = self.emit, self.width, self.blocking.block
        places = [self._weighted_at(emit.builder.add(channel, emit.integer(shift + offset))) for offset in range(block)]
        sums = [
            emit.builder.fmul(value, corrections[lane])
            for place in places
            for lane, value in enumerate(self._rows(place))
        ]
        with emit.loop(emit.integer(0), count, 1, sums) as key:
            weights = self._rows(emit.at(self.scores, emit.builder.mul(key.index, emit.integer(self.row_floats))))
            spreads = emit.at(self.wide_values, emit.builder.mul(key.index, emit.integer(self.blocking.lanes)))
            key.following = [
                emit.multiply_add(weights[lane], number, key.values[offset * width + lane])
                for offset in range(block)
                for number in [emit.spread(emit.at(spreads, shift + offset))]
                for lane in range(width)
            ]
        for offset, place in enumerate(places):
            self._store_rows(list(key.following[offset * width : (offset + 1) * width]), place)
