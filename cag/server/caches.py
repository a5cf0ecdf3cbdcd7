"""Caches that stay open between requests, counted by who uses them.

A cache is opened by its first request and stays, as long as its name means it. When that means another manifest,
requests from then on use the new one; the old one is closed when its last request has ended. Sessions go on with the
version that they were opened with: it is held beside the new one. Within a limit of bytes, a cache that needs room
closes those that nobody uses before it takes any, the ones first that cost least to load again for the bytes they hold
and were used longest ago; where the machine has less than the limit, too. What several names mean is in memory once,
and counts once. Safe to use from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from cag.engine import Engine
from cag.errors import InsufficientResources
from cag.first_steps import record_first_steps
from cag.prefix import Prefix
from cag.server.queues import queue_full
from cag.server.tenants import CacheKey
from cag_store import Manifest, utc_now
from cag_store.backends import Lease
from cag_store.errors import EntryNotFound, StoreError, StoreFull

RETRY_S = 1  # a cache in use is given back with the answer that uses it


@dataclass(eq=False)
class _Held:
    """An open prefix with the number of requests that use it; a retired one is closed with the last of them."""

    prefix: Prefix
    users: int = 0
    retired: bool = False
    worth: float = 0.0  # the least goes first

    @property
    def num_bytes(self) -> int:
        """Of its keys and values."""
        return self.prefix.resident.num_bytes

    @property
    def cost(self) -> float:
        """Seconds that loading it again would take, a byte of it; all are alike until they are loaded."""
        return self.prefix.resident.load_s / max(1, self.num_bytes)

    def serves(self, digest: str | None) -> bool:
        """Whether it is this version, and no load that has failed."""
        return self.prefix.digest == digest and not self.prefix.resident.has_failed


@dataclass(frozen=True)
class _Wanted:
    """What is to be opened: `name` in an engine's store, or a `version` of it, to be held as `held_as`."""

    held_as: CacheKey
    engine: Engine
    name: str
    version: Manifest | None


@dataclass(frozen=True)
class CacheUse:
    """A prefix for one request. `opened_at`: `time.perf_counter()` before it was opened, None if it was open before."""

    prefix: Prefix
    opened_at: float | None


