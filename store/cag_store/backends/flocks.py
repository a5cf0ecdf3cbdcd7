"""Locks and leases of a local directory through `flock`: the kernel lets go of them when their process dies, kill -9
included.

POSIX only, and only as good as the file system's `flock` (local ones, NFS since Linux 2.6.12).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cag_store.backends.base import Lease
from cag_store.errors import CorruptEntry, StoreBusy
from cag_store.jsontext import parse_object

_POLL_S = 0.01
_MAX_LEASE_BYTES = 1 << 20


@contextmanager
def held(path: Path, shared: bool, timeout_s: float) -> Iterator[None]:
    """Hold the lock file `path`, made when missing. Raises: StoreBusy, OSError.

    Everybody waits behind `path.queue`, so that those who share the lock do not keep out for ever who wants it alone.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with _locked(path.with_name(f"{path.name}.queue"), kind, deadline):
            stack.enter_context(_locked(path, kind, deadline))
        yield


@contextmanager
def _locked(path: Path, kind: int, deadline: float) -> Iterator[None]:
    descriptor, holder = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), os.getpid()
    try:
        while not _try_lock(descriptor, kind):
            if time.monotonic() > deadline:
                raise StoreBusy(
                    f"another process held the lock {path} for too long: try again when it is done", path=str(path)
                )
            time.sleep(_POLL_S)
        yield
    finally:
        if os.getpid() == holder:  # closing is not enough where a process was forked meanwhile, which has it open too
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def locked_temporary(directory: Path) -> tuple[Path, int]:
    """A new, flocked file in `directory` and its descriptor: `remove_unlocked` leaves it alone while it is open."""
    while True:
        path = directory / f"{uuid.uuid4().hex}.json"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # not swept between the two lines above
                return path, descriptor
        except BaseException:
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        os.close(descriptor)


def remove_unlocked(directory: Path, dry_run: bool) -> list[tuple[Path, os.stat_result]]:
    """Remove the files of `locked_temporary` in `directory` that no process holds; what was, or would be, removed."""
    removed = []
    for path in _ours(directory):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, IsADirectoryError):
            continue
        try:
            if _try_lock(descriptor, fcntl.LOCK_EX):
                removed.append((path, os.fstat(descriptor)))
                if not dry_run:
                    path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
    return removed


class FileLease(Lease):
    """A file in `directory` that stays flocked until `release`; `temporary` is a folder for `locked_temporary`. It is
    the process' that made it: one that was forked from it leaves the file where it is."""

    def __init__(self, directory: Path, temporary: Path, content: dict[str, Any]) -> None:
        self._descriptor: int | None = None  # what was not made has nothing to close
        hidden, descriptor = locked_temporary(temporary)
        self._path = directory / hidden.name
        try:
            os.write(descriptor, json.dumps(content).encode("utf-8"))
            hidden.rename(self._path)  # locked before anybody can see it
        except BaseException:
            hidden.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        self._descriptor, self._holder = descriptor, os.getpid()

    def release(self) -> None:
        """See `Lease`."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            if os.getpid() == self._holder:
                with contextlib.suppress(OSError):  # a lease file that stays behind is stale, and gc removes it
                    self._path.unlink()
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()


def live_leases(directory: Path) -> list[dict[str, Any]]:
    """Contents of the leases in `directory` whose processes live; the others are removed.

    A lease that cannot be read counts as one for everything: `{"kind": "build"}`.
    """
    remove_unlocked(directory, dry_run=False)
    found = []
    for path in _ours(directory):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError), path.open("rb") as stream:
            found.append(_content(stream.read(_MAX_LEASE_BYTES)))
    return found


def _ours(directory: Path) -> list[Path]:
    """What `locked_temporary` makes in a folder; anything else there is somebody else's. Raises: OSError where the
    folder is there and cannot be listed."""
    with contextlib.suppress(FileNotFoundError):
        return [path for path in directory.iterdir() if path.suffix == ".json" and not path.name.startswith(".")]
    return []


def _content(data: bytes) -> dict[str, Any]:
    try:
        return parse_object(data, "lease")
    except CorruptEntry:
        return {"kind": "build"}


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
