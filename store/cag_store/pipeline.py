"""Layer by layer from a backend into buffers: several threads read, verify and decode, the caller waits in order.

    thread:  next job -> read it -> for each segment: checksum -> decode_into the chunk's slice of the buffers
    jobs:    first layers of chunk 0, 1, ..., next layers of chunk 0, 1, ...
    caller:  wait for layer 0, on_layer(0), wait for layer 1, ...

A job stays with one thread, which reads, verifies and decodes it in three long steps: between them it needs the
interpreter's lock, for which threads wait. There is one thread more than workers: a core decodes while another job
waits for the disk. Memory beyond the buffers: one reused buffer of an encoded job a thread, and the scratch of the
codecs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from cag_store.backends import Backend
from cag_store.chunk_files import OpenChunk, check_segment, side_of
from cag_store.codecs import EncodedSegment
from cag_store.dtypes import Array

Buffers = Sequence[tuple[Array, Array]]

_JOB_BYTES = 4 << 20  # encoded layers of a chunk read at once; with less, threads wait more for each other


@dataclass
class LoadTimings:
    """Where the time of `load` went. Reading, verifying and decoding are summed over threads and overlap;
    `wall_s` is the clock."""

    bytes_read: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0


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


class Pipeline:
    """One pass over all layers of `chunks`."""

    def __init__(
        self, backend: Backend, chunks: Sequence[OpenChunk], buffers: Buffers, workers: int, timings: LoadTimings
    ) -> None:
        self._backend = backend
        self._buffers = buffers
        self._timings = timings
        self._missing = [len(chunks)] * len(buffers)
        self._groups = chunks[0].index.header.groups
        spans = list(_group_spans(chunks, len(self._groups)))
        self._jobs = [Job(chunk, first, last) for first, last in spans for chunk in chunks]
        self._next_job = count()
        self._num_threads = min(workers + 1, len(self._jobs))
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False

    def run(self, on_layer: Callable[[int], None] | None) -> None:
        """Fill the buffers; `on_layer(i)` as soon as layer i is whole.
        Raises what reading, verifying or decoding raised."""
        started = time.perf_counter()
        threads = [
            threading.Thread(target=self._work, name=f"cag-load-{index}", daemon=True)
            for index in range(self._num_threads)
        ]
        for thread in threads:
            thread.start()
        try:
            for layer in range(len(self._buffers)):
                self._wait_for(layer)
                if on_layer is not None:
                    on_layer(layer)
        finally:
            self._stop(None)
            for thread in threads:
                thread.join()
        self._timings.wall_s += time.perf_counter() - started

    def _wait_for(self, layer: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._missing[layer])
            if self._error is not None:
                raise self._error

    def _stop(self, error: BaseException | None) -> None:
        with self._changed:
            self._stopped = True
            self._error = self._error or error
            self._changed.notify_all()

    def _work(self) -> None:
        """A thread: job after job until none is left."""
        try:
            buffer = memoryview(bytearray(max(job.num_bytes for job in self._jobs)))
            while not self._stopped:
                index = next(self._next_job)
                if index >= len(self._jobs):
                    return
                self._do(self._jobs[index], buffer)
        except BaseException as error:
            self._stop(error)

    def _do(self, job: Job, buffer: memoryview) -> None:
        started = time.perf_counter()
        data = buffer[: job.num_bytes]
        self._backend.get_range_into(job.chunk.path, job.chunk.offsets[2 * job.first], data)
        read = time.perf_counter()
        segments = list(self._verified(job, data))
        verified = time.perf_counter()
        job.chunk.codec.decode_segments(segments)
        decoded = time.perf_counter()
        with self._changed:
            self._timings.bytes_read += job.num_bytes
            self._timings.read_s += read - started
            self._timings.verify_s += verified - read
            self._timings.decode_s += decoded - verified
            first, last = self._groups[job.first][0], self._groups[job.last - 1][1]
            for layer in range(first, last):
                self._missing[layer] -= 1
            if not self._missing[first]:  # the layers of a job become whole together
                self._changed.notify_all()

    def _verified(self, job: Job, data: memoryview) -> Iterator[EncodedSegment]:
        """The segments of a job, each after its checksum was compared, with the slices of the buffers to fill."""
        chunk = job.chunk
        start, end = chunk.entry.start, chunk.entry.start + chunk.entry.num_tokens
        for position in range(2 * job.first, 2 * job.last):
            segment = chunk.index.segments[position]
            encoded, data = data[: segment.encoded_bytes], data[segment.encoded_bytes :]
            check_segment(encoded, segment, chunk, position)
            first, last = self._groups[position // 2]
            outs = tuple(sides[position % 2][:, start:end] for sides in self._buffers[first:last])
            yield EncodedSegment(encoded, outs, side_of(position), first, start)


def _group_spans(chunks: Sequence[OpenChunk], num_groups: int) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring groups of at most `_JOB_BYTES` in every chunk. The group of layer 0 has one of its own, as
    the caller waits for it first."""
    first = 0
    for group in range(1, num_groups + 1):
        whole = group == num_groups or first == 0
        if whole or any(Job(chunk, first, group + 1).num_bytes > _JOB_BYTES for chunk in chunks):
            yield first, group
            first = group
