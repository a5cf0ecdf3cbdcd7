"""The contract of backends: named immutable objects, a few mutable ones, locks and leases.
Knows nothing of what they mean.

Paths are relative, `/`-separated and made of `[A-Za-z0-9._-]`. Writing is all or nothing:
a reader sees the whole object
or none, and a process killed while it writes leaves nothing under the object's name.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cag_store.errors import InvalidName

_PATH = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")

Parts = Sequence[bytes | memoryview]

SCRATCH_BYTES = 2 << 12  # a page before and a page behind a range


@dataclass(frozen=True)
class ObjectInfo:
    """Name, size and time (seconds since 1970) of the last write or `touch` of an object."""

    path: str
    size_bytes: int
    modified_s: float


class Lease(AbstractContextManager["Lease"], ABC):
    """Something held until `release`; a process that dies releases it too."""

    @abstractmethod
    def release(self) -> None:
        """Idempotent."""

    def __exit__(self, *exception: object) -> None:
        self.release()


class ReadableBackend(ABC):
    """Where objects are read. All methods may be called from several threads."""

    url: str
    """Where, for messages; without secrets."""
    tier: str
    """What reading from it waits for: "memory", "disk" or "object-store"."""
    parallel_reads: int = 1
    """How many reads at the same time it takes to be read at its full speed."""
    read_bytes: int = 0
    """Reads of less than this are not much sooner than one of it."""

    @abstractmethod
    def get(self, path: str, max_bytes: int) -> bytes:
        """The whole object. Raises: EntryNotFound; CorruptEntry when it is larger than `max_bytes`."""

    @abstractmethod
    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset` on. Raises: EntryNotFound; CorruptEntry when the object ends before."""

    @abstractmethod
    def get_start(self, path: str, length: int) -> tuple[bytes, int]:
        """The first `length` bytes (all, when there are fewer) and the size of the object. Raises: EntryNotFound."""

    def get_range_into(self, path: str, offset: int, out: memoryview) -> str:
        """`get_range` of `len(out)` bytes into `out`, which spares the allocation; returns the tier they came from."""
        out[:] = self.get_range(path, offset, len(out))
        return self.tier

    def read_range(self, path: str, offset: int, length: int, scratch: memoryview) -> tuple[memoryview, str]:
        """`get_range` into a part of `scratch`; that part, and the tier the bytes came from.

        `scratch` is writable, begins at a page, and has `SCRATCH_BYTES` more than `length`, as a backend may have to
        read some bytes around the range.
        """
        data = scratch[:length]
        return data, self.get_range_into(path, offset, data)

    def descriptor(self, path: str, length: int) -> int | None:  # noqa: ARG002
        """A file that holds the object from its first byte on, for reads as `read_range` does them, whose memory,
        offset and length are multiples of a page; the first `length` bytes will be read. Whoever asks closes it. None
        where there is none. Raises: EntryNotFound."""
        return None

    def will_read(self, path: str, length: int) -> None:  # noqa: B027
        """The first `length` bytes of an object are read soon; where that helps, they are fetched meanwhile. Never
        raises."""

    def forget(self, path: str) -> bool:  # noqa: ARG002
        """Drop copies of the object that are kept nearby, as they proved wrong; whether there was one."""
        return False


class Backend(ReadableBackend):
    """Where objects lie."""

    @abstractmethod
    def put_if_absent(self, path: str, parts: Parts) -> bool:
        """Write the concatenated parts unless the object exists; whether it was written. Raises: StoreFull."""

    @abstractmethod
    def replace(self, path: str, data: bytes) -> None:
        """Write the object in one step, whether or not it exists. Raises: StoreFull."""

    @abstractmethod
    def delete(self, path: str) -> bool:
        """Remove the object; whether it was there."""

    def delete_all(self, paths: Sequence[str]) -> None:
        """Remove the objects, in any order; those that are not there are none the less gone."""
        for path in paths:
            self.delete(path)

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects below the folder `prefix`, in no particular order; without what has a name that no object can
        have."""

    @abstractmethod
    def stat(self, path: str) -> ObjectInfo:
        """Size and time of the last write; only `list` has to know of `touch`. Raises: EntryNotFound."""

    def get_start(self, path: str, length: int) -> tuple[bytes, int]:
        """See `ReadableBackend`."""
        size = self.stat(path).size_bytes
        return self.get_range(path, 0, min(length, size)), size

    def now_s(self) -> float:
        """Seconds since 1970 by the clock that `modified_s` is told by."""
        return time.time()

    @abstractmethod
    def touch(self, path: str) -> None:
        """Set the object's time to now, so that `gc` takes it for new. Raises: EntryNotFound."""

    def record_use(self, path: str) -> None:
        """Set the time of an object that may be replaced at any moment, as `touch`, but never at the price of bringing
        an older version back. Nothing where that cannot be done cheaply. Raises: EntryNotFound."""

    @abstractmethod
    def locked(self, name: str, shared: bool = False, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """Hold the lock `name` across processes. Raises: StoreBusy after `timeout_s`."""

    @abstractmethod
    def acquire_lease(self, content: dict[str, Any]) -> Lease:
        """A lease that other processes see in `live_leases` until it is released or this process ends."""

    @abstractmethod
    def live_leases(self) -> Sequence[dict[str, Any]]:
        """The contents of all leases that are held; those of dead processes are removed."""

    def sweep_temporaries(self, dry_run: bool = False) -> Sequence[ObjectInfo]:  # noqa: ARG002
        """Remove leftovers of writers that died; what was, or would be, removed."""
        return []

    def drop_page_cache(self, path: str) -> bool:  # noqa: ARG002
        """Make the next read of the object come from the device; False where that cannot be done."""
        return False


def is_path(path: str) -> bool:
    """Whether an object can have this path."""
    return _PATH.fullmatch(path) is not None


def checked_path(path: str) -> str:
    """`path` when it is a plain relative one. Raises: InvalidName."""
    if not is_path(path):
        raise InvalidName(f"{path!r} is not a path of an object", found=path)
    return path
