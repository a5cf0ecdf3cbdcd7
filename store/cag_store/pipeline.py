"""Layer by layer from a backend into buffers: one thread reads ahead, several verify and decode, the caller waits in
order.

    reader thread:  layer 0 of chunk 0, 1, ..., layer 1 of chunk 0, 1, ...      (at most `slots` jobs ahead)
    workers:        checksum -> decode_into the chunk's slice of the buffers
    caller:         wait for layer 0, on_layer(0), wait for layer 1, ...

Memory beyond the buffers: `slots` = 4 per worker reused buffers of one encoded job, and the scratch of the workers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

from cag_store.backends import Backend
from cag_store.chunk_files import OpenChunk, check_segment
from cag_store.dtypes import Array

Buffers = Sequence[tuple[Array, Array]]


@dataclass
class LoadTimings:
    """Where the time of `load` went. Reading, verifying and decoding are summed over threads and overlap;
    `wall_s` is the clock."""

    bytes_read: int = 0
    read_s: float = 0.0
    verify_s: float = 0.0
    decode_s: float = 0.0
    wall_s: float = 0.0


class Pipeline:
    """One pass over all layers of `chunks`."""

    def __init__(
        self, backend: Backend, chunks: Sequence[OpenChunk], buffers: Buffers, workers: int, timings: LoadTimings
    ) -> None:
        self._backend = backend
        self._chunks = chunks
        self._buffers = buffers
        self._workers = workers
        self._timings = timings
        self._missing = [len(chunks)] * len(buffers)
        self._slots = SimpleQueue[bytearray | None]()
        largest = max(
            chunk.offsets[i + 2] - chunk.offsets[i] for chunk in chunks for i in range(0, 2 * len(buffers), 2)
        )
        for _ in range(min(4 * workers, len(chunks) * len(buffers))):
            self._slots.put(bytearray(largest))
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False

    def run(self, on_layer: Callable[[int], None] | None) -> None:
        """Fill the buffers; `on_layer(i)` as soon as layer i is whole.
        Raises what reading, verifying or decoding raised."""
        started = time.perf_counter()
        with ThreadPoolExecutor(self._workers, "cag-decode") as pool:
            reader = threading.Thread(target=self._read, args=(pool,), name="cag-read", daemon=True)
            reader.start()
            try:
                for layer in range(len(self._buffers)):
                    self._wait_for(layer)
                    if on_layer is not None:
                        on_layer(layer)
            finally:
                self._stop(None)
                reader.join()
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
        self._slots.put(None)

    def _read(self, pool: ThreadPoolExecutor) -> None:
        """The reader thread."""
        try:
            for layer in range(len(self._buffers)):
                for chunk in self._chunks:
                    slot = self._slots.get()
                    if slot is None or self._stopped:
                        return
                    pool.submit(self._decode, chunk, layer, slot, self._fetch(chunk, layer, slot))
        except BaseException as error:
            self._stop(error)

    def _fetch(self, chunk: OpenChunk, layer: int, slot: bytearray) -> memoryview:
        started = time.perf_counter()
        offset, end = chunk.offsets[2 * layer], chunk.offsets[2 * layer + 2]
        data = memoryview(slot)[: end - offset]
        self._backend.get_range_into(chunk.path, offset, data)
        self._timings.read_s += time.perf_counter() - started
        self._timings.bytes_read += len(data)
        return data

    def _decode(self, chunk: OpenChunk, layer: int, slot: bytearray, data: memoryview) -> None:
        """A job of a worker: keys and values of one layer of one chunk."""
        try:
            if not self._stopped:
                self._decode_sides(chunk, layer, data)
        except BaseException as error:
            self._stop(error)
        else:
            self._slots.put(slot)

    def _decode_sides(self, chunk: OpenChunk, layer: int, data: memoryview) -> None:
        first, last = chunk.entry.start, chunk.entry.start + chunk.entry.num_tokens
        verify_s = decode_s = 0.0
        for side in (0, 1):
            position = 2 * layer + side
            segment = chunk.index.segments[position]
            encoded, data = data[: segment.encoded_bytes], data[segment.encoded_bytes :]
            started = time.perf_counter()
            check_segment(encoded, segment, chunk, position)
            verified = time.perf_counter()
            chunk.codec.decode_into(encoded, self._buffers[layer][side][:, first:last])
            verify_s += verified - started
            decode_s += time.perf_counter() - verified
        with self._changed:
            self._timings.verify_s += verify_s
            self._timings.decode_s += decode_s
            self._missing[layer] -= 1
            if not self._missing[layer]:
                self._changed.notify_all()
