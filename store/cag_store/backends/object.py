"""A backend on an object store: s3://, gs://, az://, and memory:// for tests (docs/design/006-object-stores.md).

An object is made by a conditional write where none is; a ref is written over the version that was read under the same
lock. A range is asked of the version whose size was seen, so that a reader never joins two objects.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cag_store.backends.base import Backend, Lease, ObjectInfo, Parts, checked_path, is_path
from cag_store.backends.local import FORMAT_TEXT
from cag_store.backends.object_client import CREATE, ObjectClient, ObjectFacts, ObjectOptions, Version
from cag_store.backends.object_errors import ConditionFailed
from cag_store.backends.object_locks import LOCKS, TEMPORARY, Held, Locks
from cag_store.errors import (
    CorruptEntry,
    EntryChanged,
    EntryNotFound,
    StoreBusy,
    UnsupportedBackend,
    UnsupportedFormat,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_FORMAT = "format"
_TOUCHED = "touched"
_TOUCHABLE = ("chunks", "blobs", "manifests", "refs")
_NEVER = Version('"never"', "0")
_MAX_VERSIONS = 1 << 16
_USE_INTERVAL_S = 60.0
_DELETED_AT_ONCE = 256


class ObjectBackend(Backend):
    """The objects below `url`. Raises: UnsupportedFormat where something else lies; BackendUnavailable."""

    tier = "object-store"

    def __init__(self, url: str, options: ObjectOptions | None = None, store: ObjectStore | None = None) -> None:
        self.url = url.rstrip("/")
        self.options = options or ObjectOptions.from_environment()
        self.parallel_reads, self.read_bytes = self.options.parallel_reads, self.options.read_bytes
        self._client = ObjectClient(self.url, self.options, store)
        self._locks = Locks(self._client, self.options)
        self._versions: OrderedDict[str, Version] = OrderedDict()
        self._uses: dict[str, float] = {}  # when they were last recorded, by a clock of this process
        self._guard = threading.Lock()
        self._scopes = _Scopes()
        self._conditional: bool | None = None  # not known before the first write
        self._is_new = not self._check_format()

    def get(self, path: str, max_bytes: int) -> bytes:
        """See `Backend`."""
        try:
            data, facts = self._client.read(checked_path(path), max_bytes=max_bytes)
        except EntryNotFound:
            self._scopes.saw(path, None)
            raise
        self._scopes.saw(path, facts.version)
        return bytes(data)

    def get_start(self, path: str, length: int) -> tuple[bytes, int]:
        """See `Backend`."""
        if length == 0:
            return b"", self.stat(path).size_bytes
        try:
            data, facts = self._client.read(checked_path(path), 0, length)
        except CorruptEntry:  # an empty object has no range
            return b"", self.stat(path).size_bytes
        self._remember(path, facts.version)
        return bytes(data), facts.size_bytes

    def get_range(self, path: str, offset: int, length: int) -> bytes:
        """See `Backend`."""
        return bytes(self._range(path, offset, length))

    def get_range_into(self, path: str, offset: int, out: memoryview) -> str:
        """See `Backend`."""
        out[:] = self._range(path, offset, len(out))
        return self.tier

    def put_if_absent(self, path: str, parts: Parts) -> bool:
        """See `Backend`."""
        conditional = self._prepare()
        if not conditional and self._exists(path):
            return False
        with contextlib.suppress(ConditionFailed):
            self._client.write(checked_path(path), parts, CREATE if conditional else None)
            self._forget_version(path)
            return True
        return False

    def replace(self, path: str, data: bytes) -> None:
        """See `Backend`. Under a lock, only over what was read under it. Raises: StoreBusy when that has changed."""
        checked_path(path)
        conditional = self._prepare()
        over: Version | str | None = None
        for held in self._scopes.held():
            self._locks.check_fresh(held)
        if conditional and self._scopes.knows(path):
            over = self._scopes.version(path) or CREATE
        try:
            self._client.write(path, [data], over)
        except ConditionFailed:
            raise StoreBusy(f"{self.url}/{path} was changed by somebody else: try again", name=path) from None
        self._scopes.drop(path)
        self._forget_version(path)

    def delete(self, path: str) -> bool:
        """See `Backend`."""
        for held in self._scopes.held():
            self._locks.check_fresh(held)
        if not self._exists(path):
            return False
        touched = [f"{_TOUCHED}/{path}"] if path.startswith(tuple(f"{folder}/" for folder in _TOUCHABLE)) else []
        self._client.delete([path, *touched])
        self._forget_version(path)
        return True

    def delete_all(self, paths: Sequence[str]) -> None:
        """See `Backend`: many in a request."""
        touched = {path for path, _ in self._client.list(_TOUCHED)} if paths else set()
        for first in range(0, len(paths), _DELETED_AT_ONCE):
            batch = paths[first : first + _DELETED_AT_ONCE]
            for held in self._scopes.held():
                self._locks.check_fresh(held)
            self._client.delete_all([*batch, *(mark for path in batch if (mark := f"{_TOUCHED}/{path}") in touched)])
            for path in batch:
                self._forget_version(path)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """See `Backend`."""
        checked_path(prefix)
        touched = {}
        if prefix.split("/")[0] in _TOUCHABLE:
            touched = {path: facts.modified_s for path, facts in self._client.list(f"{_TOUCHED}/{prefix}")}
        for path, facts in self._client.list(prefix):
            if is_path(path):
                modified_s = max(facts.modified_s, touched.get(f"{_TOUCHED}/{path}", 0.0))
                yield ObjectInfo(path, facts.size_bytes, modified_s)

    def stat(self, path: str) -> ObjectInfo:
        """See `Backend`."""
        facts = self._facts(path)
        self._remember(path, facts.version)
        return ObjectInfo(path, facts.size_bytes, facts.modified_s)

    def touch(self, path: str) -> None:
        """See `Backend`: a small object beside it carries the time, as its own can only be changed by writing it."""
        self._facts(path)
        self._client.write(f"{_TOUCHED}/{path}", [b"touched"])

    def record_use(self, path: str) -> None:
        """See `Backend`: beside the object, as `touch`, at most once a minute; not whether the object is there."""
        now = time.monotonic()
        with self._guard:
            if now - self._uses.get(path, float("-inf")) < _USE_INTERVAL_S:
                return
            self._uses[path] = now
        self._client.write(f"{_TOUCHED}/{checked_path(path)}", [b"touched"])

    @contextmanager
    def locked(self, name: str, shared: bool = False, timeout_s: float = 60.0) -> Iterator[None]:
        """See `Backend`. What is read under it is what `replace` then expects to replace."""
        checked_path(f"{LOCKS}/{name}")
        conditional = (shared and not self._is_new) or self._prepare()
        with self._locks.locked(name, shared, timeout_s, conditional) as held, self._scopes.entered(held):
            yield

    def acquire_lease(self, content: dict[str, Any]) -> Lease:
        """See `Backend`."""
        if self._is_new:
            self._prepare()
        return self._locks.lease(content)

    def live_leases(self) -> Sequence[dict[str, Any]]:
        """See `Backend`: leases whose holders died are seen as alive until they expire."""
        return self._locks.live_leases()

    def sweep_temporaries(self, dry_run: bool = False) -> Sequence[ObjectInfo]:
        """See `Backend`."""
        limit = self.now_s() - self.options.expiry_s
        found = [
            ObjectInfo(path, facts.size_bytes, facts.modified_s)
            for path, facts in self._client.list(TEMPORARY)
            if is_path(path) and facts.modified_s < limit
        ]
        if not dry_run:
            self._client.delete([info.path for info in found])
        return found

    def now_s(self) -> float:
        """See `Backend`: the server's clock."""
        return self._locks.now_s()

    def _range(self, path: str, offset: int, length: int) -> memoryview:
        if length == 0:
            self.stat(path)
            return memoryview(b"")
        with self._guard:
            version = self._versions.get(path)
        try:
            data, _ = self._client.read(checked_path(path), offset, length, version=version)
        except ConditionFailed:
            self._forget_version(path)
            where = f"{self.url}/{path}"
            raise EntryChanged(f"{where} was replaced while it was read: open the cache again", where=where) from None
        if len(data) != length:
            where = f"{self.url}/{path}"
            message = f"{where}: ends {length - len(data)} bytes early: it was cut; build the cache again"
            raise CorruptEntry(message, where=where, expected=length, found=len(data))
        return data

    def _facts(self, path: str) -> ObjectFacts:
        return self._client.facts(checked_path(path))

    def _exists(self, path: str) -> bool:
        try:
            self._facts(path)
        except EntryNotFound:
            return False
        return True

    def _remember(self, path: str, version: Version) -> None:
        with self._guard:
            self._versions[path] = version
            self._versions.move_to_end(path)
            if len(self._versions) > _MAX_VERSIONS:
                self._versions.popitem(last=False)

    def _forget_version(self, path: str) -> None:
        with self._guard:
            self._versions.pop(path, None)

    def _prepare(self) -> bool:
        """Write the marker, once, which also shows whether the server heeds conditions. Raises: UnsupportedBackend."""
        if self._conditional is None:
            self._conditional = self._creates_once() and self._updates_only_what_is_there()
        if not self._conditional and not self.options.allow_unconditional:
            raise UnsupportedBackend(
                f"the server of {self.url} ignores conditional writes, so two writers could destroy each other's work: "
                "use another one, or set CAG_ALLOW_UNCONDITIONAL_WRITES=1 when only one process ever writes there",
                where=self.url,
            )
        return self._conditional

    def _creates_once(self) -> bool:
        for _ in range(2):  # the first one may make it
            try:
                self._client.write(_FORMAT, [FORMAT_TEXT.encode("ascii")], CREATE)
            except ConditionFailed:
                return True
        return False

    def _updates_only_what_is_there(self) -> bool:
        try:
            self._client.write(_FORMAT, [FORMAT_TEXT.encode("ascii")], _NEVER)
        except ConditionFailed:
            return True
        return False

    def _check_format(self) -> bool:
        """Whether this is a store; else there is nothing. Raises: UnsupportedFormat for anything else."""
        found = self._marker()
        if found is None:
            foreign = next((path for path, _ in self._client.list(None)), None)
            if foreign is None:
                return False
            found = self._marker()  # of a store that was made since it was looked for
        if found is None:
            raise UnsupportedFormat(
                f"{self.url} is not a store: it holds {foreign!r}, but no object 'format'; name an empty prefix",
                expected=FORMAT_TEXT,
                found=None,
            )
        if found != FORMAT_TEXT:
            raise UnsupportedFormat(
                f"{self.url} says {found!r}; this program reads {FORMAT_TEXT!r}: use the version that wrote it",
                expected=FORMAT_TEXT,
                found=found,
            )
        return True

    def _marker(self) -> str | None:
        try:
            return self.get_start(_FORMAT, 64)[0].decode("ascii", "replace")
        except EntryNotFound:
            return None


class _Scopes(threading.local):
    """The locks that a thread holds, and the versions of what it has read under them; None: it was not there."""

    def __init__(self) -> None:
        self._entered: list[tuple[Held, dict[str, Version | None]]] = []

    @contextmanager
    def entered(self, held: Held) -> Iterator[None]:
        """Around what is done under a lock."""
        self._entered.append((held, {}))
        try:
            yield
        finally:
            self._entered.pop()

    def held(self) -> list[Held]:
        """The locks, the outer ones first."""
        return [held for held, _ in self._entered]

    def saw(self, path: str, version: Version | None) -> None:
        """`path` was read."""
        if self._entered:
            self._entered[-1][1][path] = version

    def knows(self, path: str) -> bool:
        """Whether `path` was read under the innermost lock."""
        return bool(self._entered) and path in self._entered[-1][1]

    def version(self, path: str) -> Version | None:
        """What was read."""
        return self._entered[-1][1][path]

    def drop(self, path: str) -> None:
        """`path` was written."""
        if self._entered:
            self._entered[-1][1].pop(path, None)
