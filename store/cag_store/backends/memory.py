"""A backend in memory: for tests, and for caches that need not outlive the process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cag_store.backends.base import Backend, Lease, ObjectInfo, Parts, checked_path
from cag_store.errors import CorruptEntry, EntryNotFound, StoreBusy


class MemoryBackend(Backend):
    """A dictionary of bytes."""

    tier = "memory"

    def __init__(self) -> None:
        self.url = "memory:"
        self._objects: dict[str, tuple[bytes, float]] = {}
        self._leases: dict[int, dict[str, Any]] = {}
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}

    def get(self, path: str, max_bytes: int) -> bytes:
        """See `Backend`."""
        data = self._found(path)[0]
        if len(data) > max_bytes:
            raise CorruptEntry(f"{path}: {len(data)} bytes, expected at most {max_bytes}", where=path)
        return data

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Backend`."""
        data = self._found(path)[0][offset : offset + length]
        if len(data) != length:
            raise CorruptEntry(
                f"{path}: ends {length - len(data)} bytes early", where=path, expected=length, found=len(data)
            )
        return data

    def put_if_absent(self, path: str, parts: Parts) -> bool:
        """See `Backend`."""
        data = b"".join(parts)
        with self._guard:
            if checked_path(path) in self._objects:
                return False
            self._objects[path] = (data, time.time())
            return True

    def replace(self, path: str, data: bytes) -> None:
        """See `Backend`."""
        with self._guard:
            self._objects[checked_path(path)] = (bytes(data), time.time())

    def delete(self, path: str) -> bool:
        """See `Backend`."""
        with self._guard:
            return self._objects.pop(checked_path(path), None) is not None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Backend`."""
        with self._guard:
            found = [
                (path, *item) for path, item in self._objects.items() if path.startswith(f"{checked_path(prefix)}/")
            ]
        return iter([ObjectInfo(path, len(data), modified_s) for path, data, modified_s in found])

    def stat(self, path: str) -> ObjectInfo:
        """See `Backend`."""
        data, modified_s = self._found(path)
        return ObjectInfo(path, len(data), modified_s)

    def touch(self, path: str) -> None:
        """See `Backend`."""
        with self._guard:
            if checked_path(path) not in self._objects:
                raise self._missing(path)
            self._objects[path] = (self._objects[path][0], time.time())

    def record_use(self, path: str) -> None:
        """See `Backend`."""
        self.touch(path)

    @contextmanager
    def locked(self, name: str, shared: bool = False, timeout_s: float = 60.0) -> Iterator[None]:  # noqa: ARG002
        """See `Backend`; shared holders exclude each other too, which is only slower."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        if not lock.acquire(timeout=timeout_s):
            raise StoreBusy(f"the lock {name!r} was held for more than {timeout_s} s", name=name)
        try:
            yield
        finally:
            lock.release()

    def acquire_lease(self, content: dict[str, Any]) -> Lease:
        """See `Backend`."""
        lease = _MemoryLease(self._leases)
        self._leases[id(lease)] = content
        return lease

    def live_leases(self) -> Sequence[dict[str, Any]]:
        """See `Backend`."""
        return list(self._leases.values())

    def _found(self, path: str) -> tuple[bytes, float]:
        with self._guard:
            found = self._objects.get(checked_path(path))
        if found is None:
            raise self._missing(path)
        return found

    def _missing(self, path: str) -> EntryNotFound:
        return EntryNotFound(f"there is no {path} in {self.url}", path=path)


class _MemoryLease(Lease):
    def __init__(self, leases: dict[int, dict[str, Any]]) -> None:
        self._leases = leases

    def release(self) -> None:
        """See `Lease`."""
        self._leases.pop(id(self), None)
