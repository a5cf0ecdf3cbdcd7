"""A `transform` cache on its way to a device that decodes it: its bytes in pinned memory of the host, and from there,
group by group of layers, over the bus and through the kernels.

The store verifies every byte and puts it here; a layer counts as there only when the decoder has said that all segments
of its group are whole. Knows kernels and shapes; knows no reader.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, cycle, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.residency.angles import angles_on
from cag.residency.basis_tensors import basis_tensors
from cag.residency.host_copies import HostCopy
from cag.residency.stream_decoding import (
    Angles,
    ChunkStreams,
    DecodedChunks,
    LayerRun,
    decode_chunks,
    layer_runs,
    refuse_torn,
)
from cag.residency.uploads import Uploads, pinned, pinned_bytes
from cag_kernels import DensePrefix
from cag_kernels.device import MAX_HEAD_DIM
from cag_store.codecs import StreamShape, StreamSide
from cag_store.codecs.streams import NUM_PARTS

if TYPE_CHECKING:
    from cag.forward.state import PrefixSegment
    from cag_store.codecs.transform import Rotation

GroupShapes = tuple[StreamShape, StreamShape]
"""Keys and values of a group of layers."""

MAX_CODES = 1 << 30
"""Of all sides that are decoded at once: 2 GiB."""
MAX_PIECES = 2
"""That are in work at the same time: one is read while the one before is multiplied."""

_MAX_SIDE_BYTES = 1 << 32  # kernels count pairs of bytes in 31 bits
_Check = tuple[NDArray[np.int64], Callable[[], Tensor]]  # bounds of segments, and what says whether they are whole


def can_decode(shapes: Sequence[GroupShapes]) -> bool:
    """Whether the kernels take heads and sizes of all groups."""
    sides = [side for both in shapes for side in both]
    heads = {head_dim for side in sides for _, head_dim in side.static.shapes}
    return all(side.slots[-1] < _MAX_SIDE_BYTES for side in sides) and all(
        head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM for head_dim in heads
    )


def stream_bytes(shapes: Sequence[GroupShapes], dtype: torch.dtype) -> int:
    """Bytes of the numbers that all groups are decoded to."""
    return sum(math.prod(size) for both in shapes for side in both for _, size in _sizes(side)) * dtype.itemsize


class StreamBuffers:
    """Where the store puts the segments of a prefix, and what the device makes of them.

    All memory of a piece is kept until the device is done with it, as several streams use it. Sides are counted: keys
    of the first group, its values, keys of the next group. Chunks are counted from the first one that any side keeps; a
    side that keeps fewer keeps the last ones.
    """

    def __init__(
        self,
        shapes: Sequence[GroupShapes],
        dtype: torch.dtype,
        device: torch.device,
        kept: tuple[Tensor, NDArray[np.int64]] | None = None,
    ) -> None:
        """`shapes` of all groups; `kept`: bytes and bounds that are there already."""
        self._shapes, self._device = [side for both in shapes for side in both], device
        self._again = partial(StreamBuffers, shapes, dtype, device)
        sizes, self._num_chunks = [side.slots[-1] for side in self._shapes], max(len(s.chunks) for s in self._shapes)
        self._skipped = [self._num_chunks - len(side.chunks) for side in self._shapes]
        last = self._shapes[0].chunks[-1]
        self._num_tokens = last.start + last.num_tokens  # of the cache
        self._starts = list(accumulate(sizes, initial=0))
        self._host, self._bounds = kept or (
            pinned(self._starts[-1]),
            np.zeros((len(sizes), self._num_chunks, NUM_PARTS + 1), np.int64),
        )
        self._room = [_room(side, dtype, device) for side in self._shapes]
        self._groups = {keys.static.layers.start: number for number, (keys, _) in enumerate(shapes)}
        self._batches = {batch.start: batch for batch in self._joined(all_there=kept is not None)}
        self._angles: dict[Rotation, Angles] = {}
        self._checks: list[list[_Check]] = [[] for _ in shapes]
        self._in_work: deque[tuple[Callable[[], None], list[DecodedChunks]]] = deque()
        self.uploads, self._lanes = Uploads(device, num_lanes=MAX_PIECES), cycle(range(MAX_PIECES))

    def host_copy(self) -> HostCopy:
        """What is in the host's memory, for another time: the cache as small as it is stored."""
        num_bytes = pinned_bytes(self._host) + self._bounds.nbytes
        return HostCopy(num_bytes, partial(self._again, kept=(self._host, self._bounds)))

    def views(self) -> list[tuple[StreamSide, StreamSide]]:
        """Writable arrays of all layers, as the store wants them."""
        pairs = [(self._side(2 * group), self._side(2 * group + 1)) for group in range(len(self._groups))]
        return [pair for pair in pairs for _ in pair[0].shape.static.layers]

    def layers(self) -> list[tuple[PrefixSegment, ...]]:
        """What to attend to when all has arrived."""
        sides = [_layers_of(side) for side in self._room]
        pairs = zip(sides[::2], sides[1::2], strict=True)
        return [(DensePrefix(*pair),) for keys, values in pairs for pair in zip(keys, values, strict=True)]

    def arrived(self, layer: int) -> None:
        """A layer's segments are there: start to decode its group. Layers may be used behind `confirm`."""
        batch = self._batches.get(self._groups.get(layer, -1))  # the layers of a group arrive together
        if batch is not None:
            self._decode(batch)

    def confirm(self, layer: int) -> None:
        """Wait until the device has read the segments of a layer that has arrived. Safe from any thread.

        Raises:
            CorruptEntry: one of them passed all checksums and is no stream, as the store's own decoder says it.
        """
        group = max(number for first, number in self._groups.items() if first <= layer)
        for bounds, whole in self._checks[group]:
            refuse_torn(bounds, whole())

    @torch.inference_mode()
    def _decode(self, groups: range) -> None:
        """Each piece is read in one launch, beside the products of the piece before."""
        sides = range(2 * groups.start, 2 * groups.stop)
        with self.uploads.stream():  # before anything else: the host waits for some of them
            turned = [[self._turned(run.rotation) for run, _ in self._room[side]] for side in sides]
        for first, last in self._pieces(groups):
            while len(self._in_work) >= MAX_PIECES:
                self._wait_for_a_piece()
            parts = self._read(sides, first, last)
            with self.uploads.stream():
                for side, part in parts.items():
                    for (run, out), angle in zip(self._room[side], turned[side - sides.start], strict=True):
                        part.put(run, out, angle)
                    if side % 2 and last == self._num_chunks:
                        for layer in self._shapes[side].static.layers:
                            self.uploads.mark(layer)
                self._in_work.append((self.uploads.done(), list(parts.values())))

    def _wait_for_a_piece(self) -> None:
        done, parts = self._in_work.popleft()
        done()
        del parts  # not sooner: the device has read them only now

    def _read(self, sides: range, first: int, last: int) -> dict[int, DecodedChunks]:
        """Send chunks [first, last) of the sides that keep some of them, and start to decode their codes, and to fetch
        what came of it."""
        kept = {side: max(first, self._skipped[side]) for side in sides if last > self._skipped[side]}
        with self.uploads.lane(next(self._lanes)):
            parts = decode_chunks([self._sent(side, begin, last) for side, begin in kept.items()])
            for (side, begin), part in zip(kept.items(), parts, strict=True):
                self._checks[side // 2].append((self._bounds[side, begin:last], self.uploads.fetch(part.whole)))
        return dict(zip(kept, parts, strict=True))

    def _sent(self, number: int, first: int, last: int) -> ChunkStreams:
        """Chunks [first, last) of a side on their way to the device."""
        side, skipped = self._side(number), self._skipped[number]
        first, last = first - skipped, last - skipped  # from here on among those that the side keeps
        basis = basis_tensors(side.shape.static, self._device)
        begin, end = side.shape.slots[first], side.shape.slots[last]
        place = self._starts[number]
        data = self._host[place + begin : place + end].to(self._device, non_blocking=True)
        return ChunkStreams(side, first, last, data, begin, basis)

    def _joined(self, all_there: bool) -> Iterator[range]:
        """Groups that are decoded together: those of which all is there, as long as they have few enough codes."""
        first = 0
        for group in range(1, len(self._groups)):
            if not all_there or self._num_codes(range(first, group + 1)) > MAX_CODES:
                yield range(first, group)
                first = group
        yield range(first, len(self._groups))

    def _pieces(self, groups: range) -> Iterator[tuple[int, int]]:
        """Equal spans of neighbouring chunks that have about MAX_CODES codes or fewer."""
        num_pieces = min(max(math.ceil(self._num_codes(groups) / MAX_CODES), 1), self._num_chunks)
        return pairwise(number * self._num_chunks // num_pieces for number in range(num_pieces + 1))

    def _num_codes(self, groups: range) -> int:
        """Of all tokens, also of those that have no codes or are not kept."""
        sides = self._shapes[2 * groups.start : 2 * groups.stop]
        return self._num_tokens * sum(side.static.num_components for side in sides)

    def _side(self, number: int) -> StreamSide:
        """A side in the host's memory."""
        data = self._host.numpy()[self._starts[number] : self._starts[number + 1]]
        return StreamSide(self._shapes[number], self._bounds[number, self._skipped[number] :], data)

    def _turned(self, rotation: Rotation | None) -> Angles | None:
        """Angles of all positions; None where nothing is turned."""
        if rotation is None or not rotation.inverse_frequencies:
            return None
        if rotation not in self._angles:
            self._angles[rotation] = angles_on(self._device, rotation, self._num_tokens)
        return self._angles[rotation]


def _room(side: StreamShape, dtype: torch.dtype, device: torch.device) -> list[tuple[LayerRun, Tensor]]:
    """Memory for each run of layers that are alike."""
    return [(run, torch.empty(size, dtype=dtype, device=device)) for run, size in _sizes(side)]


def _sizes(side: StreamShape) -> list[tuple[LayerRun, tuple[int, int, int]]]:
    """`[num_kv_heads of all, num_tokens, head_dim]` for each run of layers that are alike."""
    num_tokens = sum(chunk.num_tokens for chunk in side.chunks)
    return [(run, (sum(run.num_kv_heads), num_tokens, run.head_dim)) for run in layer_runs(side)]


def _layers_of(side: Sequence[tuple[LayerRun, Tensor]]) -> list[Tensor]:
    """Each layer's part."""
    return [layer for run, whole in side for layer in torch.split(whole, list(run.num_kv_heads))]
