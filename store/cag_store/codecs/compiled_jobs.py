"""Jobs of a load read, and verified and decoded, by compiled calls, until something needs the interpreter. Linux.

A thread that asks for the interpreter's lock between a read and the next waits for threads that decode, and the disk
meanwhile for it. Here only that comes back which is not plain: bytes that cannot be read, segments that cannot be
decoded in a loop, layers that are whole, the end. See `cag_store.codecs.jobs`.
"""

from __future__ import annotations

from typing import Any

from cag_store.codecs import compiled_segments as segments
from cag_store.codecs.compiled_xxh3 import SECRET
from cag_store.codecs.emitting import add_at, array, clock_ns, compiled, numba, put, read_at, take, types
from cag_store.codecs.jobs import (
    CHUNK,
    DESCRIPTOR,
    ENDED,
    FIRST,
    FREE,
    FREE_END,
    LAST,
    LEFT,
    LENGTH,
    NOTHING,
    OFFSET,
    PAGE_BYTES,
    PIECES,
    READ,
    READ_BYTES,
    READ_END,
    SPAN,
    UNREAD,
    WHOLE,
    JobTable,
    JobThread,
)
from cag_store.codecs.loops import GROUPED, RANKED, Loop


def _read(descriptor: Any, memory: Any, offset: Any, length: Any) -> Any:
    """Read a range and what lies before and behind it in its pages; where it begins in memory, or 0."""
    before = offset % PAGE_BYTES
    needed = before + length
    around, filled = -(-needed // PAGE_BYTES) * PAGE_BYTES, 0
    while filled < needed:
        count = read_at(descriptor, memory + filled, min(READ_BYTES, around - filled), offset - before + filled)
        if count <= 0:
            return 0
        filled += count
    return memory + before


read = compiled(_read, types.int64(*[types.int64] * 4))


def _next_of(pipe: Any, state: Any) -> Any:
    """The next number of a pipe, or `NOTHING`: a call that a signal cuts short is made again."""
    found = take(pipe)
    while found < NOTHING and not state[1]:
        found = take(pipe)
    return max(found, NOTHING)


next_of = numba.njit(inline="always")(_next_of)


def _read_jobs(shared: Any, spent: Any) -> Any:
    jobs, memory, pipes, state = shared[0], shared[6], shared[7], shared[8]
    while True:
        piece = next_of(pipes[FREE_END], state)
        if piece == NOTHING or state[1]:
            return NOTHING, piece, ENDED
        index = add_at(state.ctypes.data, 1)
        if index >= jobs.shape[0]:
            return NOTHING, piece, ENDED
        started = clock_ns()
        at = read(jobs[index, DESCRIPTOR], memory[piece, 0], jobs[index, OFFSET], jobs[index, LENGTH])
        spent[0] += clock_ns() - started
        if at == 0:
            return index, piece, UNREAD
        spent[2] += jobs[index, LENGTH]
        memory[piece, 1] = at
        put(pipes[READ], index * PIECES + piece)


def _decode_jobs(shared: Any, own: Any, loop: Any, kind: Any, finished: Any) -> Any:
    jobs, bounds, hashes, spans, rows, missing, memory, pipes, state, secret, kinds = shared
    pieces, sums, done, spent = own
    while True:
        if finished >= 0 and add_at(missing.ctypes.data + 8 * jobs[finished, SPAN], -1) == 1:
            return finished, NOTHING, WHOLE
        found = next_of(pipes[READ_END], state)
        if found == NOTHING or state[1]:
            return NOTHING, NOTHING, ENDED
        index, piece, started = found // PIECES, found % PIECES, clock_ns()
        chunk, first, last = jobs[index, CHUNK], jobs[index, FIRST], jobs[index, LAST]
        count, shift = last - first, memory[piece, 1] - bounds[chunk, first]
        for i in range(count):
            pieces[i, 0] = bounds[chunk, first + i] + shift
            pieces[i, 1] = bounds[chunk, first + i + 1] - bounds[chunk, first + i]
            done[i] = False
        part, which, ready = pieces[:count], rows[first:last], done[:count]
        expected, span = hashes[chunk][first:last], spans[chunk]
        if loop == RANKED:
            segments.ranked(part, expected, which, span, kind, secret, sums, ready)
        elif loop == GROUPED:
            segments.grouped(part, expected, which, span, secret, sums, kinds, ready)
        else:
            segments.kept(part, expected, which, span, secret, sums, kinds[1], ready)
        spent[1] += clock_ns() - started
        for i in range(count):
            if not ready[i]:
                return index, piece, LEFT
        put(pipes[FREE], piece)
        finished = index


_LONGS, _ROW, _BYTES = array(types.int64, 2), array(types.int64, 1), array(types.uint8, 1)
_SHARED = types.Tuple(
    (_LONGS, _LONGS, array(types.uint64, 3), _LONGS, _LONGS, _ROW, _LONGS, _ROW, _ROW, _BYTES, segments.KINDS)
)
_OWN = types.Tuple((_LONGS, array(types.uint64, 1), array(types.boolean, 1), _ROW))
_FOUND = types.UniTuple(types.int64, 3)
_reads = compiled(_read_jobs, _FOUND(_SHARED, _ROW))
_decodes = compiled(_decode_jobs, _FOUND(_SHARED, _OWN, *[types.int64] * 3))


def read_jobs(table: JobTable, thread: JobThread) -> tuple[int, int, int]:
    """See `JobCalls`."""
    found: tuple[int, int, int] = _reads((*table, SECRET, segments.EMPTY), thread.spent)
    return found


def decode_jobs(table: JobTable, loop: Loop, thread: JobThread, finished: int) -> tuple[int, int, int]:
    """See `JobCalls`."""
    own = thread.pieces, thread.sums, thread.done, thread.spent
    found: tuple[int, int, int] = _decodes((*table, SECRET, segments.EMPTY), own, loop.number, loop.kind, finished)
    return found
