"""How many answers are computed at a time, and how many requests may wait for their turn: tenants in turn, each one's
as they came."""

from __future__ import annotations

import asyncio

from cag.server.queues import TenantQueues, queue_full, retry_after_s

_SMOOTHING = 0.2


class Slots:
    """A fixed number of slots, and before them a bounded queue for each tenant. Lives on one event loop."""

    def __init__(self, num_slots: int, max_waiting: int) -> None:
        """max_waiting: requests of one tenant."""
        self.num_slots = num_slots
        self.max_waiting = max_waiting
        self.running = 0
        self._queues = TenantQueues[asyncio.Future[None]]()
        self._mean_s = 1.0
        self._refusal: Exception | None = None

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queues)

    @property
    def are_taken(self) -> bool:
        """Whether who comes now has to wait."""
        return self.running >= self.num_slots

    async def acquire(self, tenant: str) -> None:
        """Wait for a slot; `release` it. Raises: QueueFull; what was given to `refuse`."""
        if self._refusal is not None:
            raise self._refusal
        if not self.are_taken:  # nobody waits
            self.running += 1
            return
        num_waiting = self._queues.num_of(tenant)
        if num_waiting >= self.max_waiting:
            raise queue_full(
                f"all slots are taken, and the queue of {self.max_waiting} before them is full.", self._wait_s
            )
        turn = asyncio.get_running_loop().create_future()
        self._queues.put(tenant, turn)
        try:
            await turn
        except asyncio.CancelledError:
            waited = self._queues.remove(tenant, turn)
            if not waited and not turn.cancelled() and turn.exception() is None:  # it had been given the slot
                self._pass_on()
            raise

    def refuse(self, error: Exception) -> None:
        """Nobody gets a slot any more: `error` is raised where one is waited for."""
        self._refusal = error
        while (turn := self._queues.take()) is not None:
            if not turn.cancelled():
                turn.set_exception(error)

    def release(self, held_s: float) -> None:
        """Give a slot back that was held for `held_s` seconds."""
        self._mean_s += _SMOOTHING * (held_s - self._mean_s)
        self._pass_on()

    def _pass_on(self) -> None:
        """Who waits takes over a slot that somebody has; without anybody it is free."""
        while (turn := self._queues.take()) is not None:
            if not turn.cancelled():
                turn.set_result(None)
                return
        self.running -= 1

    @property
    def retry_after_s(self) -> int:
        """Seconds until a request of now would have its turn, from how long slots were held lately; at least 1."""
        return retry_after_s(self._wait_s)

    @property
    def _wait_s(self) -> float:
        return self._mean_s * (self.waiting + 1) / self.num_slots
