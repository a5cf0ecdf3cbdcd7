"""The sessions of a server: which there are, how many there may be, and which versions of caches they keep.

Knows no HTTP. Safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable

from cag.errors import QueueFull
from cag.prefix import Prefix
from cag.server.caches import ResidentCaches
from cag.server.queues import queue_full
from cag.server.sessions import Clock, KeptSession, Version, no_session
from cag.server.tenants import CacheKey


class SessionTable:
    """The sessions of a server over its open `caches`, at most `max_sessions` of each tenant. Whose a session is, the
    key of its cache says.

    `settle` is called when a session has given its pages back.

    Attributes:
        ttl_s: how long a session lives without a question, where less is not asked for.
        clock: seconds since 1970.
    """

    def __init__(self, caches: ResidentCaches, ttl_s: float, max_sessions: int, settle: Callable[[], None]) -> None:
        self._caches = caches
        self.ttl_s = ttl_s
        self.max_sessions = max_sessions
        self._settle = settle
        self.clock: Clock = time.time
        self._num_open: Counter[str] = Counter()  # by tenant; those that are closed and still answer included
        self._sessions: dict[str, KeptSession] = {}
        self._lock = threading.Lock()
        self._versions: dict[tuple[CacheKey, str], Version] = {}
        self._versions_lock = threading.Lock()  # held while leases are written

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes that open sessions hold beside the pages of the model."""
        with self._lock:
            return sum(kept.recurrent_bytes for kept in self._sessions.values())

    def open(self, key: CacheKey, ttl_s: float | None = None) -> KeptSession:
        """A session behind what `key` means now, which begins to load.

        Raises:
            QueueFull: there are as many sessions as may be.
            CacheNotFound, CacheMismatch, StoreError, InsufficientResources: as `ResidentCaches.use`.
        """
        self._take_place(key.tenant)
        try:
            with self._caches.use(key) as use:
                version = self._stand_on(key, use.prefix)
                kept = KeptSession(
                    use.prefix.session(), version, ttl_s or self.ttl_s, lambda: self.clock(), self._ended
                )
        except BaseException:
            self._give_place_back(key.tenant)
            raise
        with self._lock:
            self._sessions[kept.id] = kept
        return kept

    def find(self, tenant: str, session_id: str) -> KeptSession:
        """The one place where an id becomes a session: only a live one of the tenant. Raises: SessionNotFound."""
        with self._lock:
            kept = self._sessions.get(session_id)
        if kept is None or kept.version.key.tenant != tenant or kept.is_over:
            raise no_session()
        return kept

    def of(self, tenant: str) -> list[KeptSession]:
        """The live sessions of a tenant, in the order in which they were opened."""
        with self._lock:
            every = list(self._sessions.values())
        return [kept for kept in every if kept.version.key.tenant == tenant and not kept.is_over]

    def delete(self, tenant: str, session_id: str) -> None:
        """Close a session; its answer that is running goes on. Raises: SessionNotFound."""
        self._close(self.find(tenant, session_id))

    @property
    def any_over(self) -> bool:
        """Whether `close_expired` has anything to do."""
        with self._lock:
            return any(kept.is_over for kept in self._sessions.values())

    def close_expired(self) -> None:
        """Close those that nobody has asked in time."""
        with self._lock:
            over = [kept for kept in self._sessions.values() if kept.is_over]
        for kept in over:
            self._close(kept)

    def close(self) -> None:
        """Close all."""
        with self._lock:
            every = list(self._sessions.values())
        for kept in every:
            self._close(kept)

    def _close(self, kept: KeptSession) -> None:
        with self._lock:
            self._sessions.pop(kept.id, None)
        kept.close()

    def _ended(self, kept: KeptSession) -> None:
        version = kept.version
        with self._versions_lock:
            version.num_sessions -= 1
            if not version.num_sessions:
                del self._versions[version.key, version.manifest.digest]
                version.let_go()
        self._give_place_back(version.key.tenant)
        self._settle()

    def _stand_on(self, cache: CacheKey, prefix: Prefix) -> Version:
        """One more session on an open version. Its lease is taken while the cache is open: its files are there."""
        key = cache, prefix.digest
        with self._versions_lock:
            if key not in self._versions:
                lease = self._caches.lease(cache, prefix.digest)
                self._versions[key] = Version(self._caches, cache, prefix.manifest, lease)
            self._versions[key].num_sessions += 1
            return self._versions[key]

    def _take_place(self, tenant: str) -> None:
        self.close_expired()
        with self._lock:
            if self._num_open[tenant] >= self.max_sessions:
                raise self._full(tenant)
            self._num_open[tenant] += 1

    def _give_place_back(self, tenant: str) -> None:
        with self._lock:
            self._num_open[tenant] -= 1

    def _full(self, tenant: str) -> QueueFull:
        own = [kept for kept in self._sessions.values() if kept.version.key.tenant == tenant]
        first = min((kept.expires_at for kept in own), default=0.0)
        what = f"{self.max_sessions} sessions are open, as many as may be."
        return queue_full(what, first - self.clock(), "Delete one")