class ResidentCaches:
    """The open caches of a server; `max_bytes` of them, keys and values counted, None for no limit.

    `find` says of a cache's key which engine opens it, and by what name.

    What a cache is worth is GreedyDual's: its cost a byte, above the worth of the last one that had to go.
    Source: Cao and Irani, Cost-aware WWW proxy caching algorithms, USITS 1997.
    """

    def __init__(self, find: Callable[[CacheKey], tuple[Engine, str]], max_bytes: int | None = None) -> None:
        self._find = find
        self._max_bytes = max_bytes
        self._level = 0.0  # worth of the last cache that was closed for room
        self.num_evicted = 0
        self._held: dict[CacheKey, _Held] = {}
        self._leaving: list[_Held] = []  # retired, and still in use
        self._lock = threading.Lock()
        self._room = threading.Lock()

    @contextmanager
    def use(self, key: CacheKey, version: Manifest | None = None) -> Iterator[CacheUse]:
        """What `key` means now, or `version` whatever it means, open at least until the block ends.

        Raises:
            CacheNotFound, CacheMismatch, StoreError: as `Engine.open`. A cache that fails while it is used, or that
                could not be loaded, is retired, so that the next request loads it again.
            InsufficientResources: the cache is larger than all that may be resident, or than the memory that is free
                when all are closed that nobody uses.
            QueueFull: those in use leave no room for it now.
        """
        held_as = key if version is None else self._held_as(key, version)
        held, opened_at = self._take(held_as, key, version)
        try:
            yield CacheUse(held.prefix, opened_at)
        except StoreError:
            self._retire(held_as, held)
            raise
        finally:
            if held.prefix.resident.has_failed:
                self._retire(held_as, held)
            self._give_back(held)

    def check(self, key: CacheKey) -> None:
        """Open nothing. Raises: CacheNotFound, StoreError: `key` means nothing that could be opened."""
        engine, name = self._find(key)
        if _digest(engine, name) is None:
            engine.find(name)

    def load(self, key: CacheKey) -> None:
        """Make a cache resident; returns when all of it is there and a first question would find its steps recorded.
        Raises as `use`."""
        with self.use(key) as use:
            record_first_steps(use.prefix.model, use.prefix.resident)

    def is_resident(self, key: CacheKey, digest: str) -> bool:
        """Whether this version of the cache is open and whole."""
        with self._lock:
            held = self._held.get(key)
        return held is not None and held.serves(digest) and held.prefix.resident.is_loaded

    @property
    def num_resident(self) -> int:
        """Open caches."""
        return len(self._held)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values of the open caches."""
        with self._lock:
            return self._bytes_held()

    def drop(self, key: CacheKey) -> None:
        """Close `key` as soon as nobody uses it. The next request opens it again, if it exists."""
        with self._lock:
            held = self._held.get(key)
        if held is not None:
            self._retire(key, held)

    def drop_version(self, key: CacheKey, digest: str) -> None:
        """As `drop`, for a version that is not what `key` means."""
        self.drop(_versioned(key, digest))

    def drop_outdated(self) -> None:
        """Close what nobody uses and its name does not mean any more: it has expired, or was removed or built again by
        another process."""
        with self._lock:
            unused = {key: held for key, held in self._held.items() if held.users == 0}
        for key, held in unused.items():
            with suppress(StoreError):  # a version of its own, which sessions drop; or a store that cannot be read now
                if _digest(*self._find(key)) != held.prefix.digest:
                    self._retire(key, held)

    def lease(self, key: CacheKey, digest: str) -> Lease | None:
        """Hold the files of a version against `gc`; None on a store that may only be read."""
        with suppress(StoreFull):
            return self._find(key)[0].store.lease(digest)
        return None

    def close(self) -> None:
        """Drop all."""
        for key in list(self._held):
            self.drop(key)

    def _held_as(self, key: CacheKey, version: Manifest) -> CacheKey:
        """What `version` is held as: by the name, as long as that means it."""
        versioned = _versioned(key, version.digest)
        with self._lock:
            held = self._held.get(key)
            if held is not None and held.prefix.digest == version.digest:
                return key
            if versioned in self._held:
                return versioned
        with suppress(StoreError):  # of the name: nothing of this version is wrong
            return key if _digest(*self._find(key)) == version.digest else versioned
        return versioned

    def _take(self, held_as: CacheKey, key: CacheKey, version: Manifest | None) -> tuple[_Held, float | None]:
        begin = time.perf_counter()
        engine, name = self._find(key)
        digest = _digest(engine, name) if version is None else version.digest
        with self._lock:
            held = self._held.get(held_as)
            if held is not None and held.serves(digest):
                held.users += 1
                return held, None
        if held is not None and (digest is None or held.prefix.resident.has_failed):
            self._retire(held_as, held)
        return self._open(_Wanted(held_as, engine, name, version)), begin

    def _open(self, wanted: _Wanted) -> _Held:
        """Where memory is short, others that nobody uses are closed one by one. Raises: as `use`."""
        while True:
            try:
                with ExitStack() as until_held:
                    make_room = partial(self._make_room, wanted, until_held)
                    prefix = wanted.engine.open(wanted.name, version=wanted.version, make_room=make_room)
                    return self._install(wanted.held_as, _Held(prefix))
            except InsufficientResources as error:
                if "limit_bytes" in error.facts or not self._close_unused():
                    raise

    def _make_room(self, wanted: _Wanted, until_held: ExitStack, manifest: Manifest, needed: int) -> None:
        """Close caches that nobody uses until `needed` bytes fit, which no other thread takes before the end of
        `until_held`. Raises: InsufficientResources with the fact `limit_bytes`, QueueFull."""
        if self._max_bytes is None:
            return
        if needed > self._max_bytes:
            raise InsufficientResources(
                f"cache {wanted.name!r} takes {needed:,} bytes, more than {self._max_bytes:,} that may be resident.",
                hint="Raise --max-resident-bytes, or build it with a smaller codec.",
                limit_bytes=self._max_bytes,
            )
        until_held.enter_context(self._room)
        if wanted.engine.is_open(manifest):  # another thread has opened it meanwhile: it is the same memory
            return
        while (victim := self._victim(wanted, needed)) is not None:
            self._evict(victim)

    def _bytes_held(self) -> int:
        """Of all that is open, what only waits for its last request included. The lock is held by the caller."""
        return _bytes_of((*self._held.values(), *self._leaving))

    def _victim(self, wanted: _Wanted, needed: int) -> CacheKey | None:
        """Whom to close next so that `needed` bytes fit; None if they do."""
        assert self._max_bytes is not None
        with self._lock:
            held, spare = self._held.get(wanted.held_as), self._spare()
            if held is not None and held.users == 0:  # the older version goes anyway
                return wanted.held_as
            missing = self._bytes_held() + needed - self._max_bytes
            if missing <= 0:
                return None
            if _bytes_of(self._held[key] for key in spare) < missing:
                raise queue_full(
                    f"the caches in use leave no room for {wanted.name!r} within {self._max_bytes:,} bytes.", RETRY_S
                )
            return self._least(spare)

    def _spare(self) -> dict[CacheKey, float]:
        """What can be closed and what it is worth: nobody uses its memory, by this name or another. The lock is held
        by the caller."""
        used = {id(held.prefix.resident) for held in (*self._held.values(), *self._leaving) if held.users}
        unused = {key: held for key, held in self._held.items() if id(held.prefix.resident) not in used}
        worth: dict[int, float] = {}
        for held in unused.values():
            place = id(held.prefix.resident)
            worth[place] = max(held.worth, worth.get(place, held.worth))
        return {key: worth[id(held.prefix.resident)] for key, held in unused.items()}

    def _least(self, spare: dict[CacheKey, float]) -> CacheKey:
        """What goes first; from now on all others are worth at least as much. The lock is held by the caller."""
        victim = min(spare, key=lambda key: spare[key])
        self._level = max(self._level, spare[victim])
        return victim

    def _close_unused(self) -> bool:
        """Close what is worth least of all that nobody uses, and wait until its memory is free; False if there is
        nothing."""
        with self._lock:
            spare = self._spare()
            victim = self._least(spare) if spare else None
            held = None if victim is None else self._held[victim]
        if victim is None or held is None:
            return False
        self._evict(victim)
        held.prefix.resident.wait_quietly()  # until then it may be written to
        return True

    def _evict(self, key: CacheKey) -> None:
        self.num_evicted += 1
        self.drop(key)

    def _install(self, key: CacheKey, opened: _Held) -> _Held:
        """Hold `opened`, unless another thread has opened the same version meanwhile; returns the one to use."""
        with self._lock:
            chosen, surplus = opened, self._held.get(key)
            if surplus is not None and surplus.serves(opened.prefix.digest):
                chosen, surplus = surplus, opened
            self._held[key] = chosen
            chosen.users += 1
        if surplus is not None:
            self._retire(key, surplus)
        return chosen

    def _retire(self, key: CacheKey, held: _Held) -> None:
        with self._lock:
            if self._held.get(key) is held:
                del self._held[key]
            unused = held.users == 0 and not held.retired
            if held.users and not held.retired:
                self._leaving.append(held)
            held.retired = True
        if unused:
            held.prefix.close()

    def _give_back(self, held: _Held) -> None:
        with self._lock:
            held.users -= 1
            held.worth = self._level + held.cost
            unused = held.users == 0 and held.retired
            if unused and held in self._leaving:
                self._leaving.remove(held)
        if unused:
            held.prefix.close()


def _bytes_of(held: Iterable[_Held]) -> int:
    """Of keys and values; of what several share, once."""
    return sum({id(one.prefix.resident): one.num_bytes for one in held}.values())


def _digest(engine: Engine, name: str) -> str | None:
    """Digest of what `name` means now; None when it means nothing."""
    try:
        ref = engine.store.ref(name)
    except EntryNotFound:
        return None
    return None if ref.expired(utc_now()) else ref.manifest


def _versioned(key: CacheKey, digest: str) -> CacheKey:
    """No name of a cache has an `@`."""
    return CacheKey(key.tenant, f"{key.name}@{digest}")
