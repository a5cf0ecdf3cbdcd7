"""Who waits at a server, tenants in turn, and how those are refused for whom there is no room. Knows no HTTP."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import Generic, TypeVar

from cag.errors import QueueFull

MAX_RETRY_AFTER_S = 60

T = TypeVar("T")


class TenantQueues(Generic[T]):
    """A queue for each tenant, in the order in which things came; tenants are served in turn. One thread at a time."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[T]] = OrderedDict()  # who was served last comes last

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def num_of(self, tenant: str) -> int:
        """How many things of a tenant wait."""
        return len(self._queues.get(tenant, ()))

    def put(self, tenant: str, thing: T) -> None:
        """Let something wait; who never waited before comes first."""
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            self._queues.move_to_end(tenant, last=False)
        self._queues[tenant].append(thing)

    def take(self) -> T | None:
        """Whose turn it is; None if nobody waits."""
        tenant = next((tenant for tenant, waiting in self._queues.items() if waiting), None)
        if tenant is None:
            return None
        self._queues.move_to_end(tenant)
        return self._queues[tenant].popleft()

    def remove(self, tenant: str, thing: T) -> bool:
        """Let it wait no longer; whether it did."""
        if thing not in self._queues.get(tenant, ()):
            return False
        self._queues[tenant].remove(thing)
        return True


def retry_after_s(wait_s: float) -> int:
    """What a client is told that would have to wait for `wait_s` seconds: whole ones, from 1 to `MAX_RETRY_AFTER_S`."""
    return max(1, min(MAX_RETRY_AFTER_S, math.ceil(wait_s)))


def queue_full(what: str, wait_s: float, instead: str = "") -> QueueFull:
    """The error for `what`, there being room in some `wait_s` seconds; `instead`: what else could be done."""
    seconds = retry_after_s(wait_s)
    hint = f"{instead}, or try again in {seconds} s." if instead else f"Try again in {seconds} s."
    return QueueFull(what, hint=hint, retry_after_s=seconds)
