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
from cag_store.load_jobs import LoadPlan


class QuickJobs:
    """The jobs of a plan, in its order."""

    def __init__(
        self,
        calls: JobCalls,
        bulk: BulkDecoder,
        plan: LoadPlan,
        hashes: NDArray[np.uint64],
        descriptors: Sequence[int],
        pieces: Sequence[memoryview],
        num_taken: int,
    ) -> None:
        """hashes: uint64 `[num_chunks, num_segments, 2]`; descriptors: of each chunk's file, and four of two pipes,
        open as long as threads run; pieces: memory for a job each; num_taken: how many of the first ones are taken for
        as many of the first jobs."""
        self._calls, self._loop, self._pipes = calls, bulk.loop, descriptors[-4:]
        chunks = plan.chunks
        bounds = np.array([chunk.offsets for chunk in chunks], np.int64)
        places = np.array([bulk.span(chunk.entry.start, chunk.entry.num_tokens) for chunk in chunks], np.int64)
        jobs = _rows(plan, bounds, np.array(descriptors[:-4], np.int64))
        missing, state = np.array(plan.jobs_left, np.int64), np.array([num_taken, 0], np.int64)
        memory = np.array([[address_of(piece), 0] for piece in pieces], np.int64)
        pipes = np.array(self._pipes, np.int64)
        self._table = JobTable(jobs, bounds, hashes, places, bulk.rows, missing, memory, pipes, state)
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


def _rows(plan: LoadPlan, bounds: NDArray[np.int64], files: NDArray[np.int64]) -> NDArray[np.int64]:
    """See `JobTable.jobs`."""
    numbers = {chunk: number for number, chunk in enumerate(plan.chunks)}
    found = np.array([(numbers[job.chunk], *job.segments, job.span) for job in plan.jobs], np.int64)
    chunk, first, last, span = found.T
    begin = bounds[chunk, first]
    return np.ascontiguousarray(
        np.stack([files[chunk], begin, bounds[chunk, last] - begin, chunk, first, last, span], axis=1)
    )


def hashes_of(chunks: Sequence[OpenChunk]) -> NDArray[np.uint64] | None:
    """What `QuickJobs` takes; None when a checksum is no number."""
    found = [hashes for chunk in chunks if (hashes := chunk.hashes(0, len(chunk.index.sizes))) is not None]
    return np.stack(found) if len(found) == len(chunks) else None


def address_of(data: memoryview) -> int:
    """Where `data` lies."""
    return int(np.frombuffer(data, np.uint8).ctypes.data)
