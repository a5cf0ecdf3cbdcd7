"""Whose turn it is to compute with a model: one thread at a time, those that answer before those that build.

A build's forward reads hundreds of tokens and takes seconds on a CPU. A thread inside `giving_way` pauses between its
layers, so that an answer's next token waits for a layer and not for a block. It goes on when nobody answers, or when
it has waited for as long as its last piece of work took: so answers have at least half of the time, and a build gets
on however many there are. Knows how forwards run, and no model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cag.machine.runtime import RuntimePlan


@dataclass
class _Background:
    """A thread that gives way. `check` may raise what ends its work; `piece_s` is how long its last piece took."""

    check: Callable[[], None]
    piece_s: float = 0.0
    began_at: float | None = None  # inside a turn


class ForwardTurns:
    """Turns to compute as `plan` has it. Safe to use from several threads; a turn within a turn waits for ever."""

    def __init__(self, plan: RuntimePlan) -> None:
        self._plan = plan
        self._news = threading.Condition()
        self._is_taken = False
        self._num_owed = 0  # threads that have given way for long enough
        self._num_waiting = self._num_answering = 0  # of those that do not give way
        self._thread = threading.local()

    @contextmanager
    def turn(self, num_tokens: int) -> Iterator[None]:
        """Compute alone until the block ends: a forward of `num_tokens` tokens, with the threads planned for it."""
        self._take()
        try:
            self._plan.use_threads(num_tokens)
            yield
        finally:
            self._leave()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Inside, somebody wants one turn after the other, with little between."""
        with self._news:
            self._num_answering += 1
        try:
            yield
        finally:
            with self._news:
                self._num_answering -= 1
                self._news.notify_all()

    @contextmanager
    def giving_way(self, check: Callable[[], None]) -> Iterator[None]:
        """Inside, this thread gives way. `check()` is called before each piece of its work and whenever it is woken;
        what it raises ends the work."""
        self._thread.background = _Background(check)
        try:
            yield
        finally:
            self._thread.background = None

    def pause(self, num_tokens: int) -> None:
        """Between two layers of a forward of `num_tokens` tokens on a CPU: let others go first, if this thread gives
        way. A GPU has one stream, and is done before it could be interrupted."""
        background = self._background
        if background is None or background.began_at is None or self._plan.device != "cpu":
            return
        self._leave()
        self._take()
        self._plan.use_threads(num_tokens)  # others may have had another number

    def wake(self) -> None:
        """Let those that wait call their `check`."""
        with self._news:
            self._news.notify_all()

    @property
    def _background(self) -> _Background | None:
        return getattr(self._thread, "background", None)

    def _take(self) -> None:
        background = self._background
        with self._news:
            if background is None:
                self._num_waiting += 1
                try:
                    self._news.wait_for(lambda: not self._is_taken and not self._num_owed)
                finally:
                    self._num_waiting -= 1
            else:
                self._wait_behind(background)
            self._is_taken = True
        if background is not None:
            background.began_at = time.perf_counter()

    def _leave(self) -> None:
        background = self._background
        if background is not None:
            if background.began_at is None:  # `check` has ended the work while it waited: the turn is another's
                return
            background.piece_s, background.began_at = time.perf_counter() - background.began_at, None
        with self._news:
            self._is_taken = False
            self._news.notify_all()

    def _wait_behind(self, background: _Background) -> None:
        """Until nobody wants a turn, or until one is owed. The lock is held."""
        owed_at = time.perf_counter() + background.piece_s
        is_owed = False
        try:
            while True:
                background.check()
                rest_s = owed_at - time.perf_counter()
                if rest_s <= 0 and not is_owed:
                    is_owed, self._num_owed = True, self._num_owed + 1
                if not self._is_taken and (is_owed or not (self._num_waiting or self._num_answering)):
                    return
                self._news.wait(None if is_owed else rest_s)
        except BaseException:
            self._news.notify_all()  # who waited for this one
            raise
        finally:
            self._num_owed -= is_owed
