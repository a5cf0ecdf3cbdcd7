"""Whose forward runs: one at a time, and what is read in the background lets answers go first.

A build's forward reads hundreds of tokens and takes seconds on a CPU. Between any two of its layers it gives way to
those that wait, so that an answer's next token waits for a layer and not for a block.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch


class ForwardTurns:
    """A lock for forwards, to be held by `with`. Forwards of a thread that is `in_background` wait until nobody else
    wants it, and `give_way` when they are asked to."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._holder: int | None = None
        self._num_waiting = 0  # of those that are not in the background
        self._thread = threading.local()

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Forwards of this thread are in the background inside."""
        self._thread.in_background = True
        try:
            yield
        finally:
            self._thread.in_background = False

    def __enter__(self) -> None:
        if self._is_background:
            self._take_when_free()
            return
        with self._news:
            self._num_waiting += 1
            try:
                self._news.wait_for(lambda: self._holder is None)
                self._holder = threading.get_ident()
            finally:
                self._num_waiting -= 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._news:
            self._holder = None
            self._news.notify_all()

    def give_way(self) -> bool:
        """Let those that wait have their forwards, if this thread holds the lock in the background; returns whether
        somebody had one."""
        if not self._num_waiting or not self._is_background or self._holder != threading.get_ident():
            return False
        num_threads = torch.get_num_threads()  # others may want another number
        self.__exit__(None, None, None)
        self._take_when_free()
        if torch.get_num_threads() != num_threads:
            torch.set_num_threads(num_threads)
        return True

    @property
    def _is_background(self) -> bool:
        return getattr(self._thread, "in_background", False)

    def _take_when_free(self) -> None:
        with self._news:
            self._news.wait_for(lambda: self._holder is None and not self._num_waiting)
            self._holder = threading.get_ident()
