"""The tier between a GPU and the disk: caches that were loaded, in pinned memory of the host, within a limit.

A cache that left the device comes back from here as fast as the bus copies, without reading or decoding. Knows sizes
and what makes buffers anew; knows no store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cag.residency.uploads import give_back_pinned


@dataclass(frozen=True)
class HostCopy:
    """A cache in the host's memory, of which it takes `num_bytes` (`cag.residency.uploads.pinned_bytes`). `again` gives
    buffers over it with device memory of their own, nothing sent yet."""

    num_bytes: int
    again: Callable[[], Any]


class HostCopies:
    """Copies by digest, the least recently used forgotten first; safe to use from several threads."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._copies: OrderedDict[str, HostCopy] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        with self._lock:
            return sum(copy.num_bytes for copy in self._copies.values())

    def get(self, digest: str) -> HostCopy | None:
        """The copy of a cache, None if there is none; it counts as used."""
        with self._lock:
            if digest in self._copies:
                self._copies.move_to_end(digest)
            return self._copies.get(digest)

    def put(self, digest: str, copy: HostCopy) -> None:
        """Keep a copy, if it fits into the limit at all; others go where they must."""
        if copy.num_bytes > self.limit_bytes:
            return
        with self._lock:
            self._copies[digest] = copy
            self._copies.move_to_end(digest)
            before = len(self._copies)
            while sum(kept.num_bytes for kept in self._copies.values()) > self.limit_bytes:
                self._copies.popitem(last=False)
            has_room = len(self._copies) < before
        if has_room:
            give_back_pinned()
