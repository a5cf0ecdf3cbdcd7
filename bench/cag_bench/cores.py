"""All threads of this process on a few cores, for figures that say on how many. Linux; elsewhere they run where they
run, and the figure says so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_TASKS = Path("/proc/self/task")


def can_pin() -> bool:
    """Whether threads can be bound to cores here."""
    return hasattr(os, "sched_setaffinity") and _TASKS.is_dir()


@contextlib.contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Every thread, those of libraries and those to come included, runs on the first `count` usable cores inside."""
    if not can_pin():
        yield
        return
    before = os.sched_getaffinity(0)
    _bind(set(sorted(before)[:count]))
    try:
        yield
    finally:
        _bind(before)


def _bind(cores: set[int]) -> None:
    for task in _TASKS.iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cores)
