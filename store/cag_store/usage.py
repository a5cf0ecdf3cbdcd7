"""Who holds what in a store, and when it was last used. What several caches hold is counted once.

In: refs, manifests and the sizes of objects. Out: own and shared bytes of each cache. Knows nothing of worth or limits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cag_store.backends import Backend, ObjectInfo
from cag_store.errors import StoreError
from cag_store.manifest import Manifest
from cag_store.paths import (
    BLOBS,
    CHUNKS,
    MANIFESTS,
    REFS,
    is_addressed,
    manifest_path,
    object_paths,
    ref_name,
    ref_path,
)

if TYPE_CHECKING:
    from cag_store.store import Store


@dataclass(frozen=True)
class CacheUsage:
    """Bytes that would go with a cache, bytes that other caches hold too, and its last use (seconds since 1970)."""

    name: str
    own_bytes: int
    shared_bytes: int
    last_used_s: float


@dataclass(frozen=True)
class StoreUsage:
    """`held_bytes` are reached by a readable cache, `total_bytes` also count what nothing holds. `caches` has no entry
    for a damaged one; while there is one, what it holds looks as if nothing did."""

    caches: Mapping[str, CacheUsage]
    held_bytes: int
    total_bytes: int


def measure(store: Store) -> StoreUsage:
    """See `Store.usage`."""
    infos = objects(store.backend)
    used = last_uses_s(store.backend)
    held: dict[str, frozenset[str]] = {}
    for name in used:
        with contextlib.suppress(StoreError):
            held[name] = paths_of(store.manifest(store.ref(name).manifest))
    holders = Counter(path for paths in held.values() for path in paths)
    caches = {}
    for name, paths in held.items():
        own = size_of(infos, (path for path in paths if holders[path] == 1))
        caches[name] = CacheUsage(name, own, size_of(infos, paths) - own, used[name])
    total = sum(info.size_bytes for info in infos.values())
    return StoreUsage(caches, size_of(infos, holders), total)


def objects(backend: Backend) -> dict[str, ObjectInfo]:
    """All manifests, chunks and blobs by path."""
    found = (info for folder in (MANIFESTS, CHUNKS, BLOBS) for info in backend.list(folder))
    return {info.path: info for info in found if is_addressed(info.path)}


def paths_of(manifest: Manifest) -> frozenset[str]:
    """What a cache with this manifest holds: the manifest, its chunks and its blobs."""
    return frozenset({manifest_path(manifest.digest), *object_paths(manifest)})


def size_of(infos: Mapping[str, ObjectInfo], paths: Iterable[str]) -> int:
    """Bytes of those of `paths` that are there."""
    return sum(infos[path].size_bytes for path in paths if path in infos)


def last_uses_s(backend: Backend) -> dict[str, float]:
    """When each cache was last opened or its ref written, by the backend's clock: the times of the refs."""
    return {name: info.modified_s for info in backend.list(REFS) if (name := ref_name(info.path)) is not None}


def record_use(backend: Backend, name: str) -> None:
    """Remember that the cache is used now; nothing on a store that may only be read, or when the cache has gone."""
    with contextlib.suppress(StoreError):
        backend.record_use(ref_path(name))
