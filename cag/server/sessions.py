"""Conversations that outlive a request: turns behind one version of a cache, until nobody has asked for a while.

    open -> idle -> [ claim -> resume behind the cache -> answer -> suspend -> release ] -> idle -> ... -> closed

Between questions a session has its tail, and a lease that keeps the files of its version; whether these are in memory
is the business of the caches (docs/design/020-http-sessions.md). Knows no HTTP. Safe to use from several threads.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from cag.errors import SessionBusy, SessionNotFound
from cag.generation.session import Session
from cag.server.caches import ResidentCaches
from cag.server.tenants import CacheKey
from cag_store import Manifest
from cag_store.backends import Lease

Clock = Callable[[], float]
"""Seconds since 1970."""


@dataclass(frozen=True)
class SessionUse:
    """A session for one question. `opened_at`: as `CacheUse` has it."""

    session: Session
    opened_at: float | None


class Place(Protocol):
    """Where a question is asked: `claim`, then `using` once, then `release`, which `using` does in its end."""

    def claim(self) -> None:
        """Nobody else asks here until `release`. Raises: SessionNotFound, SessionBusy."""

    def using(self) -> AbstractContextManager[SessionUse]:
        """The session, behind a cache that is open until the block ends. Raises: as `ResidentCaches.use`."""

    def release(self) -> None:
        """The question has ended, however it did."""


@dataclass(frozen=True)
class NewSession:
    """A session for a single question to what `key` means then."""

    caches: ResidentCaches
    key: CacheKey

    def claim(self) -> None:
        """See `Place`."""

    @contextmanager
    def using(self) -> Iterator[SessionUse]:
        """See `Place`."""
        with self.caches.use(self.key) as use:
            session = use.prefix.session()
            try:
                yield SessionUse(session, use.opened_at)
            finally:
                session.close()

    def release(self) -> None:
        """See `Place`."""


@dataclass(eq=False)
class Version:
    """A version of a cache that sessions stand on. `lease`: None on a store that may only be read."""

    caches: ResidentCaches
    key: CacheKey
    manifest: Manifest
    lease: Lease | None
    num_sessions: int = 0

    def let_go(self) -> None:
        """No session stands on it."""
        self.caches.drop_version(self.key, self.manifest.digest)
        if self.lease is not None:
            self.lease.release()


class KeptSession:
    """A session that is kept between questions; see `Place` for how it is asked.

    Attributes:
        id: a secret: whoever knows it, and may use the caches it stands on, may ask.
        created_at, expires_at: seconds since 1970; the latter as long as nobody asks.
        num_turns, num_tokens: at the end of the last question: whole turns; tokens whose keys and values are kept, the
            prefix's included.
        recurrent_bytes: then: see `Session.recurrent_bytes`.
    """

    def __init__(
        self, session: Session, version: Version, ttl_s: float, clock: Clock, on_end: Callable[[KeptSession], None]
    ) -> None:
        self.id = f"session-{secrets.token_hex(16)}"
        self.version = version
        self.created_at = clock()
        self._session = session
        self._ttl_s = ttl_s
        self._clock = clock
        self._on_end = on_end
        self._lock = threading.Lock()
        self._is_busy = self._is_closed = False
        session.suspend()
        self._look()

    @property
    def is_over(self) -> bool:
        """Whether it is closed or has expired; while a question is being answered it does not expire."""
        return self._is_closed or (not self._is_busy and self._clock() >= self.expires_at)

    def claim(self) -> None:
        """See `Place`."""
        with self._lock:
            if self.is_over:
                raise no_session()
            if self._is_busy:
                hint = "Ask again when it has been answered, or open a second session."
                raise SessionBusy("another question of the session is being answered.", hint=hint)
            self._is_busy = True

    @contextmanager
    def using(self) -> Iterator[SessionUse]:
        """See `Place`."""
        try:
            with self.version.caches.use(self.version.key, self.version.manifest) as use:
                self._session.resume(use.prefix)
                try:
                    yield SessionUse(self._session, use.opened_at)
                finally:
                    self._session.suspend()
        finally:
            self.release()

    def release(self) -> None:
        """See `Place`. From now on it lives for as long again."""
        with self._lock:
            self._look()  # first: who is busy does not expire
            self._is_busy = False
            ends = self._is_closed
        if ends:
            self._end()

    def close(self) -> None:
        """Nobody asks any more; a question that is being answered is the last one."""
        with self._lock:
            ends = not self._is_closed and not self._is_busy
            self._is_closed = True
        if ends:
            self._end()

    def _look(self) -> None:
        self.expires_at = self._clock() + self._ttl_s
        self.num_turns, self.num_tokens = len(self._session.turns), self._session.num_cached_tokens
        self.recurrent_bytes = self._session.recurrent_bytes

    def _end(self) -> None:
        self._session.close()
        self._on_end(self)


def no_session() -> SessionNotFound:
    """The same words for every id that leads nowhere."""
    message = "no session has this id: it has expired, was deleted, ended with its server, or never was."
    return SessionNotFound(message, hint="Open another.")
