"""Layers on their way from pinned host memory to a GPU: copies in a stream of their own, beside what is computed, and
what is made of the copies there.

Whoever uses a layer lets the device wait for it, not the host. On a CPU "copies" are made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Uploads:
    """Copies of one prefix, layer by layer, and work on them. `wait` from any thread, everything else from one."""

    def __init__(self, device: torch.device, num_lanes: int = 0) -> None:
        """`num_lanes`: streams for what may be done beside each other before it comes together in `stream`."""
        self._events: dict[int, torch.cuda.Event] = {}
        self._stream: torch.cuda.Stream | None = None
        self._lanes: list[torch.cuda.Stream] = []
        if device.type == "cuda":
            self._stream, *self._lanes = (
                torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                for _ in range(1 + num_lanes)
            )
            # the memory that is written to may have been somebody else's until now
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def send(self, layer: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start to copy each source (pinned) to its target; both must live until `finish`."""
        with self.stream():
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            self.mark(layer)

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What the calling thread starts inside is done in its order, behind all that was started before, here and in
        lanes. Memory that is taken inside must live until the work that uses it outside is done."""
        if self._stream is None:
            yield
            return
        for lane in self._lanes:
            self._stream.wait_stream(lane)
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def lane(self, number: int) -> Iterator[None]:
        """What is started inside is done in its order, but beside everything else."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._lanes[number]):
            yield

    def mark(self, layer: int) -> None:
        """Inside of `stream`: the layer is there when all that was started so far is done."""
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
            self._events[layer] = event

    def done(self) -> Callable[[], None]:
        """Inside of `stream` or `lane`: what waits on the host until all that was started there so far is done."""
        if self._stream is None:
            return lambda: None
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event.synchronize

    def fetch(self, numbers: Tensor) -> Callable[[], Tensor]:
        """Inside of `stream` or `lane`: start to copy numbers to the host; what waits for them and gives them."""
        if self._stream is None:
            return lambda: numbers
        host = pinned_like(numbers).copy_(numbers, non_blocking=True)
        done = self.done()

        def arrived() -> Tensor:
            done()
            return host

        return arrived

    def wait(self, layer: int) -> None:
        """Let what the calling thread does next on the device come after a layer that was sent or marked before."""
        event = self._events.get(layer)
        if event is not None:
            event.wait()

    def finish(self) -> None:
        """Wait until everything is there; afterwards `wait` costs nothing, also while a graph is recorded."""
        if self._stream is not None:
            for stream in (*self._lanes, self._stream):
                stream.synchronize()
        self._events.clear()


def pinned(num_bytes: int) -> Tensor:
    """Memory that a GPU reads from by itself, uint8 of any content; plain memory without a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def pinned_bytes(memory: Tensor) -> int:
    """What memory of `pinned` takes: torch rounds what is pinned up to a power of two."""
    return 1 << (memory.nbytes - 1).bit_length() if memory.is_pinned() else memory.nbytes


def give_back_pinned() -> None:
    """Give the system the pinned memory that nobody uses any more, where torch can: it keeps it otherwise."""
    give_back = getattr(torch.accelerator, "empty_host_cache", None)  # of newer versions
    if give_back is not None and torch.cuda.is_available():
        give_back()


def pinned_like(tensor: Tensor) -> Tensor:
    """As much of it, for numbers."""
    return pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)


def sent(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small array of any memory on a device, in the thread's stream; on a CPU perhaps the array itself."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)
