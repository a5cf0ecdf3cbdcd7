"""Jobs of a load that a compiled call reads, verifies and decodes by itself: its table, made from open chunks.

What a job is and who has to do what the call leaves is the pipeline's matter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cag_store.chunk_files import OpenChunk
from cag_store.codecs import BulkDecoder
from cag_store.codecs.jobs import FIRST, FREE, LAST, NOTHING, PIECES, READ, JobCalls, JobTable, JobThread


class QuickJobs:
    """The jobs of all `spans` of groups of layers, of each all chunks, in the order of the pipeline."""

    def __init__(
        self,
        calls: JobCalls,
        bulk: BulkDecoder,
        chunks: Sequence[OpenChunk],
        spans: Sequence[tuple[int, int]],
        hashes: NDArray[np.uint64],
        descriptors: Sequence[int],
        pieces: Sequence[memoryview],
        num_taken: int,
    ) -> None:
        """hashes: uint64 `[num_chunks, num_segments, 2]`; descriptors: of each chunk's file, and four of two pipes,
        open as long as threads run; pieces: memory for a job each; num_taken: how many of the first ones are taken for
        as many of the first jobs."""
        self._calls, self._loop, self._pipes = calls, bulk.loop, descriptors[-4:]
        bounds = np.array([chunk.offsets for chunk in chunks], np.int64)
        places = np.array([bulk.span(chunk.entry.start, chunk.entry.num_tokens) for chunk in chunks], np.int64)
        files, numbers = np.array(descriptors[:-4], np.int64), np.arange(len(chunks), dtype=np.int64)
        jobs = np.empty((len(spans), len(chunks), 7), np.int64)
        for span, (first, last) in enumerate(spans):
            begin, end = bounds[:, 2 * first], bounds[:, 2 * last]
            jobs[span] = np.stack(np.broadcast_arrays(files, begin, end - begin, numbers, 2 * first, 2 * last, span), 1)
        missing, state = np.full(len(spans), len(chunks), np.int64), np.array([num_taken, 0], np.int64)
        memory = np.array([[address_of(piece), 0] for piece in pieces], np.int64)
        pipes = np.array(self._pipes, np.int64)
        self._table = JobTable(jobs.reshape(-1, 7), bounds, hashes, places, bulk.rows, missing, memory, pipes, state)
        for piece in range(num_taken, len(pieces)):
            self.free(piece)

    def thread(self) -> JobThread:
        """For one thread."""
        return JobThread(self._table.bounds.shape[1] - 1)

    def read(self, thread: JobThread) -> tuple[int, int, int]:
        """See `JobCalls.read_jobs`."""
        return self._calls.read_jobs(self._table, thread)

    def decode(self, thread: JobThread, finished: int) -> tuple[int, int, int]:
        """See `JobCalls.decode_jobs`."""
        return self._calls.decode_jobs(self._table, self._loop, thread, finished)

    def left(self, number: int, thread: JobThread) -> list[int]:
        """The segments of a job that the call did not do on a thread."""
        first, last = int(self._table.jobs[number, FIRST]), int(self._table.jobs[number, LAST])
        return [first + int(place) for place in np.flatnonzero(~thread.done[: last - first])]

    def offset(self, piece: int) -> int:
        """Where in a piece its job begins."""
        return int(self._table.memory[piece, 1] - self._table.memory[piece, 0])

    def hand_on(self, number: int, piece: int, data: memoryview) -> None:
        """A job was read by the caller: `data` is a part of its piece."""
        self._table.memory[piece, 1] = address_of(data)
        self._put(READ, number * PIECES + piece)

    def free(self, piece: int) -> None:
        """What was in a piece is done."""
        self._put(FREE, piece)

    def stop(self, num_readers: int, num_decoders: int) -> None:
        """Let all threads come back after the job they are at."""
        self._table.state[1] = 1
        for place, count in ((FREE, num_readers), (READ, num_decoders)):
            for _ in range(count):
                self._put(place, NOTHING)

    def _put(self, place: int, number: int) -> None:
        os.write(self._pipes[place], number.to_bytes(8, sys.byteorder, signed=True))


def hashes_of(chunks: Sequence[OpenChunk]) -> NDArray[np.uint64] | None:
    """What `QuickJobs` takes; None when a checksum is no number."""
    found = [hashes for chunk in chunks if (hashes := chunk.hashes(0, len(chunk.index.sizes))) is not None]
    return np.stack(found) if len(found) == len(chunks) else None


def address_of(data: memoryview) -> int:
    """Where `data` lies."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
