"""Requests to an object store through obstore: bounded in time, retried, and never answered with fewer bytes than
asked for. Knows paths and bytes; neither locks nor what a store keeps.

obstore retries what is safe to repeat: 5xx, lost connections, timeouts of reads, and bodies that break off. What is
added here: a body that ends early in agreement with its own headers is asked for again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
from obstore.store import MemoryStore, from_url

from cag_store.backends.base import Parts
from cag_store.backends.object_errors import RANGE_BEYOND_END, status_of, translated
from cag_store.errors import BackendUnavailable, CorruptEntry

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

CREATE = "create"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_SHORT_BODIES = 3


@dataclass(frozen=True)
class ObjectOptions:
    """How requests are made, and how long locks and leases last.

    Attributes:
        connect_timeout_s: until a connection stands.
        read_timeout_s: silence of the server while something is read.
        request_timeout_s: a whole request, its body included.
        max_retries: of one request.
        backoff_s: before the first retry; doubled for each further one.
        retry_window_s: no retry begins later than this after the first try.
        parallel_reads: requests in flight while a cache is loaded.
        read_bytes: of one such request, where that many neighbouring layers are wanted.
        heartbeat_s: between renewals of locks and leases.
        expiry_s: a lock or lease that was not renewed for so long is nobody's.
        fence_s: under a lock that could not be renewed for so long nothing is changed any more.
        allow_unconditional: write to servers that ignore conditions; then only one process may write at a time.
    """

    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    request_timeout_s: float = 300.0
    max_retries: int = 6
    backoff_s: float = 0.1
    retry_window_s: float = 60.0
    parallel_reads: int = 16
    read_bytes: int = 4 << 20
    heartbeat_s: float = 15.0
    expiry_s: float = 180.0
    fence_s: float = 60.0
    allow_unconditional: bool = False

    @classmethod
    def from_environment(cls) -> ObjectOptions:
        """The defaults, and `CAG_ALLOW_UNCONDITIONAL_WRITES=1`."""
        return cls(allow_unconditional=os.environ.get("CAG_ALLOW_UNCONDITIONAL_WRITES") == "1")


class Version(NamedTuple):
    """What tells one content of an object from the next; which of the two is set depends on the server."""

    e_tag: str | None
    version: str | None

    @classmethod
    def of(cls, facts: Any) -> Version:
        """Of the facts that obstore tells about an object or a write."""
        return cls(facts["e_tag"], facts["version"])


@dataclass(frozen=True)
class ObjectFacts:
    """Size, time of the last write by the server's clock, and version of an object."""

    size_bytes: int
    modified_s: float
    version: Version

    @classmethod
    def of(cls, meta: Any) -> ObjectFacts:
        """Of obstore's metadata."""
        return cls(meta["size"], meta["last_modified"].timestamp(), Version.of(meta))


