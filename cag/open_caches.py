"""The caches that are open over one store: a resident copy of each, shared by all handles of it.

Knows residents and readers; opens nothing. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cag.residency.resident import ResidentPrefix
    from cag_store import CacheReader, Manifest


@dataclass(eq=False)
class OpenCache:
    """A resident cache, the reader whose lease keeps its files, and how many handles use it."""

    manifest: Manifest
    resident: ResidentPrefix
    reader: CacheReader
    num_users: int = 1

    def close(self) -> None:
        """Load no further, and let go of the files."""
        self.resident.give_up()
        self.reader.close()


class OpenCaches:
    """Resident copies by the digests of their manifests. One that could not be loaded is found no more; those that use
    it give it back as any other."""

    def __init__(self) -> None:
        self._found: dict[str, OpenCache] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return self._copy(digest) is not None

    def use(self, digest: str) -> OpenCache | None:
        """The copy for one more user, None if there is none."""
        with self._lock:
            found = self._copy(digest)
            if found is not None:
                found.num_users += 1
            return found

    def add(self, opened: OpenCache) -> OpenCache:
        """What was just opened, or the copy that somebody else has opened meanwhile: then `opened` is closed."""
        with self._lock:
            found = self._copy(opened.manifest.digest)
            if found is None:
                self._found[opened.manifest.digest] = opened
                return opened
            found.num_users += 1
        opened.close()
        return found

    def give_back(self, opened: OpenCache) -> None:
        """One user less; the last one closes it."""
        with self._lock:
            opened.num_users -= 1
            if opened.num_users:
                return
            if self._found.get(opened.manifest.digest) is opened:
                del self._found[opened.manifest.digest]
        opened.close()

    def _copy(self, digest: str) -> OpenCache | None:
        found = self._found.get(digest)
        return None if found is None or found.resident.has_failed else found
