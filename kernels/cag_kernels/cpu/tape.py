"""Compiled steps written down once and run many times, by all threads in one parallel region.

A forward of few rows is hundreds of short steps. Between any two of them an interpreter takes longer than the threads
need to meet, and waking sleeping threads longer still. So steps that are taken while a tape is recorded are not run:
their entries and the memory of their calls are kept, and `Tape.run` runs them in order. All threads meet behind each
step. What CUDA graphs are to a GPU, this is to a CPU; the results are those of the steps taken one by one.

A step is a compiled function of one pointer, to its call: an array of int64 that begins with a counter of tasks.
Threads that run the same call share out its tasks.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cag_kernels.cpu.threads import openmp_parallel, run_on_threads, thread_pool

_state = threading.local()
_pool_lock, _player_lock = threading.Lock(), threading.Lock()


class Header(IntEnum):
    """Places in the header of a tape, an array of int64."""

    ARRIVED = 0  # how often a thread has finished its part of a step; alone in its cache line
    BEHIND = 8  # steps that all have finished; alone too
    NUM_THREADS = 16  # that meet; 0: all of the OpenMP team
    NUM_STEPS = 17  # that are run
    STEPS = 18  # address of the first of them: `STEP_FIELDS` int64 a step


class StepField(IntEnum):
    """Places in a step: address of its code, address of its call, 1 if one thread runs it alone; then the `Reads` of
    the next step behind it that has some."""

    ENTRY = 0
    CALL = 1
    ALONE = 2
    AHEAD = 3
    AHEAD_ROWS = 4
    AHEAD_ROW_BYTES = 5
    AHEAD_STEP = 6


STEP_FIELDS = len(StepField)


class Reads(NamedTuple):
    """What a step reads once, out of memory: rows that its threads share out (`cpu.team.Share`). Threads that wait for
    others ask for the beginning of their share.

    address: of the first row. step: a unit has so many rows, or a multiple.
    """

    address: int
    num_rows: int
    row_bytes: int
    step: int


_NOTHING = Reads(0, 0, 0, 1)


class _Step(NamedTuple):
    """See `Tape.add`. The call must live as long as the tape."""

    entry: int
    call: Any
    alone: bool
    reads: Reads | None


class Scratch:
    """Memory for sums under way that tapes of which one runs at a time have in common; it goes with the last of them.
    When it has to grow, it at least doubles: what older tapes go on with is less than what the newest needs."""

    def __init__(self) -> None:
        self._memory: weakref.ref[Tensor] | None = None

    def take(self, count: int) -> Tensor:
        """At least `count` float32 of any content, for as long as the caller keeps them."""
        memory = None if self._memory is None else self._memory()
        if memory is None or memory.numel() < count:
            memory = torch.empty(max(count, 0 if memory is None else 2 * memory.numel()), dtype=torch.float32)
            self._memory = weakref.ref(memory)
        return memory


class Tape:
    """Steps in order. Recorded once, then run any number of times, by one caller at a time."""

    def __init__(self, scratch: Scratch | None = None) -> None:
        """`scratch`: shared with other tapes."""
        self._steps: list[_Step] = []
        self._kept: list[Any] = []  # what the addresses of steps and in their calls are of
        self._scratch = Scratch() if scratch is None else scratch
        self._header = np.zeros(Header.STEPS + 1, dtype=np.int64)
        self._rows = np.zeros((0, STEP_FIELDS), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._steps)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Steps that this thread takes inside are written down here and not run. Nothing that runs elsewhere may use
        what they write."""
        assert _recording() is None, "one tape at a time"
        _state.tape = self
        try:
            yield
        finally:
            _state.tape = None
        self._seal()

    def add(self, entry: int, call: Any, alone: bool, reads: Reads | None = None) -> None:
        """One step: the address of its code, its call (a ctypes array), and whether one thread runs it alone."""
        self._steps.append(_Step(entry, call, alone, reads))

    def keep(self, memory: Sequence[Any]) -> None:
        """Keep what addresses are of, as long as the tape."""
        self._kept.extend(memory)

    def scratch(self, count: int) -> Tensor:
        """`count` float32 that any step may write and only the steps right behind it read."""
        memory = self._scratch.take(count)
        self._kept.append(memory)
        return memory[:count]

    def run(self, first: int = 0, last: int | None = None, *, alone: bool = False) -> None:
        """Run the steps `[first, last)`, on all of torch's threads; on this one with `alone`. The results are the
        same."""
        last = len(self) if last is None else last
        header, num_threads = self._header, 1 if alone else torch.get_num_threads()
        if first >= last:
            return
        header[Header.ARRIVED] = header[Header.BEHIND] = 0
        header[Header.NUM_STEPS], header[Header.STEPS] = last - first, self._rows[first:].ctypes.data
        if num_threads == 1:
            header[Header.NUM_THREADS] = 1
            _player().function(header.ctypes.data)
        elif (parallel := openmp_parallel()) is not None:
            header[Header.NUM_THREADS] = 0
            parallel(_player().entry, header.ctypes.data, num_threads, 0)
        else:
            header[Header.NUM_THREADS] = num_threads
            _run_in_pool(header.ctypes.data, num_threads)

    def _seal(self) -> None:
        rows, ahead = [], _NOTHING
        for step in reversed(self._steps):
            rows.append((step.entry, ctypes.addressof(step.call), step.alone, *ahead))
            ahead = ahead if step.reads is None else step.reads
        self._rows = np.array(rows[::-1], dtype=np.int64).reshape(-1, STEP_FIELDS)


