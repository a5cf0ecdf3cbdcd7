"""Bytes of a job into the buffers of a load: verified, and decoded or kept as they are.

Knows no threads and no backend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cag_store.chunk_files import OpenChunk, check_segment, side_of
from cag_store.codecs import BulkDecoder, CodedSide, EncodedSegment, RawSegments, StreamSide
from cag_store.dtypes import Array
from cag_store.load_jobs import Job
from cag_store.quick_jobs import address_of

Buffers = Sequence[tuple[Array, ...]] | Sequence[tuple[CodedSide, CodedSide]] | Sequence[tuple[StreamSide, StreamSide]]


class JobDecoder:
    """Decodes jobs of one load, several at the same time.

    Attributes:
        bulk: the codec's compiled step for whole jobs; None until `prepare`, and where it has none.
    """

    def __init__(self, like: OpenChunk, buffers: Buffers, first_tokens: Sequence[int]) -> None:
        """`like`: a chunk, for what all have in common. first_tokens: of the tokens in each layer's buffers."""
        self._codec, self._header, self._groups = like.codec, like.index.header, like.index.header.groups
        self._buffers, self._first_tokens = buffers, first_tokens
        self.bulk: BulkDecoder | None = None

    def prepare(self) -> None:
        """Make `bulk`, which may take a while."""
        self.bulk = self._codec.bulk_decoder(self._buffers, self._first_tokens)

    def decode(self, job: Job, data: memoryview) -> None:
        """Verify and decode all segments of a job. Raises: CorruptEntry."""
        self.decode_singly(job, data, self._left_by_bulk(job, data))

    def decode_singly(self, job: Job, data: memoryview, positions: Sequence[int]) -> None:
        """Verify and decode these segments of a job. Raises: CorruptEntry."""
        if not positions:
            return
        chunk, entry = job.chunk, job.chunk.entry
        segments = []
        for position in positions:
            begin, end = (chunk.offsets[at] - chunk.offsets[job.segments[0]] for at in (position, position + 1))
            check_segment(data[begin:end], chunk, position)
            segments.append(self._segment(chunk, data[begin:end], position))
        if isinstance(segments[0].outs[0], CodedSide):
            chunk.codec.keep_codes(segments, entry.num_tokens)
        elif isinstance(segments[0].outs[0], StreamSide):
            chunk.codec.keep_streams(segments, entry.num_tokens)
        else:
            chunk.codec.decode_segments(segments)

    def _segment(self, chunk: OpenChunk, data: memoryview, position: int) -> EncodedSegment:
        first, last = self._groups[position // self._header.sides]
        start, kept_from = chunk.entry.start, self._first_tokens[first]
        span = slice(start - kept_from, start - kept_from + chunk.entry.num_tokens)
        sides = [buffers[position % self._header.sides] for buffers in self._buffers[first:last]]
        outs = tuple(side[:, span] if isinstance(side, np.ndarray) else side for side in sides)
        return EncodedSegment(data, outs, side_of(position, self._header), first, start, kept_from)

    def _left_by_bulk(self, job: Job, data: memoryview) -> Sequence[int]:
        """Verify and decode what one compiled step can of a job; the positions of the other segments."""
        (first, last), chunk = job.segments, job.chunk
        hashes = None if self.bulk is None else chunk.hashes(first, last)
        if self.bulk is None or hashes is None:
            return range(first, last)
        bounds = np.array(chunk.offsets[first : last + 1], np.int64)
        address = address_of(data) - chunk.offsets[first]
        pieces = np.stack([bounds[:-1] + address, np.diff(bounds)], axis=1)
        done = self.bulk(RawSegments(first, pieces, hashes, chunk.entry.start, chunk.entry.num_tokens))
        return [first + int(index) for index in np.flatnonzero(~done)]
