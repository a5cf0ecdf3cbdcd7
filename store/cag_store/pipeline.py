"""Layer by layer from a backend into buffers: several threads read, verify and decode, the caller waits in order.

    thread:  next job -> read it -> for each segment: checksum -> decode_into the chunk's slice of the buffers
    jobs:    first layers of chunk 0, 1, ..., next layers of chunk 0, 1, ...
    caller:  wait for layer 0, on_layer(0), wait for layer 1, ...

A job stays with one thread, so that its bytes are still in that core's cache when they are verified and decoded. There
is one thread more than workers: a core decodes while another job waits for the disk. Memory beyond the buffers: one
reused buffer of an encoded job a thread, and the scratch of the codecs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

from cag_store.backends import ReadableBackend
from cag_store.chunk_files import OpenChunk, check_segment
from cag_store.dtypes import Array
from cag_store.errors import CorruptEntry

Buffers = Sequence[tuple[Array, Array]]

_JOB_BYTES = 1 << 20  # encoded layers of a chunk read at once: fewer calls, but still in a core's cache


@dataclass
class LoadTimings:
    """Where the time of `load` went. Reading, verifying and decoding are summed over threads and overlap;
    `wall_s` is the clock. `bytes_by_tier` says how many of the bytes came from where."""

    bytes_read: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0
    bytes_by_tier: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Job:
    """Keys and values of layers [first, last) of one chunk: neighbours in its file."""

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
        self,
        backend: ReadableBackend,
        chunks: Sequence[OpenChunk],
        buffers: Buffers,
        workers: int,
        timings: LoadTimings,
    ) -> None:
        self._backend = backend
        self._buffers = buffers
        self._timings = timings
        self._missing = [len(chunks)] * len(buffers)
        spans = list(_layer_spans(chunks, len(buffers), max(_JOB_BYTES, backend.read_bytes)))
        self._jobs = [Job(chunk, first, last) for first, last in spans for chunk in chunks]
        self._next_job = count()
        self._num_threads = min(max(workers + 1, backend.parallel_reads), len(self._jobs))
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
        timings = LoadTimings(bytes_read=job.num_bytes)
        started = time.perf_counter()
        data = buffer[: job.num_bytes]
        tier = self._backend.get_range_into(job.chunk.path, job.chunk.offsets[2 * job.first], data)
        timings.read_s = time.perf_counter() - started
        for layer in range(job.first, job.last):
            data = self._decoded(job, layer, data, timings, nearby=tier != self._backend.tier)
            with self._changed:
                self._missing[layer] -= 1
                if not self._missing[layer]:
                    self._changed.notify_all()
        with self._changed:
            self._timings.bytes_read += timings.bytes_read
            self._timings.read_s += timings.read_s
            self._timings.verify_s += timings.verify_s
            self._timings.decode_s += timings.decode_s
            by_tier = self._timings.bytes_by_tier
            by_tier[tier] = by_tier.get(tier, 0) + job.num_bytes

    def _decoded(self, job: Job, layer: int, data: memoryview, timings: LoadTimings, *, nearby: bool) -> memoryview:
        """`_decode_layer`; once more from the backend itself when a copy kept nearby proved wrong."""
        try:
            return self._decode_layer(job.chunk, layer, data, timings)
        except CorruptEntry:
            if not (self._backend.forget(job.chunk.path) or nearby):
                raise
        self._backend.get_range_into(job.chunk.path, job.chunk.offsets[2 * layer], data)
        return self._decode_layer(job.chunk, layer, data, timings)

    def _decode_layer(self, chunk: OpenChunk, layer: int, data: memoryview, timings: LoadTimings) -> memoryview:
        """Verify and decode both sides of a layer, with which `data` begins. Returns what stands behind them."""
        first, last = chunk.entry.start, chunk.entry.start + chunk.entry.num_tokens
        for side, buffer in enumerate(self._buffers[layer]):
            position = 2 * layer + side
            segment = chunk.index.segments[position]
            encoded, data = data[: segment.encoded_bytes], data[segment.encoded_bytes :]
            started = time.perf_counter()
            check_segment(encoded, segment, chunk, position)
            verified = time.perf_counter()
            chunk.codec.decode_into(encoded, buffer[:, first:last])
            timings.verify_s += verified - started
            timings.decode_s += time.perf_counter() - verified
        return data


def _layer_spans(chunks: Sequence[OpenChunk], num_layers: int, job_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring layers of at most `job_bytes` in every chunk. Layer 0 has one of its own, as the caller
    waits for it first."""
    first = 0
    for layer in range(1, num_layers + 1):
        whole = layer == num_layers or first == 0
        if whole or any(Job(chunk, first, layer + 1).num_bytes > job_bytes for chunk in chunks):
            yield first, layer
            first = layer
