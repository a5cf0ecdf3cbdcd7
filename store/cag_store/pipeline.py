"""Layer by layer from a backend into buffers: some threads read, others verify and decode, the caller waits in order.

    readers:   free memory -> next job -> read it -> hand it on, and take the next one at once
    decoders:  verify and decode its segments into the chunk's slice of the buffers -> the memory is free again
    jobs:      first layers of chunk 0, 1, ..., next layers of chunk 0, 1, ... (`load_jobs`)
    caller:    wait for layer 0, on_layer(0), wait for layer 1, ...

Reads end in bunches, while all cores decode: who has read asks for more before anything else is done, as a thread that
decodes first, or that has to wake up another one, leaves the disk without work. Decoding a job is one compiled call for
all segments that the codec knows such a step for; what that leaves is verified and decoded one by one
(`job_decoding`). Where chunks are
files, threads do not even come back for the next job: reading and decoding are calls that hand over to each other
without the interpreter, whose lock a reader would wait for (`quick_jobs`). There are as many decoders as workers, and
one reader more, or as many as the backend is good for.
Memory beyond the buffers: one encoded job a thread and one more, which the next load uses again, and the scratch of the
codecs.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from typing import NamedTuple

from cag_store.backends import SCRATCH_BYTES, ReadableBackend
from cag_store.chunk_files import OpenChunk
from cag_store.codecs import BulkDecoder
from cag_store.codecs.jobs import ENDED, LEFT, UNREAD, WHOLE, JobThread, job_calls
from cag_store.errors import CorruptEntry, StoreError
from cag_store.job_decoding import Buffers, JobDecoder
from cag_store.load_jobs import Job, Span, plan_load
from cag_store.quick_jobs import QuickJobs, hashes_of
from cag_store.scratch import Scratch

JOB_BYTES = 2 << 20  # encoded layers of a chunk read at once; with less, threads wait more for each other
SPARE_READERS = 1  # more than workers
MOST_FILES = 256  # open at once; a process may often have 1,024
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


class _ReadJob(NamedTuple):
    """Job `number`, whose bytes are `data`, a part of `memory`."""

    number: int
    job: Job
    memory: memoryview
    data: memoryview
    taken: LoadTimings


class Pipeline:
    """One pass over what each layer keeps of `chunks`."""

    def __init__(
        self,
        backend: ReadableBackend,
        chunks: Sequence[OpenChunk],
        buffers: Buffers,
        first_tokens: Sequence[int],
        workers: int,
        timings: LoadTimings,
        first_layer_soon: bool = True,
    ) -> None:
        """first_tokens: of each layer, the first one that its buffers have: chunks before it are not read. With
        `first_layer_soon` layer 0 has jobs of its own, which costs small reads."""
        self._backend = backend
        self._num_layers = len(buffers)
        self._timings = timings
        job_bytes = max(JOB_BYTES, backend.read_bytes)
        self._plan = plan_load(chunks, first_tokens, job_bytes, first_layer_soon)
        self._jobs, self._missing = self._plan.jobs, self._plan.jobs_left  # of each span
        self._span_of = _spans_of_layers(self._plan.spans, chunks[0].index.header.groups)
        self._decoder = JobDecoder(chunks[0], buffers, first_tokens)
        self._quick: QuickJobs | None = None
        self._prepared = threading.Event()  # the steps of both are made while the first jobs are read
        self._num_readers = min(max(workers + SPARE_READERS, backend.parallel_reads), len(self._jobs))
        self._num_decoders = min(workers, len(self._jobs))
        self._next_job = count(self._num_readers)  # each reader has a job from the beginning
        self._pieces: list[memoryview] = []  # of memory, for a job each
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()  # None: no more
        self._read: SimpleQueue[_ReadJob | None] = SimpleQueue()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._stopped = False

    def run(self, on_layer: Callable[[int], None] | None) -> None:
        """Fill the buffers; `on_layer(i)` as soon as layer i is whole.
        Raises what reading, verifying or decoding raised."""
        started = time.perf_counter()
        works: list[Callable[[], None]] = [partial(self._read_jobs, number) for number in range(self._num_readers)]
        works += [self._decode_jobs] * self._num_decoders
        threads = [
            threading.Thread(target=work, name=f"cag-load-{index}", daemon=True) for index, work in enumerate(works)
        ]
        num_bytes = SCRATCH_BYTES + max((job.num_bytes for job in self._jobs), default=0)
        with ExitStack() as stack:
            for _ in range(len(threads) + 1):
                self._pieces.append(stack.enter_context(_scratch.taken(num_bytes)))
            try:
                for thread in threads:
                    thread.start()
                self._decoder.prepare()
                self._quick = self._quick_jobs(stack)
                for memory in self._pieces[self._num_readers :]:
                    self._free.put(memory)
                self._prepared.set()
                for layer in range(self._num_layers):
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
            self._changed.wait_for(lambda: self._error is not None or not self._missing[self._span_of[layer]])
            if self._error is not None:
                raise self._error

    def _stop(self, error: BaseException | None) -> None:
        """Let all threads end, and the caller know why."""
        with self._changed:
            self._stopped = True
            self._error = self._error or error
            self._changed.notify_all()
        if self._quick is not None:
            self._quick.stop(self._num_readers, self._num_decoders)
        self._prepared.set()
        for _ in range(self._num_readers):
            self._free.put(None)
        for _ in range(self._num_decoders):
            self._read.put(None)

    def _quick_jobs(self, stack: ExitStack) -> QuickJobs | None:
        """What threads need to do whole jobs in a compiled call; None where there is no such call."""
        calls, bulk, chunks = job_calls(), self._decoder.bulk, self._plan.chunks
        if calls is None or not isinstance(bulk, BulkDecoder) or not 0 < len(chunks) <= MOST_FILES:
            return None
        hashes, descriptors = hashes_of(chunks), self._descriptors(chunks, stack)
        if hashes is None or descriptors is None:
            return None
        return QuickJobs(calls, bulk, self._plan, hashes, descriptors, self._pieces, self._num_readers)

    def _descriptors(self, chunks: Sequence[OpenChunk], stack: ExitStack) -> list[int] | None:
        """Of the files of all chunks and of two pipes, open until `stack` ends; None where the backend or the system
        does not give them all."""
        found: list[int] = []
        with ExitStack() as opened:
            try:
                for chunk in chunks:
                    descriptor = self._backend.descriptor(chunk.path, chunk.entry.stored_bytes)
                    if descriptor is None:
                        return None
                    opened.callback(os.close, descriptor)
                    found.append(descriptor)
                for _ in range(2):
                    for descriptor in os.pipe():
                        opened.callback(os.close, descriptor)
                        found.append(descriptor)
            except (OSError, StoreError):  # of a missing file whoever reads it says more; too many may be open
                return None
            stack.push(opened.pop_all())
        return found

    def _read_jobs(self, number: int) -> None:
        """A thread: read job `number`, and then job after job until none is left."""
        try:
            read: _ReadJob | None = self._read_into(number, self._pieces[number])
            self._prepared.wait()
            if self._quick is not None and read is not None:
                self._read_quickly(self._quick, read)
                return
            while read is not None:
                self._read.put(read)
                read = self._next_read()
        except BaseException as error:
            self._stop(error)

    def _next_read(self) -> _ReadJob | None:
        """Read the next job, when there is memory for it; None when there is none, or the load is over."""
        if (memory := self._free.get()) is None or self._stopped:
            return None
        number = next(self._next_job)
        return self._read_into(number, memory) if number < len(self._jobs) else None

    def _read_into(self, number: int, memory: memoryview) -> _ReadJob:
        """Read a job, once more where a copy of it may be wrong."""
        job, taken = self._jobs[number], LoadTimings()
        try:
            data = self._bytes_of(job, memory, taken)
        except CorruptEntry:
            if not self._forgotten(job, taken):
                raise
            data = self._bytes_of(job, memory, taken)
        return _ReadJob(number, job, memory, data, taken)

    def _read_quickly(self, quick: QuickJobs, read: _ReadJob) -> None:
        """Hand on what was read, and read jobs by a compiled call; what it cannot read is read here."""
        thread, number, piece, state = quick.thread(), read.number, read.number, UNREAD
        while state == UNREAD and not self._stopped:
            self._add(read.taken)
            quick.hand_on(number, piece, read.data)
            number, piece, state = quick.read(thread)
            if state == UNREAD:
                read = self._read_into(number, self._pieces[piece])
        self._add(self._spent(thread))

    def _decode_jobs(self) -> None:
        """A thread: verify and decode what was read."""
        try:
            self._prepared.wait()
            if self._quick is not None:
                self._decode_quickly(self._quick)
                return
            while (read := self._read.get()) is not None and not self._stopped:
                self._decode(read, None)
                self._free.put(read.memory)
                self._finish(read.job, read.taken)
        except BaseException as error:
            self._stop(error)

    def _decode_quickly(self, quick: QuickJobs) -> None:
        """Verify and decode jobs by a compiled call, and here what it leaves."""
        thread, finished, state = quick.thread(), -1, WHOLE
        while state != ENDED and not self._stopped:
            number, piece, state = quick.decode(thread, finished)
            finished, job = -1, self._jobs[number]
            if state == WHOLE:
                self._finish_span(job)
            elif state == LEFT:
                memory, before = self._pieces[piece], quick.offset(piece)
                read = _ReadJob(number, job, memory, memory[before : before + job.num_bytes], LoadTimings())
                self._decode(read, quick.left(number, thread))
                self._add(read.taken)
                quick.free(piece)
                finished = number
        self._add(self._spent(thread))

    def _add(self, taken: LoadTimings) -> None:
        with self._changed:
            self._timings.add(taken)

    def _spent(self, thread: JobThread) -> LoadTimings:
        """What compiled calls on a thread took."""
        read_ns, decode_ns, num_bytes = map(int, thread.spent)
        tiers = {self._backend.tier: num_bytes} if num_bytes else {}
        return LoadTimings(num_bytes, read_ns / 1e9, decode_ns / 1e9, bytes_by_tier=tiers)

    def _forgotten(self, job: Job, taken: LoadTimings) -> bool:
        """Whether bytes that proved wrong may be those of a copy kept nearby; it is dropped, and they can be read once
        more from the backend itself."""
        return self._backend.forget(job.chunk.path) or bool(taken.bytes_by_tier.keys() - {self._backend.tier})

    def _finish_span(self, job: Job) -> None:
        """All jobs of the span of `job` are decoded."""
        with self._changed:
            self._missing[job.span] = 0
            self._changed.notify_all()

    def _finish(self, job: Job, taken: LoadTimings) -> None:
        """A job is decoded."""
        with self._changed:
            self._timings.add(taken)
            self._missing[job.span] -= 1
            if not self._missing[job.span]:
                self._changed.notify_all()

    def _bytes_of(self, job: Job, memory: memoryview, taken: LoadTimings) -> memoryview:
        """Read a job into a part of `memory`; adds to `taken` where the bytes came from, and the time. Raises:
        CorruptEntry."""
        started = time.perf_counter()
        offset = job.chunk.offsets[job.segments[0]]
        data, tier = self._backend.read_range(job.chunk.path, offset, job.num_bytes, memory)
        taken.bytes_read += job.num_bytes
        taken.bytes_by_tier[tier] = taken.bytes_by_tier.get(tier, 0) + job.num_bytes
        taken.read_s += time.perf_counter() - started
        return data

    def _decode(self, read: _ReadJob, left: Sequence[int] | None) -> None:
        """Verify and decode a job, of which `left` segments are not done (None: all); it is read once more where a copy
        of it may be wrong. Adds the time. Raises: CorruptEntry."""
        job, data, taken = read.job, read.data, read.taken
        started = time.perf_counter()
        try:
            if left is None:
                self._decoder.decode(job, data)
            else:
                self._decoder.decode_singly(job, data, left)
        except CorruptEntry:
            if not self._forgotten(job, taken):
                raise
            self._decoder.decode(job, self._bytes_of(job, read.memory, taken))
        taken.decode_s += time.perf_counter() - started


def _spans_of_layers(spans: Sequence[Span], groups: Sequence[Span]) -> list[int]:
    """The number of each layer's span, where spans are of groups, and groups of layers."""
    sizes = [groups[last - 1][1] - groups[first][0] for first, last in spans]
    return [number for number, size in enumerate(sizes) for _ in range(size)]
