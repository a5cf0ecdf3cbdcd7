"""Garbage collection: mark from refs and live leases, sweep the rest; under a limit, evict caches before.

Runs under the exclusive lock `gc`; readers, builders and commits take it shared for the moment in which they create
a lease or swap a ref, so what is marked cannot become less while it is swept. While a build lease is live, nothing
unreferenced is removed but old temporary files, so nothing is evicted either.
"""

from __future__ import annotations

from collections.abc import Collection, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cag_store.backends import ObjectInfo
from cag_store.errors import EntryNotFound, StoreError
from cag_store.jsontext import is_digest
from cag_store.manifest import Manifest, utc_text
from cag_store.paths import ref_path
from cag_store.quota import Eviction, Tenant, plan_evictions, rebuild_seconds
from cag_store.reading import read_manifest
from cag_store.ref import Ref
from cag_store.usage import last_uses_s, objects, paths_of, size_of

if TYPE_CHECKING:
    from cag_store.store import Store


@dataclass(frozen=True)
class GcReport:
    """What was removed (or would be, when `dry_run`), and what was kept although nothing reaches it.

    `kept_bytes` are all chunks, blobs and manifests that are left; `over_bytes` is by how much they exceed `max_bytes`.
    """

    dry_run: bool
    expired: tuple[str, ...]
    evicted: tuple[Eviction, ...]
    removed: tuple[str, ...]
    removed_bytes: int
    kept_unreferenced: int
    kept_bytes: int
    max_bytes: int | None
    over_bytes: int
    live_leases: int
    build_running: bool


@dataclass(frozen=True)
class _Marks:
    """What there is, and who holds it."""

    infos: dict[str, ObjectInfo]
    expired: tuple[Ref, ...]
    kept: tuple[Ref, ...]
    manifests: dict[str, Manifest]
    leased: frozenset[str]
    num_leases: int
    building: bool

    def reached(self, evicted: Set[str] = frozenset()) -> set[str]:
        """Paths of everything that refs other than `evicted` and live leases reach."""
        digests = {ref.manifest for ref in self.kept if ref.name not in evicted} | self.leased
        return {path for digest in digests & set(self.manifests) for path in paths_of(self.manifests[digest])}


def collect(store: Store, grace_s: float, dry_run: bool, max_bytes: int | None, keep: Collection[str]) -> GcReport:
    """See `Store.gc`. Unpinned refs that have expired are removed first."""
    backend = store.backend
    with backend.locked("gc"), backend.locked("refs"):
        now_s = backend.now_s()
        marks = _mark(store, now_s)
        reached = marks.reached()
        loose = sorted(
            (info for info in marks.infos.values() if info.path not in reached), key=lambda info: info.modified_s
        )
        limit = float("-inf") if marks.building else now_s - grace_s
        doomed = [info for info in loose if info.modified_s <= limit]
        evicted: list[Eviction] = []
        if max_bytes is not None and not marks.building:
            excess = sum(info.size_bytes for info in marks.infos.values()) - max_bytes
            doomed = _least_loose(loose, doomed, excess)
            evicted = _evictions(store, marks, now_s, keep, excess - sum(info.size_bytes for info in doomed))
            still = marks.reached({eviction.name for eviction in evicted})
            doomed += [marks.infos[path] for path in sorted(reached - still) if path in marks.infos]
        names = [*(ref.name for ref in marks.expired), *(eviction.name for eviction in evicted)]
        if not dry_run:
            backend.delete_all([ref_path(name) for name in names])  # before what they reach
            backend.delete_all([info.path for info in doomed])
        temporaries = backend.sweep_temporaries(dry_run)
    removed = [*doomed, *temporaries]
    kept_bytes = sum(info.size_bytes for info in marks.infos.values()) - sum(info.size_bytes for info in doomed)
    return GcReport(
        dry_run=dry_run,
        expired=tuple(ref.name for ref in marks.expired),
        evicted=tuple(evicted),
        removed=tuple(info.path for info in removed),
        removed_bytes=sum(info.size_bytes for info in removed),
        kept_unreferenced=len(set(marks.infos) - reached - {info.path for info in doomed}),
        kept_bytes=kept_bytes,
        max_bytes=max_bytes,
        over_bytes=0 if max_bytes is None else max(0, kept_bytes - max_bytes),
        live_leases=marks.num_leases,
        build_running=marks.building,
    )


def _mark(store: Store, now_s: float) -> _Marks:
    """Raises: StoreError when a ref or manifest is damaged, as nobody knows then what is in use."""
    now = utc_text(now_s)
    try:
        refs = store.refs()
        leases = store.backend.live_leases()
        expired = tuple(ref for ref in refs if ref.expired(now))
        kept = tuple(ref for ref in refs if ref not in expired)
        held = [_held_by(lease) for lease in leases]
        leased = frozenset(digest for digests in held for digest in digests or ())
        manifests = _manifests(store, {ref.manifest for ref in kept} | leased)
    except StoreError as error:
        raise type(error)(
            f"{error}; gc removed nothing: remove that cache, or build it again", **error.facts
        ) from error
    return _Marks(objects(store.backend), expired, kept, manifests, leased, len(leases), building=None in held)


def _held_by(lease: dict[str, Any]) -> list[str] | None:
    """The manifests that a reader holds; None when it is a build, or nothing that this version knows, and holds all."""
    digests = lease.get("manifests")
    if lease.get("kind") != "reader" or not isinstance(digests, list):
        return None
    return digests if all(isinstance(digest, str) and is_digest(digest) for digest in digests) else None


def _manifests(store: Store, digests: Set[str]) -> dict[str, Manifest]:
    """Those of `digests` that are there."""
    found = {}
    for digest in digests:
        try:
            found[digest] = read_manifest(store.backend, digest)
        except EntryNotFound:
            continue
    return found


def _least_loose(loose: list[ObjectInfo], doomed: list[ObjectInfo], excess: int) -> list[ObjectInfo]:
    """What nothing reaches, the oldest first: all of `doomed`, and younger ones while less than `excess` is freed."""
    chosen, freed = list(doomed), sum(info.size_bytes for info in doomed)
    for info in loose[len(doomed) :]:
        if freed >= excess:
            break
        chosen.append(info)
        freed += info.size_bytes
    return chosen


def _evictions(store: Store, marks: _Marks, now_s: float, keep: Collection[str], excess: int) -> list[Eviction]:
    """Neither pinned caches, nor those that are being read, nor `keep`, nor those whose manifest is missing."""
    if excess <= 0:
        return []
    evictable = [
        ref
        for ref in marks.kept
        if not ref.pinned
        and ref.manifest not in marks.leased
        and ref.name not in keep
        and ref.manifest in marks.manifests
    ]
    used, rebuild = last_uses_s(store.backend), rebuild_seconds(list(marks.manifests.values()))
    tenants = []
    for ref in evictable:
        paths = paths_of(marks.manifests[ref.manifest])
        idle_s = max(0.0, now_s - used.get(ref.name, now_s))
        tenants.append(Tenant(ref.name, paths, size_of(marks.infos, paths), idle_s, rebuild[ref.manifest]))
    fixed = marks.reached({ref.name for ref in evictable})
    return plan_evictions(tenants, marks.infos, fixed, excess)