class ObjectClient:
    """Requests below one URL. All methods may be called from several threads; each raises what `translated` raises."""

    def __init__(self, url: str, options: ObjectOptions, store: ObjectStore | None = None) -> None:
        self.url = url
        self._options = options
        with translated(url):
            shared = store or (MemoryStore() if url.startswith("memory:") else None)
            self._reads = shared or _connected(url, options, reading=True)
            self._writes = shared or _connected(url, options, reading=False)

    def read(
        self,
        path: str,
        start: int | None = None,
        length: int = 0,
        *,
        version: Version | None = None,
        max_bytes: int | None = None,
    ) -> tuple[memoryview, ObjectFacts]:
        """The object, or from `start` on `length` bytes of it, fewer only where it ends.

        With `version`, only that one. Raises: CorruptEntry when it ends before `start`, or has more than `max_bytes`;
        ConditionFailed.
        """
        wanted: dict[str, Any] = {} if start is None else {"range": (start, start + length)}
        if version is not None and version.e_tag is not None:
            wanted["if_match"] = version.e_tag
        for attempt in range(_SHORT_BODIES):
            time.sleep(self._options.backoff_s * attempt)
            with translated(self._where(path)):
                try:
                    result = obstore.get(self._reads, path, options=wanted)  # type: ignore[arg-type]
                except Exception as error:
                    if start is None or not self._ends_before(path, start, error):
                        raise
                    raise self._too_short(path, start) from None
                facts = ObjectFacts.of(result.meta)
                if max_bytes is not None and facts.size_bytes > max_bytes:
                    raise self._too_large(path, facts.size_bytes, max_bytes)
                begin, end = (0, facts.size_bytes) if start is None else (start, min(start + length, facts.size_bytes))
                data = memoryview(result.bytes())
            if result.range == (begin, end) and len(data) == end - begin:
                return data, facts
        raise BackendUnavailable(
            f"{self._where(path)}: the server sends {len(data)} bytes where {end - begin} were asked for",
            where=path,
            expected=end - begin,
            found=len(data),
        )

    def facts(self, path: str) -> ObjectFacts:
        """Size, time and version. Raises: EntryNotFound."""
        with translated(self._where(path)):
            return ObjectFacts.of(obstore.head(self._reads, path))

    def write(self, path: str, parts: Parts, over: Version | str | None = None) -> Version:
        """Write the object in one step: whatever is there, only where nothing is (`CREATE`), or only over a version.

        Raises: ConditionFailed, StoreFull.
        """
        mode: Any = _without_none(over._asdict()) if isinstance(over, Version) else over or "overwrite"
        with translated(self._where(path), writing=True):
            return Version.of(obstore.put(self._writes, path, b"".join(parts), mode=mode, use_multipart=False))

    def delete(self, paths: Sequence[str]) -> None:
        """Remove the objects; those that are not there are none the less gone."""
        for path in paths:
            with translated(self._where(path), writing=True):
                try:
                    obstore.delete(self._writes, path)
                except FileNotFoundError:
                    continue

    def delete_all(self, paths: Sequence[str]) -> None:
        """`delete` by as few requests as the server has for many."""
        with translated(self.url, writing=True):
            try:
                obstore.delete(self._writes, list(paths))
            except FileNotFoundError:  # some servers say it of each
                self.delete(paths)

    def list(self, prefix: str | None) -> Iterator[tuple[str, ObjectFacts]]:
        """Path and facts of all objects below the folder `prefix`; None: of all."""
        with translated(self._where(prefix or "")):
            for batch in obstore.list(self._reads, prefix, chunk_size=1000):
                for meta in batch:
                    yield meta["path"], ObjectFacts.of(meta)

    def _where(self, path: str) -> str:
        return f"{self.url}/{path}"

    def _ends_before(self, path: str, start: int, error: Exception) -> bool:
        """Whether a range was refused because the object ends before it."""
        if isinstance(error, FileNotFoundError) or status_of(error) not in (None, RANGE_BEYOND_END):
            return False
        return self.facts(path).size_bytes <= start

    def _too_short(self, path: str, start: int) -> CorruptEntry:
        where = self._where(path)
        return CorruptEntry(f"{where}: ends before byte {start}: it was cut; build the cache again", where=where)

    def _too_large(self, path: str, found: int, expected: int) -> CorruptEntry:
        where = self._where(path)
        message = f"{where}: {found} bytes, expected at most {expected}"
        return CorruptEntry(message, where=where, expected=expected, found=found)


def _without_none(version: dict[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in version.items() if value is not None}


def _connected(url: str, options: ObjectOptions, *, reading: bool) -> ObjectStore:
    """A store of obstore; credentials and endpoint come from the environment. An upload is silent for as long as it
    takes, so only reads have a limit on silence."""
    client: ClientConfig = {
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "timeout": timedelta(seconds=options.request_timeout_s),
    }
    if reading:
        client["read_timeout"] = timedelta(seconds=options.read_timeout_s)
    if any(os.environ.get(name, "").startswith("http://") for name in _ENDPOINTS):
        client["allow_http"] = True
    retries: RetryConfig = {
        "max_retries": options.max_retries,
        "retry_timeout": timedelta(seconds=options.retry_window_s),
        "backoff": {
            "init_backoff": timedelta(seconds=options.backoff_s),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    return from_url(url, client_options=client, retry_config=retries)
