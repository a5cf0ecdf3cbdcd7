"""Waiting for a layer that is still loading, as long as whoever computes has nothing better to do.

A forward waits deep inside, where it needs the layer. So the thread that runs it says before whether that is worth its
time, and hears of it as an exception when it no longer is. Knows no prefix and no requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOK_S = 0.01  # how often a thread that waits looks up; a layer that arrives ends its wait at once

_thread = threading.local()


class WaitGivenUp(Exception):
    """It is not worth waiting for a layer any more. The forward that needs it has left no trace, and can be run
    again."""


@contextmanager
def waiting_while(is_worth_it: Callable[[], bool]) -> Iterator[None]:
    """Inside, this thread waits for layers as long as `is_worth_it()`, and raises WaitGivenUp then."""
    _thread.is_worth_it = is_worth_it
    try:
        yield
    finally:
        _thread.is_worth_it = None


def wait_until(there: threading.Event) -> None:
    """Wait for a layer. Raises: WaitGivenUp."""
    is_worth_it = getattr(_thread, "is_worth_it", None)
    if is_worth_it is None:
        there.wait()
        return
    while not there.wait(LOOK_S):
        if not is_worth_it():
            raise WaitGivenUp
