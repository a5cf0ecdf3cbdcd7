"""Locks and leases of an object store, which has no flock: small objects that their holders renew.

Who holds something writes its object again every `heartbeat_s`; one that was not renewed for `expiry_s` is nobody's.
Times are compared by the server's clock alone. An exclusive lock is one object, made where none is. A shared holder
writes an object of its own and then looks for the exclusive one; an exclusive holder writes the lock and then waits for
the shared ones to go: whoever comes second sees the first. What happens under a lock that its holder could not renew is
stopped by `check_fresh`.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cag_store.backends.base import Lease, is_path
from cag_store.backends.object_client import CREATE, ObjectClient, ObjectOptions, Version
from cag_store.backends.object_errors import ConditionFailed
from cag_store.errors import CorruptEntry, EntryNotFound, StoreBusy, StoreError
from cag_store.jsontext import parse_object

LEASES, LOCKS, TEMPORARY = "leases", "locks", "tmp"
_MAX_BYTES = 1 << 20  # of a lock or lease
_POLL_S = 0.05
_LOOK_AGAIN_S = 5.0  # a holder found dead is only found so by asking the server for the time


class Held:
    """An object that the process `holder` keeps alive. `renewed_at` is of the clock that goes on while a machine
    sleeps."""

    def __init__(self, path: str, content: dict[str, Any], version: Version | None) -> None:
        self.path = path
        self.holder = os.getpid()
        self.content = content
        self.version = version
        self.renewed_at = boot_time_s()
        self.lost = False

    def to_bytes(self) -> bytes:
        """The object; each renewal differs, so that versions made of the content differ too."""
        return json.dumps({**self.content, "renewal": uuid.uuid4().hex}).encode("utf-8")


class Locks:
    """Locks and leases below one URL."""

    def __init__(self, client: ObjectClient, options: ObjectOptions) -> None:
        self._client = client
        self._options = options
        self._held: dict[str, Held] = {}
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextmanager
    def locked(self, name: str, shared: bool, timeout_s: float, conditional: bool) -> Iterator[Held]:
        """Hold the lock `name`. Raises: StoreBusy, StoreFull."""
        deadline = time.monotonic() + timeout_s
        held = self._share(name, deadline) if shared else self._exclude(name, deadline, conditional)
        try:
            yield held
        finally:
            self.let_go(held)

    def lease(self, content: dict[str, Any]) -> Lease:
        """A lease that lives until it is released, or its process has been dead for `expiry_s`. Raises: StoreFull."""
        return ObjectLease(self, self._hold(f"{LEASES}/{uuid.uuid4().hex}.json", {"content": content}))

    def live_leases(self) -> list[dict[str, Any]]:
        """Contents of the leases that are alive; the others are removed. One that cannot be read holds everything."""
        found, limit = [], self.now_s() - self._options.expiry_s
        for path, facts in list(self._client.list(LEASES)):
            if not is_path(path):
                continue
            if facts.modified_s < limit:
                self._client.delete([path])
                continue
            with contextlib.suppress(EntryNotFound):
                found.append(_lease_content(self._content(path)))
        return found

    def check_fresh(self, held: Held) -> None:
        """Raises: StoreBusy when the lock may be somebody else's by now."""
        if held.lost or boot_time_s() - held.renewed_at > self._options.fence_s:
            raise StoreBusy(
                f"the lock {held.path!r} was lost while it was held: the server or this machine was away for too long; "
                "try again",
                name=held.path,
            )

    def let_go(self, held: Held) -> None:
        """Give up what is held. Idempotent; what cannot be removed expires. A process that was forked from the holder
        leaves it as it is: neither the guard nor the client's threads came along."""
        if os.getpid() != held.holder:
            return
        with self._guard:
            if self._held.pop(held.path, None) is None:
                return
        with contextlib.suppress(StoreError):
            self.check_fresh(held)
            self._client.delete([held.path])

    def now_s(self) -> float:
        """Seconds since 1970 by the server's clock: the time of an object that is written for it."""
        path = f"{TEMPORARY}/{uuid.uuid4().hex}"
        self._client.write(path, [b"now"])
        try:
            return self._client.facts(path).modified_s
        finally:
            self._client.delete([path])

    def _exclude(self, name: str, deadline: float, conditional: bool) -> Held:
        """Take the lock object, then wait for those who share."""
        path, look_at = f"{LOCKS}/{name}", 0.0
        while True:
            held = self._take(path, None, conditional)
            if held is None and time.monotonic() >= look_at:
                held = self._take_over(path, conditional)
                look_at = time.monotonic() + _LOOK_AGAIN_S
            if held is not None:
                break
            _wait(name, deadline)
        try:
            self._wait_for_sharers(name, deadline)
        except BaseException:
            self.let_go(held)
            raise
        return held

    def _share(self, name: str, deadline: float) -> Held:
        """Write a marker, then look for the lock object."""
        while True:
            held = self._hold(f"{LOCKS}/{name}.shared/{uuid.uuid4().hex}", _owner())
            if not self._is_alive(f"{LOCKS}/{name}"):
                return held
            self.let_go(held)
            _wait(name, deadline)

    def _wait_for_sharers(self, name: str, deadline: float) -> None:
        while True:
            markers = list(self._client.list(f"{LOCKS}/{name}.shared"))
            if markers:
                limit = self.now_s() - self._options.expiry_s
                self._client.delete([path for path, facts in markers if facts.modified_s < limit])
                markers = [marker for marker in markers if marker[1].modified_s >= limit]
            if not markers:
                return
            _wait(name, deadline)

    def _take(self, path: str, over: Version | None, conditional: bool) -> Held | None:
        """Write the lock object where none is, or over a dead one; None when somebody else was sooner."""
        held = Held(path, _owner(), None)
        if not conditional and over is None and self._is_alive(path):
            return None
        try:
            held.version = self._client.write(path, [held.to_bytes()], (over or CREATE) if conditional else None)
        except ConditionFailed:
            # Perhaps this very request, the answer to which was lost and which was sent again.
            if self._content(path, missing={}).get("owner") != held.content["owner"]:
                return None
            held.version = self._client.facts(path).version
        return self._watch(held)

    def _take_over(self, path: str, conditional: bool) -> Held | None:
        try:
            facts = self._client.facts(path)
        except EntryNotFound:
            return None
        if facts.modified_s >= self.now_s() - self._options.expiry_s:
            return None
        return self._take(path, facts.version, conditional)

    def _is_alive(self, path: str) -> bool:
        try:
            facts = self._client.facts(path)
        except EntryNotFound:
            return False
        return facts.modified_s >= self.now_s() - self._options.expiry_s

    def _own_version(self, held: Held) -> Version | None:
        """The version of the object when it is still the holder's: the answer to an earlier renewal was lost."""
        try:
            facts = self._client.facts(held.path)
            mine = self._content(held.path).get("owner") == held.content["owner"]
        except StoreError:
            return None
        return facts.version if mine else None

    def _hold(self, path: str, content: dict[str, Any]) -> Held:
        """Write and keep alive an object whose name is nobody else's."""
        held = Held(path, content, None)
        self._client.write(path, [held.to_bytes()])
        return self._watch(held)

    def _content(self, path: str, missing: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            return parse_object(bytes(self._client.read(path, max_bytes=_MAX_BYTES)[0]), path)
        except EntryNotFound:
            if missing is None:
                raise
            return missing
        except CorruptEntry:
            return {}

    def _watch(self, held: Held) -> Held:
        with self._guard:
            self._held[held.path] = held
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._renew_all, name="cag-heartbeat", daemon=True)
                self._thread.start()
        return held

    def _renew_all(self) -> None:
        """The heartbeat's thread: ends when nothing has been held for a beat."""
        while True:
            time.sleep(self._options.heartbeat_s)
            with self._guard:
                held = list(self._held.values())
                if not held:
                    self._thread = None
                    return
            for one in held:
                self.renew(one)

    def renew(self, held: Held) -> None:
        """Write what is held again. It is lost when somebody else has written it."""
        begun_at = boot_time_s()
        try:
            version = self._client.write(held.path, [held.to_bytes()], held.version)
        except (ConditionFailed, EntryNotFound):
            found = self._own_version(held)
            if found is None:
                held.lost = True
                return
            version = found
        except StoreError:
            return  # tried again at the next beat; `check_fresh` knows how old it is
        held.renewed_at = begun_at
        if held.version is not None:
            held.version = version
        with self._guard:
            gone = held.path not in self._held
        if gone:  # let go while it was being written
            with contextlib.suppress(StoreError):
                self._client.delete([held.path])


class ObjectLease(Lease):
    """A lease as an object."""

    def __init__(self, locks: Locks, held: Held) -> None:
        self._locks = locks
        self._held = held

    def release(self) -> None:
        """See `Lease`."""
        self._locks.let_go(self._held)


def boot_time_s() -> float:
    """A clock that is never set, and goes on while the machine sleeps where the system has such a one."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _owner() -> dict[str, Any]:
    return {"owner": uuid.uuid4().hex, "pid": os.getpid(), "host": socket.gethostname()}


def _lease_content(value: dict[str, Any]) -> dict[str, Any]:
    content = value.get("content")
    return content if isinstance(content, dict) else {"kind": "build"}


def _wait(name: str, deadline: float) -> None:
    """Raises: StoreBusy when the time is up."""
    if time.monotonic() > deadline:
        raise StoreBusy(
            f"another process holds the lock {name!r}, or died with it a short while ago: try again", name=name
        )
    time.sleep(_POLL_S)
