"""How many answers are computed at a time, and how many requests may wait for their turn."""

from __future__ import annotations

import asyncio
import math

from cag.errors import QueueFull

MAX_RETRY_AFTER_S = 60
_SMOOTHING = 0.2


class Slots:
    """A fixed number of slots and a bounded queue before them, first come first served. Lives on one event loop."""

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.running = 0
        self.waiting = 0
        self._free = asyncio.Semaphore(num_slots)
        self._mean_s = 1.0

    async def acquire(self) -> None:
        """Wait for a slot; `release` it. Raises: QueueFull."""
        if self._free.locked() and self.waiting >= self.max_waiting:
            raise QueueFull(
                f"{self.running} answers are running and {self.waiting} requests wait; there is no room for more.",
                hint=f"Try again in {self.retry_after_s} s.",
                retry_after_s=self.retry_after_s,
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1

    def release(self, held_s: float) -> None:
        """Give a slot back that was held for `held_s` seconds."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)
        self.running -= 1
        self._free.release()

    @property
    def retry_after_s(self) -> int:
        """Seconds until a request of now would have its turn, from how long slots were held lately; at least 1."""
        return max(1, min(MAX_RETRY_AFTER_S, math.ceil(self._mean_s * (self.waiting + 1) / self.num_slots)))
