"""The inner loops of compiled segment attention: vectors of rows over one tile of keys, as LLVM code.

Scores stand transposed, `[key, row]`, and so do the weighted sums, `[head_dim, row]`: rows are the lanes of a vector,
so maxima, exponentials and corrections need no sum across lanes, and both products are one broadcast against a few
vectors of rows. Up to three vectors of rows by a block of keys (or of head_dim) stay in registers; accumulation is in
float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm  # type: ignore[import-untyped]
import torch
from llvmlite import ir

from cag_kernels.cpu.attention.segments import RANGE_TOKENS
from cag_kernels.cpu.attention.window import emit_hidden, emit_num_hidden, emit_reference
from cag_kernels.cpu.emit import ELEMENTS, INT32, INT64, POINTER, Emitter, Value

MAX_WIDTH = 3  # vectors of rows that one pass over the keys serves
CHANNELS = 4  # of a score in one turn of the loop
SUM_CHANNELS = 64  # of a score that are summed at once: one long sum would round each product against all before it


@dataclass(frozen=True)
class Blocking:
    """How the work is cut, from the processor's registers and caches.

    `lanes` float32 fill a vector; `block` keys are scored at once, more by a single vector of rows; `tile` keys share
    one softmax step, and lie widened in the nearest caches; `range_tokens` keys are one piece of parallel work: results
    depend on it, not on the number of threads.
    """

    lanes: int
    block: int
    tile: int = 64
    range_tokens: int = RANGE_TOKENS


@cache
def host_blocking() -> Blocking:
    """What suits this processor: 32 registers of 16 numbers with AVX-512, else 16 of 8 (or twice as many of 4)."""
    return Blocking(16, 8) if llvm.get_host_cpu_features().get("avx512f", False) else Blocking(8, 4)


def _block(width: int, blocking: Blocking) -> int:
    """Keys scored at once, and channels summed at once, with so many vectors of rows: where sums are few, additions to
    them would wait for each other."""
    return min(2 * blocking.block, blocking.lanes) if width == 1 else blocking.block


class WideTile:
    """A tile of keys and values in float32, on the stack of the function that serves a call's tasks: all panels of rows
    meet the same one.

    Keys lie as in the prefix, `[tile, head_dim]`; values by vectors of channels, `[head_dim / lanes, tile, lanes]`, as
    the keys of a tile are summed one behind the other.
    """

    def __init__(self, emit: Emitter, head_dim: int, blocking: Blocking, kept: torch.dtype) -> None:
        self.emit, self.head_dim, self.blocking, self.kept = emit, head_dim, blocking, kept
        self.keys, self.values = emit.scratch(blocking.tile * head_dim), emit.scratch(blocking.tile * head_dim)

    def emit_widened(self, keys: Value, values: Value, count: Value) -> None:
        """`count` keys and values from memory, of the type `kept`."""
        emit, builder, lanes, block = self.emit, self.emit.builder, self.blocking.lanes, _block(1, self.blocking)
        # leftovers on the stack that are denormal would slow down the last block, which may reach behind the last key
        num_blocks = emit.rounded_up(count, emit.integer(block))
        last = builder.mul(builder.sub(num_blocks, emit.integer(1)), emit.integer(block * self.head_dim))
        with emit.loop(emit.integer(0), emit.integer(block * self.head_dim), lanes) as element:
            emit.store(emit.constant(0.0), emit.at(self.keys, builder.add(last, element.index)))
        with emit.loop(emit.integer(0), count, 1) as key:
            row = builder.mul(key.index, emit.integer(self.head_dim))
            for channel in range(0, self.head_dim, lanes):
                place = builder.add(row, emit.integer(channel))
                emit.store(self._load(keys, place), emit.at(self.keys, place))
        for channel in range(0, self.head_dim, lanes):
            target = emit.at(self.values, channel * self.blocking.tile)
            with emit.loop(emit.integer(0), count, 1) as key:
                place = builder.add(builder.mul(key.index, emit.integer(self.head_dim)), emit.integer(channel))
                emit.store(self._load(values, place), emit.at(target, builder.mul(key.index, emit.integer(lanes))))

    def _load(self, source: Value, index: Value) -> Value:
        return self.emit.load_float(self.emit.at(source, index, ELEMENTS[self.kept]), self.kept)


class Panel:
    """Attention of `width` vectors of rows over one tile of keys, on top of the tiles before.

    Arguments: query `[head_dim, num_lanes]`, wide keys and values (`WideTile`), maxima and denominators `[num_lanes]`
    and weighted sums `[head_dim, num_lanes]` of the tiles before, which the tile's join, all at the panel's first row;
    where the next tile's keys and values lie, which are asked for; then the number of keys and num_lanes. With a
    window, the first keys of the rows and the key that the tile begins with are further arguments.
    """

    name = "panel"
    num_pointers = 8
    num_further = 0  # keys behind the tile that there is room for scores of

    def __init__(
        self,
        module: ir.Module,
        head_dim: int,
        width: int,
        blocking: Blocking,
        has_window: bool,
        kept: torch.dtype = torch.bfloat16,
    ) -> None:
        windows = [POINTER, INT64] if has_window else []
        kind = ir.FunctionType(ir.VoidType(), [POINTER] * self.num_pointers + [INT64] * 2 + windows)
        self.function = ir.Function(module, kind, name=f"{self.name}_{width}")
        self.function.linkage = "internal"
        self.head_dim = head_dim
        self.width = width
        self.blocking, self.element = blocking, ELEMENTS[kept]
        self.emit = self.make_emitter()
        self.block = _block(width, blocking)
        self.row_floats = width * blocking.lanes
        pointers, numbers = self.function.args[: self.num_pointers], self.function.args[self.num_pointers :]
        self.query, self.keys, self.values, self.maximum, self.denominator, self.weighted = pointers[:6]
        self.ahead, self.others = pointers[6:8], pointers[8:]
        self.num_keys, self.num_rows = numbers[:2]
        self.windows = numbers[2:]
        self.scores = self.emit.scratch((blocking.tile + self.num_further) * self.row_floats)
        self._emit_tile()

    def make_emitter(self) -> Emitter:
        """What the function's instructions are made with."""
        return Emitter(self.function, self.blocking.lanes)

    def _rows(self, pointer: Value) -> list[Value]:
        return [self.emit.load(self.emit.at(pointer, lane * self.blocking.lanes)) for lane in range(self.width)]

    def _store_rows(self, values: list[Value], pointer: Value) -> None:
        for lane, value in enumerate(values):
            self.emit.store(value, self.emit.at(pointer, lane * self.blocking.lanes))

    def _emit_tile(self) -> None:
        self._emit_scores()
        if self.windows:
            self._emit_hidden()
        maxima, denominators = self._rows(self.maximum), self._rows(self.denominator)
        larger, corrections, sums = self._emit_softmax(maxima, denominators)
        self._store_rows(larger, self.maximum)
        self._store_rows(sums, self.denominator)
        self._emit_weighted(corrections)
        self.emit.builder.ret_void()

    def _weighted_at(self, channel: Value) -> Value:
        return self.emit.at(self.weighted, self.emit.builder.mul(channel, self.num_rows))

    def _emit_scores(self) -> None:
        """Scores of the tile; the last block may score rows of scratch behind the last key, which nobody reads."""
        emit, block = self.emit, self.block
        with emit.loop(emit.integer(0), self.num_keys, block) as base:
            keys = emit.at(self.keys, emit.builder.mul(base.index, emit.integer(self.head_dim)))
            target = emit.at(self.scores, emit.builder.mul(base.index, emit.integer(self.row_floats)))
            for channel in range(0, self.head_dim, SUM_CHANNELS):
                sums = self._emit_products(keys, base.index, channel)
                for key in range(block):
                    found = sums[key * self.width : (key + 1) * self.width]
                    place = emit.at(target, key * self.row_floats)
                    if channel:
                        found = [emit.builder.fadd(*pair) for pair in zip(self._rows(place), found, strict=True)]
                    self._store_rows(found, place)

    def _emit_hidden(self) -> None:
        first_keys, token = self.windows
        places = [self.emit.at(first_keys, lane * self.blocking.lanes, INT32) for lane in range(self.width)]
        hidden = [emit_num_hidden(self.emit, place, token) for place in places]
        emit_hidden(self.emit, self.scores, hidden, self.num_keys)

    def _emit_products(self, keys: Value, first_key: Value, first: int) -> list[Value]:
        """Scores of one block of widened keys, in registers, by the channels from `first` on.

        The same keys and values of the next tile are asked for meanwhile, a line at a time: memory brings a few, and
        whoever asks for more of them waits.
        """
        emit, builder = self.emit, self.emit.builder
        sums = [emit.constant(0.0)] * (self.block * self.width)
        stop = min(first + SUM_CHANNELS, self.head_dim)
        with emit.loop(emit.integer(first), emit.integer(stop), CHANNELS, sums) as channel:
            sums = list(channel.values)
            # each turn asks for its part of `block` keys: by the end of the loop all of them
            begin = builder.mul(first_key, emit.integer(self.head_dim))
            asked = builder.add(begin, builder.mul(channel.index, emit.integer(self.block)))
            for side in self.ahead:
                emit.prefetch(emit.at(side, asked, self.element))
            for step in range(CHANNELS):
                place = builder.add(channel.index, emit.integer(step))
                rows = self._rows(emit.at(self.query, builder.mul(place, self.num_rows)))
                for key in range(self.block):
                    number = emit.spread(emit.at(emit.at(keys, channel.index), key * self.head_dim + step))
                    for lane, row in enumerate(rows):
                        index = key * self.width + lane
                        sums[index] = emit.multiply_add(row, number, sums[index])
            channel.following = sums
        return list(channel.following)

    def _emit_softmax(
        self, maxima: list[Value], denominators: list[Value]
    ) -> tuple[list[Value], list[Value], list[Value]]:
        """Turn the tile's scores into weights; new maxima, corrections of older sums and new denominators."""
        emit, width = self.emit, self.width
        elements = emit.builder.mul(self.num_keys, emit.integer(self.row_floats))
        with emit.loop(emit.integer(0), elements, self.row_floats, maxima) as key:
            rows = self._rows(emit.at(self.scores, key.index))
            key.following = [emit.larger(old, new) for new, old in zip(key.values, rows, strict=True)]
        larger = list(key.following)
        corrections = [self._exponential(emit.builder.fsub(old, new)) for old, new in zip(maxima, larger, strict=True)]
        sums = [emit.builder.fmul(*pair) for pair in zip(denominators, corrections, strict=True)]
        references = [emit_reference(emit, maximum) for maximum in larger] if self.windows else larger
        with emit.loop(emit.integer(0), elements, self.row_floats, sums) as key:
            place = emit.at(self.scores, key.index)
            shifted = [emit.builder.fsub(score, references[lane]) for lane, score in enumerate(self._rows(place))]
            weights = [self._exponential(value) for value in shifted]
            self._store_rows(weights, place)
            key.following = [emit.builder.fadd(key.values[lane], weights[lane]) for lane in range(width)]
        return larger, corrections, list(key.following)

    def _exponential(self, value: Value) -> Value:
        return self.emit.exponential(value)

    def _emit_weighted(self, corrections: list[Value]) -> None:
        """Add the tile's weighted values, a block of channels in registers at a time."""
        tile, lanes, block = self.blocking.tile, self.blocking.lanes, self.block
        with self.emit.loop(self.emit.integer(0), self.emit.integer(self.head_dim), lanes) as channels:
            source = self.emit.at(self.values, self.emit.builder.mul(channels.index, self.emit.integer(tile)))
            for shift in range(0, lanes, block):
                self._emit_channels(self.emit.at(source, shift), channels.index, shift, corrections)

    def _emit_channels(self, source: Value, channel: Value, shift: int, corrections: list[Value]) -> None:
        emit, width, block = self.emit, self.width, self.block
        places = [self._weighted_at(emit.builder.add(channel, emit.integer(shift + offset))) for offset in range(block)]
        sums = [
            emit.builder.fmul(value, corrections[lane])
            for place in places
            for lane, value in enumerate(self._rows(place))
        ]
        with emit.loop(emit.integer(0), self.num_keys, 1, sums) as key:
            weights = self._rows(emit.at(self.scores, emit.builder.mul(key.index, emit.integer(self.row_floats))))
            spreads = emit.at(source, emit.builder.mul(key.index, emit.integer(self.blocking.lanes)))
            key.following = [
                emit.multiply_add(weights[lane], number, key.values[offset * width + lane])
                for offset in range(block)
                for number in [emit.spread(emit.at(spreads, offset))]
                for lane in range(width)
            ]
        for offset, place in enumerate(places):
            self._store_rows(list(key.following[offset * width : (offset + 1) * width]), place)
