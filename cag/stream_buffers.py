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
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.angles import angles_on
from cag.basis_tensors import basis_tensors
from cag.host_copies import HostCopy
from cag.stream_decoding import Angles, DecodedChunks, LayerRun, layer_runs, refuse_torn
from cag.uploads import Uploads, pinned
from cag_kernels import DensePrefix
from cag_kernels.device import MAX_HEAD_DIM
from cag_store.codecs import StreamShape, StreamSide
from cag_store.codecs.streams import NUM_PARTS

if TYPE_CHECKING:
    from cag.state import PrefixSegment
    from cag_store.codecs.transform import Rotation

GroupShapes = tuple[StreamShape, StreamShape]
"""Keys and values of a group of layers."""

MAX_CODES = 1 << 29
"""Of a side that are decoded at once: 1 GiB."""
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


class StreamBuffers:
    """Where the store puts the segments of a prefix, and what the device makes of them.

    All memory of a piece is kept until the device is done with it, as several streams use it.
    """

    def __init__(
        self,
        shapes: Sequence[GroupShapes],
        dtype: torch.dtype,
        device: torch.device,
        kept: tuple[Tensor, NDArray[np.int64]] | None = None,
    ) -> None:
        """`shapes` of all groups; `kept`: bytes and bounds that are there already."""
        self._shapes, self._device = shapes, device
        self._again = partial(StreamBuffers, shapes, dtype, device)
        self._num_tokens = sum(chunk.num_tokens for chunk in shapes[0][0].chunks)
        sizes = [side.slots[-1] for both in shapes for side in both]
        self._starts = list(accumulate(sizes, initial=0))
        num_chunks = len(shapes[0][0].chunks)
        self._host, self._bounds = kept or (
            pinned(self._starts[-1]),
            np.zeros((len(sizes), num_chunks, NUM_PARTS + 1), np.int64),
        )
        self._room = [[_room(side, self._num_tokens, dtype, device) for side in both] for both in shapes]
        self._groups = {keys.static.layers.start: number for number, (keys, _) in enumerate(shapes)}
        self._angles: dict[Rotation, Angles] = {}
        self._checks: list[list[_Check]] = [[] for _ in shapes]
        self._in_work: deque[tuple[Callable[[], None], list[DecodedChunks]]] = deque()
        self.uploads = Uploads(device, num_lanes=2)

    def host_copy(self) -> HostCopy:
        """What is in the host's memory, for another time: the cache as small as it is stored."""
        num_bytes = self._host.nbytes + self._bounds.nbytes
        return HostCopy(num_bytes, partial(self._again, kept=(self._host, self._bounds)))

    def views(self) -> list[tuple[StreamSide, StreamSide]]:
        """Writable arrays of all layers, as the store wants them."""
        return [self._sides(group) for group, (keys, _) in enumerate(self._shapes) for _ in keys.static.layers]

    def layers(self) -> list[tuple[PrefixSegment, ...]]:
        """What to attend to when all has arrived."""
        sides = [[_layers_of(side) for side in both] for both in self._room]
        return [(DensePrefix(*pair),) for keys, values in sides for pair in zip(keys, values, strict=True)]

    def arrived(self, layer: int) -> None:
        """A layer's segments are there: start to decode its group. Layers may be used behind `confirm`."""
        if layer in self._groups:  # the layers of a group arrive together
            self._decode(self._groups[layer])

    def confirm(self, layer: int) -> None:
        """Wait until the device has read the segments of a layer that has arrived. Safe from any thread.

        Raises:
            CorruptEntry: one of them passed all checksums and is no stream, as the store's own decoder says it.
        """
        group = max(number for first, number in self._groups.items() if first <= layer)
        for bounds, whole in self._checks[group]:
            refuse_torn(bounds, whole())

    @torch.inference_mode()
    def _decode(self, group: int) -> None:
        """Keys and values are read beside each other, and beside the products of the piece before."""
        sides, pieces = self._sides(group), list(self._pieces(group))
        with self.uploads.stream():  # before anything else: the host waits for some of them
            turned = [[self._turned(run.rotation) for run, _ in room] for room in self._room[group]]
        for first, last in pieces:
            while len(self._in_work) >= MAX_PIECES:
                self._in_work.popleft()[0]()
            parts = [
                self._read(lane, side, self._starts[2 * group + lane], first, last) for lane, side in enumerate(sides)
            ]
            self._checks[group] += [
                (side.bounds[first:last], whole) for side, (_, whole) in zip(sides, parts, strict=True)
            ]
            with self.uploads.stream():
                for (part, _), room, angles in zip(parts, self._room[group], turned, strict=True):
                    for (run, out), angle in zip(room, angles, strict=True):
                        part.put(run, out, angle)
                self._in_work.append((self.uploads.done(), [part for part, _ in parts]))
        with self.uploads.stream():
            for layer in sides[0].shape.static.layers:
                self.uploads.mark(layer)

    def _read(
        self, lane: int, side: StreamSide, place: int, first: int, last: int
    ) -> tuple[DecodedChunks, Callable[[], Tensor]]:
        """Send chunks [first, last) of a side, whose bytes begin at `place`, and start to decode their codes."""
        with self.uploads.lane(lane):
            basis = basis_tensors(side.shape.static, self._device)
            begin, end = side.shape.slots[first], side.shape.slots[last]
            data = self._host[place + begin : place + end].to(self._device, non_blocking=True)
            part = DecodedChunks(side, first, last, data, begin, basis)
            return part, self.uploads.fetch(part.whole)

    def _pieces(self, group: int) -> Iterator[tuple[int, int]]:
        """Equal spans of neighbouring chunks whose codes, of a side, are about MAX_CODES or fewer."""
        width, num_chunks = max(side.static.num_components for side in self._shapes[group]), len(self._bounds[0])
        num_pieces = min(max(math.ceil(self._num_tokens * width / MAX_CODES), 1), num_chunks)
        return pairwise(number * num_chunks // num_pieces for number in range(num_pieces + 1))

    def _sides(self, group: int) -> tuple[StreamSide, StreamSide]:
        """Keys and values of a group in the host's memory."""
        memory = self._host.numpy()
        keys, values = (
            StreamSide(shape, self._bounds[place], memory[self._starts[place] : self._starts[place + 1]])
            for place, shape in enumerate(self._shapes[group], start=2 * group)
        )
        return keys, values

    def _turned(self, rotation: Rotation | None) -> Angles | None:
        """Angles of all positions; None where nothing is turned."""
        if rotation is None or not rotation.inverse_frequencies:
            return None
        if rotation not in self._angles:
            self._angles[rotation] = angles_on(self._device, rotation, self._num_tokens)
        return self._angles[rotation]


def _room(
    side: StreamShape, num_tokens: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[LayerRun, Tensor]]:
    """`[num_kv_heads of all, num_tokens, head_dim]` for each run of layers that are alike."""
    runs = layer_runs(side)
    sizes = [(sum(run.num_kv_heads), num_tokens, run.head_dim) for run in runs]
    return [(run, torch.empty(size, dtype=dtype, device=device)) for run, size in zip(runs, sizes, strict=True)]


def _layers_of(side: Sequence[tuple[LayerRun, Tensor]]) -> list[Tensor]:
    """Each layer's part."""
    return [layer for run, whole in side for layer in torch.split(whole, list(run.num_kv_heads))]