class _Scratch(threading.local):
    """Memory of the calling thread for sums under way; fresh memory at each call would cost more than short calls."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32)

    def take(self, count: int) -> Tensor:
        if self._memory.numel() < count:
            self._memory = torch.empty(count, dtype=torch.float32)
        return self._memory[:count]


_scratch = _Scratch()


def scratch_memory(count: int) -> Tensor:
    """`count` float32 of any content, until the next call of this."""
    tape = _recording()
    return _scratch.take(count) if tape is None else tape.scratch(count)


def new_call(fields: Sequence[int], memory: Sequence[Any]) -> Any:
    """A call of int64 `fields`, of which the first is the counter; `memory` is what addresses among them are of."""
    tape = _recording()
    if tape is not None:
        tape.keep(memory)
    return (ctypes.c_int64 * len(fields))(*fields)


@cache
def float_bits(value: float) -> int:
    """A float32 as a field of a call: its bits."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _recording() -> Tape | None:
    return getattr(_state, "tape", None)


class CompiledStep:
    """A compiled function of one pointer, to be called and to be recorded. `owner` is what keeps its code alive, as
    long as this object or a tape that it is on."""

    def __init__(self, entry: int, owner: Any) -> None:
        self.entry = entry
        self.function: Callable[[Any], None] = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(entry)
        self._owner = owner

    def alone(self, call: Any) -> None:
        """Run a call of one task on this thread, or record it."""
        tape = _recording()
        if tape is None:
            self.function(call)
        else:
            tape.keep((self,))
            tape.add(self.entry, call, alone=True)

    def shared(self, call: Any, num_tasks: int, reads: Reads | None = None) -> None:
        """Run a call on all of torch's threads, which share out its tasks, or record it."""
        tape = _recording()
        if tape is None:
            run_on_threads(self.function, self.entry, call, num_tasks)
        else:
            tape.keep((self,))
            tape.add(self.entry, call, alone=False, reads=reads)


def _run_in_pool(memory: int, num_threads: int) -> None:
    """Where there is no OpenMP of GNU. Threads of two tapes must not wait for each other, hence the lock."""
    play = _player().function
    with _pool_lock:
        list(thread_pool(num_threads).map(lambda _: play(memory), range(num_threads)))


def _player() -> CompiledStep:
    """What plays a tape, compiled once a process: two threads that came first would have two programs."""
    with _player_lock:
        return _compile_player()


@cache
def _compile_player() -> CompiledStep:
    from cag_kernels.cpu.player import player_module
    from cag_kernels.cpu.program import Program

    program = Program(player_module)
    return CompiledStep(program.address("play"), program)
