"""Caches that stay open between requests, counted by who uses them.

A cache is opened by its first request and stays. When its name means another manifest, requests from then on use the
new one; the old one is closed when its last request has ended. Safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cag.engine import Engine
from cag.prefix import Prefix
from cag_store import utc_now
from cag_store.errors import EntryNotFound, StoreError


@dataclass
class _Held:
    """An open prefix with the number of requests that use it; a retired one is closed with the last of them."""

    prefix: Prefix
    users: int = 0
    retired: bool = False


@dataclass(frozen=True)
class CacheUse:
    """A prefix for one request. `opened_at`: `time.perf_counter()` before it was opened, None if it was open before."""

    prefix: Prefix
    opened_at: float | None


class ResidentCaches:
    """The open caches of an engine, by name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: dict[str, _Held] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str) -> Iterator[CacheUse]:
        """What `name` means now, open at least until the block ends.

        Raises:
            CacheNotFound, CacheMismatch, StoreError: as `Engine.open`. A cache that fails while it is used is retired,
                so that the next request loads it again.
        """
        held, opened_at = self._take(name)
        try:
            yield CacheUse(held.prefix, opened_at)
        except StoreError:
            self._retire(name, held)
            raise
        finally:
            self._give_back(held)

    def load(self, name: str) -> None:
        """Make a cache resident; returns when all of it is there. Raises as `use`."""
        with self.use(name) as use:
            use.prefix.resident.wait()

    def is_resident(self, name: str, digest: str) -> bool:
        """Whether this version of the cache is open and whole."""
        with self._lock:
            held = self._held.get(name)
        return held is not None and held.prefix.digest == digest and held.prefix.resident.is_loaded

    @property
    def num_resident(self) -> int:
        """Open caches."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of the open caches."""
        with self._lock:
            return sum(held.prefix.resident.num_bytes for held in self._held.values())

    def drop(self, name: str) -> None:
        """Close `name` as soon as nobody uses it. The next request opens it again, if it exists."""
        with self._lock:
            held = self._held.get(name)
        if held is not None:
            self._retire(name, held)

    def close(self) -> None:
        """Drop all."""
        for name in list(self._held):
            self.drop(name)

    def _take(self, name: str) -> tuple[_Held, float | None]:
        begin = time.perf_counter()
        digest = self._digest(name)
        with self._lock:
            held = self._held.get(name)
            if held is not None and held.prefix.digest == digest:
                held.users += 1
                return held, None
        if digest is None:
            self.drop(name)
        return self._install(name, _Held(self._engine.open(name))), begin

    def _digest(self, name: str) -> str | None:
        """Digest of what `name` means now; None when it means nothing."""
        try:
            ref = self._engine.store.ref(name)
        except EntryNotFound:
            return None
        return None if ref.expired(utc_now()) else ref.manifest

    def _install(self, name: str, opened: _Held) -> _Held:
        """Hold `opened`, unless another thread has opened the same version meanwhile; returns the one to use."""
        with self._lock:
            chosen, surplus = opened, self._held.get(name)
            if surplus is not None and surplus.prefix.digest == opened.prefix.digest:
                chosen, surplus = surplus, opened
            self._held[name] = chosen
            chosen.users += 1
        if surplus is not None:
            self._retire(name, surplus)
        return chosen

    def _retire(self, name: str, held: _Held) -> None:
        with self._lock:
            if self._held.get(name) is held:
                del self._held[name]
            unused = held.users == 0 and not held.retired
            held.retired = True
        if unused:
            held.prefix.close()

    def _give_back(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            unused = held.users == 0 and held.retired
        if unused:
            held.prefix.close()
