"""Layer by layer from a backend into buffers: some threads read, others verify and decode, the caller waits in order.

    readers:   free memory -> next job -> read it -> hand it on, and take the next one at once
    decoders:  verify and decode its segments into the chunk's slice of the buffers -> the memory is free again
    jobs:      first layers of chunk 0, 1, ..., next layers of chunk 0, 1, ...
    caller:    wait for layer 0, on_layer(0), wait for layer 1, ...

Reads end in bunches, while all cores decode: who has read asks for more before anything else is done, as a thread that
decodes first, or that has to wake up another one, leaves the disk without work. Decoding a job is one compiled call for
all segments that the codec knows such a step for; what that leaves is verified and decoded one by one. There are as
many decoders as workers, and one reader more, or as many as the backend is good for.
Memory beyond the buffers: one encoded job a thread and one more, which the next load uses again, and the scratch of the
codecs.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, pairwise
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np

from cag_store.backends import SCRATCH_BYTES, ReadableBackend
from cag_store.chunk_files import OpenChunk, check_segment, side_of
from cag_store.codecs import BulkDecoder, CodedSide, EncodedSegment, RawSegments, StreamSide
from cag_store.dtypes import Array
from cag_store.errors import CorruptEntry
from cag_store.scratch import Scratch

Buffers = (
    Sequence[tuple[Array, Array]] | Sequence[tuple[CodedSide, CodedSide]] | Sequence[tuple[StreamSide, StreamSide]]
)

JOB_BYTES = 2 << 20  # encoded layers of a chunk read at once; with less, threads wait more for each other
SPARE_READERS = 1  # more than workers
_scratch = Scratch(keep=8)  # jobs of one load on few cores


@dataclass
class LoadTimings:
    """Where the time of `load` went. Reading (`read_s`), and verifying and decoding, which are one step (`decode_s`),
    are summed over threads and overlap; `wall_s` is the clock. `bytes_by_tier` says how many of the bytes came from
    where."""

    bytes_read: int = 0
    read_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0
    bytes_by_tier: dict[str, int] = field(default_factory=dict)

    def add(self, other: LoadTimings) -> None:
        """Add what `other` holds, but for the clock."""
        self.bytes_read += other.bytes_read
        self.read_s += other.read_s
        self.decode_s += other.decode_s
        for tier, num_bytes in other.bytes_by_tier.items():
            self.bytes_by_tier[tier] = self.bytes_by_tier.get(tier, 0) + num_bytes


@dataclass(frozen=True, eq=False)
class Job:
    """Keys and values of the groups of layers [first, last) of one chunk: neighbours in its file."""

    chunk: OpenChunk
    first: int
    last: int

    @property
    def num_bytes(self) -> int:
        """Encoded bytes."""
        return self.chunk.offsets[2 * self.last] - self.chunk.offsets[2 * self.first]


class _ReadJob(NamedTuple):
    """A job whose bytes are `data`, a part of `memory`."""

    job: Job
    memory: memoryview
    data: memoryview
    taken: LoadTimings


class Pipeline:
    """One pass over all layers of `chunks`."""

    def __init__(
        self,
        backend: ReadableBackend,
        chunks: Sequence[OpenChunk],
        buffers: Buffers,
        workers: int,
        timings: LoadTimings,
        first_layer_soon: bool = True,
    ) -> None:
        """With `first_layer_soon` layer 0 has jobs of its own, which costs small reads."""
        self._backend = backend
        self._buffers = buffers
        self._timings = timings
        self._missing = [len(chunks)] * len(buffers)
        self._groups = chunks[0].index.header.groups
        self._codec = chunks[0].codec
        self._bulk: BulkDecoder | None = None
        self._prepared = threading.Event()  # `_bulk` is made while the first jobs are read
        job_bytes = max(JOB_BYTES, backend.read_bytes)
        spans = list(_group_spans(chunks, len(self._groups), job_bytes, first_layer_soon))
        self._jobs = [Job(chunk, first, last) for first, last in spans for chunk in chunks]
        self._next_job = count()
        self._num_readers = min(max(workers + SPARE_READERS, backend.parallel_reads), len(self._jobs))
        self._num_decoders = min(workers, len(self._jobs))
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()  # None: no more
        self._read: SimpleQueue[_ReadJob | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False

    def run(self, on_layer: Callable[[int], None] | None) -> None:
        """Fill the buffers; `on_layer(i)` as soon as layer i is whole.
        Raises what reading, verifying or decoding raised."""
        started = time.perf_counter()
        works = [self._read_jobs] * self._num_readers + [self._decode_jobs] * self._num_decoders
        threads = [
            threading.Thread(target=work, name=f"cag-load-{index}", daemon=True) for index, work in enumerate(works)
        ]
        num_bytes = SCRATCH_BYTES + max(job.num_bytes for job in self._jobs)
        with ExitStack() as stack:
            for _ in range(len(threads) + 1):
                self._free.put(stack.enter_context(_scratch.taken(num_bytes)))
            try:
                for thread in threads:
                    thread.start()
                self._bulk = self._codec.bulk_decoder(self._buffers)
                self._prepared.set()
                for layer in range(len(self._buffers)):
                    self._wait_for(layer)
                    if on_layer is not None:
                        on_layer(layer)
            finally:
                self._stop(None)
                for thread in threads:
                    if thread.ident is not None:  # started: before it ends, the memory is not free
                        thread.join()
        self._timings.wall_s += time.perf_counter() - started

    def _wait_for(self, layer: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._missing[layer])
            if self._error is not None:
                raise self._error

    def _stop(self, error: BaseException | None) -> None:
        """Let all threads end, and the caller know why."""
        with self._changed:
            self._stopped = True
            self._error = self._error or error
            self._changed.notify_all()
        self._prepared.set()
        for _ in range(self._num_readers):
            self._free.put(None)
        for _ in range(self._num_decoders):
            self._read.put(None)

    def _read_jobs(self) -> None:
        """A thread: read job after job until none is left."""
        try:
            while (memory := self._free.get()) is not None and not self._stopped:
                index = next(self._next_job)
                if index >= len(self._jobs):
                    return
                job, taken = self._jobs[index], LoadTimings()
                try:
                    data = self._bytes_of(job, memory, taken)
                except CorruptEntry:
                    if not self._forgotten(job, taken):
                        raise
                    data = self._bytes_of(job, memory, taken)
                self._read.put(_ReadJob(job, memory, data, taken))
        except BaseException as error:
            self._stop(error)

    def _decode_jobs(self) -> None:
        """A thread: verify and decode what was read."""
        try:
            while (read := self._read.get()) is not None and not self._stopped:
                job, memory, data, taken = read
                try:
                    self._decode(job, data, taken)
                except CorruptEntry:
                    if not self._forgotten(job, taken):
                        raise
                    self._decode(job, self._bytes_of(job, memory, taken), taken)
                self._free.put(memory)
                self._finish(job, taken)
        except BaseException as error:
            self._stop(error)

    def _forgotten(self, job: Job, taken: LoadTimings) -> bool:
        """Whether bytes that proved wrong may be those of a copy kept nearby; it is dropped, and they can be read once
        more from the backend itself."""
        return self._backend.forget(job.chunk.path) or bool(taken.bytes_by_tier.keys() - {self._backend.tier})

    def _finish(self, job: Job, taken: LoadTimings) -> None:
        """A job is decoded."""
        with self._changed:
            self._timings.add(taken)
            first, last = self._groups[job.first][0], self._groups[job.last - 1][1]
            for layer in range(first, last):
                self._missing[layer] -= 1
            if not self._missing[first]:  # the layers of a job become whole together
                self._changed.notify_all()

    def _bytes_of(self, job: Job, memory: memoryview, taken: LoadTimings) -> memoryview:
        """Read a job into a part of `memory`; adds to `taken` where the bytes came from, and the time. Raises:
        CorruptEntry."""
        started = time.perf_counter()
        offset = job.chunk.offsets[2 * job.first]
        data, tier = self._backend.read_range(job.chunk.path, offset, job.num_bytes, memory)
        taken.bytes_read += job.num_bytes
        taken.bytes_by_tier[tier] = taken.bytes_by_tier.get(tier, 0) + job.num_bytes
        taken.read_s += time.perf_counter() - started
        return data

    def _decode(self, job: Job, data: memoryview, taken: LoadTimings) -> None:
        """Verify and decode a job; adds the time to `taken`. Raises: CorruptEntry."""
        self._prepared.wait()
        started = time.perf_counter()
        left = self._left_by_bulk(job, data)
        if left:
            self._decode_singly(job, data, left)
        taken.decode_s += time.perf_counter() - started

    def _left_by_bulk(self, job: Job, data: memoryview) -> Sequence[int]:
        """Verify and decode what one compiled step can of a job; the positions of the other segments."""
        first, last, chunk = 2 * job.first, 2 * job.last, job.chunk
        hashes = None if self._bulk is None else chunk.hashes(first, last)
        if self._bulk is None or hashes is None:
            return range(first, last)
        bounds = np.array(chunk.offsets[first : last + 1], np.int64)
        address = np.frombuffer(data, np.uint8).ctypes.data - chunk.offsets[first]
        pieces = np.stack([bounds[:-1] + address, np.diff(bounds)], axis=1)
        done = self._bulk(RawSegments(first, pieces, hashes, chunk.entry.start, chunk.entry.num_tokens))
        return [first + int(index) for index in np.flatnonzero(~done)]

    def _decode_singly(self, job: Job, data: memoryview, positions: Sequence[int]) -> None:
        """Verify and decode these segments of a job. Raises: CorruptEntry."""
        chunk, entry = job.chunk, job.chunk.entry
        segments = []
        for position in positions:
            begin, end = (chunk.offsets[at] - chunk.offsets[2 * job.first] for at in (position, position + 1))
            check_segment(data[begin:end], chunk, position)
            first, last = self._groups[position // 2]
            sides = [buffers[position % 2] for buffers in self._buffers[first:last]]
            span = slice(entry.start, entry.start + entry.num_tokens)
            outs = tuple(side[:, span] if isinstance(side, np.ndarray) else side for side in sides)
            segments.append(EncodedSegment(data[begin:end], outs, side_of(position), first, entry.start))
        if isinstance(segments[0].outs[0], CodedSide):
            chunk.codec.keep_codes(segments, entry.num_tokens)
        elif isinstance(segments[0].outs[0], StreamSide):
            chunk.codec.keep_streams(segments, entry.num_tokens)
        else:
            chunk.codec.decode_segments(segments)


def _group_spans(
    chunks: Sequence[OpenChunk], num_groups: int, job_bytes: int, first_layer_soon: bool
) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring groups, which in the largest chunk have about equal bytes, about `job_bytes`: what would be
    left over otherwise is a small read for each chunk. The group of layer 0 has a span of its own where the caller
    waits for it first."""
    first = int(first_layer_soon and num_groups > 1)
    if first:
        yield 0, 1
    ends = max((chunk.offsets for chunk in chunks), key=lambda offsets: offsets[-1] - offsets[0])[2 * first :: 2]
    num_spans = min(max(round((ends[-1] - ends[0]) / job_bytes), 1), num_groups - first)
    goals = [ends[0] + (ends[-1] - ends[0]) * number / num_spans for number in range(1, num_spans)]
    bounds = [first + bisect_left(ends, goal) for goal in goals]
    yield from ((begin, end) for begin, end in pairwise([first, *bounds, num_groups]) if begin < end)
