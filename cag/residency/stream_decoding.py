"""Sides of groups of layers, decoded on a device from the segments of its chunks: the codec `transform` there.

In: segments as the store verified and kept them. Out: keys or values, the bits that the store's own decoder gives, and
which segments did not end where they should. Knows no cache as a whole and no loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.residency.basis_tensors import BasisTensors
from cag.residency.segment_tensors import segment_tensors
from cag.residency.uploads import sent
from cag_kernels import CodeBlocks, RansSide, count_blocks, decode_segments, inverse_transform
from cag_store.codecs import StreamShape, StreamSide
from cag_store.codecs.streams import EXACT, EXACT_ROWS, WORDS
from cag_store.codecs.transform.rans import torn

if TYPE_CHECKING:
    from cag_store.codecs.transform import Rotation

Angles = tuple[Tensor, Tensor]
"""Cosines and sines float32 `[num_tokens, num_pairs]`."""


class ChunkStreams:
    """Chunks [first, last) of a side on the device, not decoded yet.

    Attributes:
        coded: their segments, each with one without tokens behind it.
        basis, means: of the side, and of each segment.
        starts: of the coded tokens of each segment among those of all, and their number.
        exact: tokens without codes.
        tokens, places: of these chunks, among those of the cache and among those that the side keeps.
    """

    def __init__(self, side: StreamSide, first: int, last: int, data: Tensor, begin: int, basis: BasisTensors) -> None:
        """`data`: on the device, what is in `side.data` from `begin` on."""
        bounds = side.bounds[first:last] - begin
        chunks, kept_from = side.shape.chunks[first:last], side.shape.chunks[0].start
        self.basis, self.tokens = basis, slice(chunks[0].start, chunks[-1].start + chunks[-1].num_tokens)
        self.places = slice(self.tokens.start - kept_from, self.tokens.stop - kept_from)
        exact = [_exact_tokens(side.data, parts) for parts in side.bounds[first:last]]
        num_coded = np.array([chunk.num_tokens - len(part) for chunk, part in zip(chunks, exact, strict=True)])
        self.starts = [0, *np.cumsum(num_coded).tolist()]
        streams, self.means = segment_tensors(data, bounds, num_coded, basis)
        self.coded = RansSide(streams, basis.slots, basis.tables, basis.low_bits, count_blocks(num_coded.tolist()))
        places = [part + (chunk.start - chunks[0].start) for chunk, part in zip(chunks, exact, strict=True)]
        self.exact = _ExactTokens(np.concatenate(places), self.tokens, data, bounds)


def decode_chunks(streams: Sequence[ChunkStreams]) -> list[DecodedChunks]:
    """Chunks of several sides, of any groups, in one launch."""
    found = decode_segments([side.coded for side in streams])
    return [DecodedChunks(side, codes, whole[::2]) for side, (codes, whole) in zip(streams, found, strict=True)]


class DecodedChunks:
    """Codes of some chunks of a side; `put` makes keys or values of them.

    Attributes:
        whole: bool `[num_chunks]` on the device: whether each segment ended where it should.
    """

    def __init__(self, streams: ChunkStreams, codes: CodeBlocks, whole: Tensor) -> None:
        self._basis, self._means, self._starts = streams.basis, streams.means, streams.starts
        self._exact, self._tokens, self._places = streams.exact, streams.tokens, streams.places
        self._codes, self.whole = codes, whole

    def put(self, run: LayerRun, out: Tensor, angles: Angles | None) -> None:
        """Some layers of the group into `out` `[num_kv_heads of all, num_tokens, head_dim]`, which has all tokens that
        the side keeps; `angles` have all of the cache, and there are none where nothing is turned."""
        out = out[:, self._places]
        turned = None if angles is None else self._exact.left_out(angles[0][self._tokens], angles[1][self._tokens])
        coded, basis, span = self._exact.room_beside(out), self._basis, run.channels
        parts = basis.rows[:, span], basis.scale[span], self._means[:, span]
        pairing = "halves" if run.rotation is None else run.rotation.pairing
        invert_layers(self._codes, self._starts, *parts, coded, turned, pairing)
        self._exact.put(coded, span, out)


class LayerRun(NamedTuple):
    """Neighbouring layers of a group that are alike but for their number of heads.

    num_kv_heads: one a layer. channels: of all of them, within those of the group.
    """

    num_kv_heads: tuple[int, ...]
    head_dim: int
    rotation: Rotation | None
    channels: slice


def layer_runs(shape: StreamShape) -> list[LayerRun]:
    """The layers of one side of a group."""
    runs: list[LayerRun] = []
    layers = zip(shape.static.shapes, shape.rotations, shape.static.spans, strict=True)
    for (head_dim, rotation), alike in groupby(layers, key=lambda layer: (layer[0][1], layer[1])):
        heads, _, spans = zip(*alike, strict=True)
        channels = slice(spans[0].start, spans[-1].stop)
        runs.append(LayerRun(tuple(count for count, _ in heads), head_dim, rotation, channels))
    return runs


def refuse_torn(bounds: NDArray[np.int64], whole: Tensor) -> None:
    """Raises: CorruptEntry, as the store's own decoder does, unless all segments with these bounds are whole."""
    for good, parts in zip(whole.tolist(), bounds, strict=True):
        if not good:
            raise torn(int(parts[WORDS + 1] - parts[WORDS]) // 2)


def invert_layers(
    codes: CodeBlocks,
    starts: Sequence[int],
    rows: Tensor,
    scale: Tensor,
    means: Tensor,
    out: Tensor,
    angles: Angles | None,
    pairing: str,
) -> None:
    """Codes of some tokens to `out` `[num_kv_heads, num_tokens, head_dim]`, heads of all layers.

    The tokens of segment `i` begin at `starts[i]` and have the mean `means[i]`.
    """
    counts = sent(np.diff(starts), out.device)
    numbers = torch.arange(len(counts), dtype=torch.int32, device=out.device)
    mean_of = numbers.repeat_interleave(counts, output_size=starts[-1])
    inverse_transform(
        codes,
        rows,
        scale,
        means,
        head_dim=out.shape[2],
        dtype=out.dtype,
        mean_of=mean_of,
        angles=angles,
        pairing=pairing,
        out=out,
    )


class _ExactTokens:
    """Tokens of some chunks that have no codes, and their channels of all layers."""

    def __init__(self, places: NDArray[np.int64], tokens: slice, data: Tensor, bounds: NDArray[np.int64]) -> None:
        """`places` within `tokens`, ascending."""
        self._places, count = sent(places, data.device), tokens.stop - tokens.start
        self._coded: slice | Tensor = slice(len(places), count)
        if len(places) and places[-1] >= len(places):  # not just the first tokens of a cache
            coded = torch.arange(count - len(places), device=data.device)
            before = self._places - torch.arange(len(places), device=data.device)  # coded ones before each exact one
            self._coded = coded + torch.searchsorted(before, coded, right=True)
        rows = [data[first:last] for first, last in bounds[:, EXACT_ROWS : EXACT_ROWS + 2].tolist() if first < last]
        self._rows = torch.cat(rows).view(len(places), -1) if rows else None

    def left_out(self, cosines: Tensor, sines: Tensor) -> Angles:
        """Angles of the other tokens."""
        return cosines[self._coded], sines[self._coded]

    def room_beside(self, out: Tensor) -> Tensor:
        """Where to put the other tokens, side by side: a part of `out` where they lie so there."""
        if isinstance(self._coded, slice):
            return out[:, self._coded]
        return out.new_empty(out.shape[0], len(self._coded), out.shape[2])

    def put(self, coded: Tensor, span: slice, out: Tensor) -> None:
        """All tokens to their places, if they are not there."""
        if not isinstance(self._coded, slice):
            out.index_copy_(1, self._coded, coded)
        if self._rows is not None:
            rows = self._rows.view(out.dtype)[:, span]
            out.index_copy_(1, self._places, rows.reshape(len(rows), out.shape[0], out.shape[2]).transpose(0, 1))


def _exact_tokens(data: NDArray[np.uint8], parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Places within its chunk of the tokens of a segment that have no codes."""
    return np.frombuffer(data[parts[EXACT] : parts[EXACT_ROWS]], "<u4").astype(np.int64)
