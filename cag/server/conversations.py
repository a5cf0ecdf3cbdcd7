"""Conversations that come whole with each request, as OpenAI's clients send them: what was read of one for its last
answer is kept for a while, so that its next question finds it in place of reading it again.

Kept sessions are nobody's promise, unlike those of `cag.server.session_table`: they go for room, with time, and when
the cache is another one. What is gone is read again. Knows no HTTP. Safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile

from cag.generation.session import Session
from cag.server.sessions import Clock, NewSession, SessionUse

Turns = Sequence[tuple[str, str]]
"""(question, answer) pairs."""


@dataclass(frozen=True, eq=False)
class _Left:
    """A session that nobody asks. `turns` are those whose tokens its tail has."""

    tenant: str
    digest: str
    session: Session
    turns: tuple[tuple[str, str], ...]
    expires_at: float


class LeftConversations:
    """Sessions behind which a conversation may go on, those that were left last, in `max_bytes` of keys and values.

    A tenant is given nothing of another's. `settle` is called when pages were given back.

    Attributes:
        clock: seconds, of any beginning.
    """

    def __init__(self, max_bytes: int, ttl_s: float, settle: Callable[[], None]) -> None:
        self.max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._settle = settle
        self.clock: Clock = time.monotonic
        self._left: list[_Left] = []  # the one that was left first is the first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._left)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes that kept sessions hold beside the pages of the model."""
        with self._lock:
            return sum(left.session.recurrent_bytes for left in self._left)

    def take(self, tenant: str, digest: str, history: Turns, question: str) -> tuple[Session, Turns] | None:
        """The session that has most of a conversation behind a version of a cache, and the turns that both have; None
        if there is none. It is the caller's then.

        Its turns are the first ones of `history`, at least one; but its last question may be asked once more.
        """
        with self._lock:
            own = [left for left in self._left if (left.tenant, left.digest) == (tenant, digest)]
            found = max(own, key=lambda left: _num_shared(left.turns, history, question), default=None)
            num_shared = 0 if found is None else _num_shared(found.turns, history, question)
            if found is None or not num_shared:
                return None
            self._left.remove(found)
        return found.session, found.turns[:num_shared]

    def leave(self, tenant: str, digest: str, session: Session, turns: Turns) -> None:
        """Keep a suspended session whose tail has `turns`, if there is room; those that were left first go for it."""
        if not turns or session.tail_bytes > self.max_bytes:
            session.close()
            return
        left = _Left(tenant, digest, session, tuple(turns), self.clock() + self._ttl_s)
        with self._lock:
            self._left.append(left)
            over = self._remove_over_limit()
        _close(over)

    def make_room(self) -> bool:
        """Close all, for somebody who needs pages; whether there were any."""
        with self._lock:
            every, self._left = self._left, []
        _close(every)
        return bool(every)

    @property
    def any_over(self) -> bool:
        """Whether `close_expired` has anything to do."""
        with self._lock:
            return any(left.expires_at <= self.clock() for left in self._left)

    def close_expired(self) -> None:
        """Close those that nobody has come back to in time."""
        now = self.clock()
        with self._lock:
            over = [left for left in self._left if left.expires_at <= now]
            self._left = [left for left in self._left if left.expires_at > now]
        _close(over)
        self._settle()

    def close(self) -> None:
        """Close all."""
        self.make_room()
        self._settle()

    def _remove_over_limit(self) -> list[_Left]:
        num_bytes, over = sum(left.session.tail_bytes for left in self._left), []
        while num_bytes > self.max_bytes:
            over.append(self._left.pop(0))
            num_bytes -= over[-1].session.tail_bytes
        return over


@dataclass(frozen=True)
class WholeConversation(NewSession):
    """Where a question is asked that comes with all turns before it: in a new session, or in one that was left."""

    left: LeftConversations
    history: Turns
    question: str

    @contextmanager
    def using(self) -> Iterator[SessionUse]:
        """See `Place`."""
        with self.caches.use(self.key) as use:
            digest = use.prefix.digest
            session, turns = self.left.take(self.key.tenant, digest, self.history, self.question) or (None, [])
            try:
                if session is None:
                    session = use.prefix.session()
                else:
                    session.resume(use.prefix)
                    session.start_over()
                yield SessionUse(session, use.opened_at)
            finally:
                if session is not None:
                    session.suspend()
                    self.left.leave(self.key.tenant, digest, session, session.turns or turns)


def _num_shared(turns: Turns, history: Turns, question: str) -> int:
    """Turns that `history` begins with; 0 if a conversation has others besides, its last question aside."""
    pairs = zip(turns, history, strict=False)
    alike = takewhile(lambda pair: pair[0][0] == pair[1][0] and pair[0][1].strip() == pair[1][1].strip(), pairs)
    num_shared = sum(1 for _ in alike)
    asked = [*(asked for asked, _ in history), question]
    goes_on = [turn[0] for turn in turns[num_shared:]]
    return num_shared if goes_on in ([], asked[num_shared : num_shared + 1]) else 0


def _close(lefts: Sequence[_Left]) -> None:
    for left in lefts:
        left.session.close()
