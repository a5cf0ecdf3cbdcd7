"""How long a kernel takes: replays of a CUDA graph between events on a GPU, the wall clock on a CPU.

Callables in, seconds out. A graph leaves out what Python and the driver take for a launch, as a decoding loop does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
COPY_SAMPLES = 9
CALLS_PER_REPLAY = 4

Work = Callable[[], object]


class Clock(ABC):
    """Times work on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @abstractmethod
    def prepared(self, work: Work) -> Callable[[], float]:
        """Warm `work` up; what comes back runs it and returns its seconds a call."""

    def copy_bandwidth(self) -> float:
        """Bytes a second that a copy moves, read and written counted; the best of a few, by copying or by a kernel."""
        source = torch.arange(COPY_BYTES[self.device.type] // 4, dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        copies = [self.prepared(lambda: target.copy_(source)), self.prepared(lambda: torch.neg(source, out=target))]
        return 2 * source.nbytes / min(copy() for _ in range(COPY_SAMPLES) for copy in copies)


class WallClock(Clock):
    """One call, by the wall clock."""

    def prepared(self, work: Work) -> Callable[[], float]:
        """See `Clock`."""
        for _ in range(2):
            work()

        def timed() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return timed


class GraphClock(Clock):
    """A few calls in a CUDA graph, between two events."""

    def prepared(self, work: Work) -> Callable[[], float]:
        """See `Clock`."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS_PER_REPLAY):
                work()
        graph.replay()

        def timed() -> float:
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / CALLS_PER_REPLAY

        return timed


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return GraphClock(device) if device.type == "cuda" else WallClock(device)
