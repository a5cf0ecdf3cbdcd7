"""Layers on their way from pinned host memory to a GPU: copies in a stream of their own, beside what is computed.

Whoever uses a layer lets the device wait for its copy, not the host. On a CPU "copies" are made at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Uploads:
    """Copies of one prefix, layer by layer. `send` from one thread, `wait` from any."""

    def __init__(self, device: torch.device) -> None:
        self._events: dict[int, torch.cuda.Event] = {}
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            # the memory that is written to may have been somebody else's until now
            self._stream.wait_stream(torch.cuda.current_stream(device))

    def send(self, layer: int, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Start to copy each source (pinned) to its target; both must live until `finish`."""
        if self._stream is None:
            for source, target in pairs:
                target.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._events[layer] = event

    def wait(self, layer: int) -> None:
        """Let what the calling thread does next on the device come after the copy of a layer; it was sent before."""
        event = self._events.get(layer)
        if event is not None:
            event.wait()

    def finish(self) -> None:
        """Wait until everything has been copied; afterwards `wait` costs nothing, also while a graph is recorded."""
        if self._stream is not None:
            self._stream.synchronize()
        self._events.clear()


def pinned(num_bytes: int) -> Tensor:
    """Memory that a GPU reads from by itself, uint8 of any content; plain memory without a GPU."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def pinned_like(tensor: Tensor) -> Tensor:
    """As much of it, for numbers."""
    return pinned(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
