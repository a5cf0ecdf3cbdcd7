"""What compiled calls need to read, verify and decode jobs of a load by themselves: tables of numbers, and pipes.

A job is neighbouring segments of one chunk. One call reads job after job into pieces of memory that are free, the other
verifies and decodes what was read; numbers of pieces go from the one to the other through pipes, as the calls know no
interpreter's lock. They come back with one of the states below, and are called again when the caller has done what is
left.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from typing import NamedTuple, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops

PAGE_BYTES = 4096  # reads begin and end at multiples, in files and in memory
READ_BYTES = 1 << 20  # one read: larger ones take longer a byte while other cores move memory

DESCRIPTOR, OFFSET, LENGTH, CHUNK, FIRST, LAST, SPAN = range(7)  # columns of `JobTable.jobs`
ENDED, UNREAD, LEFT, WHOLE = range(4)
"""No job is left; the bytes of a job could not be read; some of its segments are not done, as `JobThread.done` says;
a job was the last one of its span."""
FREE_END, FREE, READ_END, READ = range(4)  # places in `JobTable.pipes`: where numbers come out, and where they go in
PIECES = 1 << 16  # more than there are: what is read is the number of a job times this, and that of its piece
NOTHING = -1  # in a pipe: the load is over


class JobTable(NamedTuple):
    """What all threads of a load share.

    jobs: int64 `[num_jobs, 7]`: descriptor, bytes from the beginning of the file, bytes, chunk, first and last (not
    included) segment in the chunk's table, span. bounds: int64 `[num_chunks, num_segments + 1]`, where segments begin
    and the last one ends. hashes: uint64 `[num_chunks, num_segments, 2]`. spans: int64 `[num_chunks, 4]`, each a
    `ChunkSpan`. rows: of all segments, as the loop takes them. missing: int64 `[num_spans]`, how many jobs of a span
    are not done. memory: int64 `[num_pieces, 2]`, addresses: of a piece, which begins at a page, and of the job in it.
    pipes: int64 `[4]`, descriptors. state: int64 `[2]`, the next job, and whether threads shall stop.
    """

    jobs: NDArray[np.int64]
    bounds: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    spans: NDArray[np.int64]
    rows: NDArray[np.int64]
    missing: NDArray[np.int64]
    memory: NDArray[np.int64]
    pipes: NDArray[np.int64]
    state: NDArray[np.int64]


class JobThread:
    """What a thread has for itself: `done`, whether each segment of its job is; `spent`, int64 `[3]`: ns of reading, ns
    of decoding, bytes read."""

    def __init__(self, most_segments: int) -> None:
        self.pieces = np.empty((most_segments, 2), np.int64)
        self.sums = np.empty(8, np.uint64)
        self.done = np.zeros(most_segments, np.bool_)
        self.spent = np.zeros(3, np.int64)


class JobCalls(Protocol):
    """The compiled calls. Both return a job, its piece, and a state."""

    def read_jobs(self, table: JobTable, thread: JobThread) -> tuple[int, int, int]:
        """Read until no job is left, or one could not be read."""

    def decode_jobs(self, table: JobTable, loop: loops.Loop, thread: JobThread, finished: int) -> tuple[int, int, int]:
        """Decode until the load is over, segments are left, or a span is whole. `finished`: the job that the caller has
        done, whose piece it has freed (-1: none)."""


@cache
def job_calls() -> JobCalls | None:
    """None where there are no compiled loops, or another system than Linux."""
    if sys.platform != "linux" or loops.compiled() is None:
        return None
    return cast(JobCalls, importlib.import_module("cag_store.codecs.compiled_jobs"))
