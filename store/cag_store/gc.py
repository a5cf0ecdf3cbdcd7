"""Garbage collection: mark from refs and live leases, sweep the rest.

Runs under the exclusive lock `gc`; readers, builders and commits take it shared for the moment in which they create
a lease or swap a ref, so
what is marked cannot become less while it is swept. While a build lease is live, nothing unreferenced is removed but
old temporary files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cag_store.backends import ObjectInfo
from cag_store.errors import EntryNotFound, StoreError
from cag_store.manifest import utc_now
from cag_store.paths import BLOBS, CHUNKS, MANIFESTS, blob_path, chunk_path, manifest_path, ref_path

if TYPE_CHECKING:
    from cag_store.store import Store


@dataclass(frozen=True)
class GcReport:
    """What was removed (or would be, when `dry_run`), and what was kept although nothing reaches it."""

    dry_run: bool
    expired: tuple[str, ...]
    removed: tuple[str, ...]
    removed_bytes: int
    kept_unreferenced: int
    live_leases: int
    build_running: bool


def collect(store: Store, grace_s: float, dry_run: bool) -> GcReport:
    """See `Store.gc`. Unpinned refs that have expired are removed first."""
    backend = store.backend
    with backend.locked("gc"), backend.locked("refs"):
        expired = [ref for ref in store.refs() if ref.expired(utc_now())]
        leases = backend.live_leases()
        kept = [ref.manifest for ref in store.refs() if ref not in expired]
        held = [digest for lease in leases for digest in lease.get("manifests", ())]
        reached = _reached(store, kept, held)
        building = any(lease.get("kind") == "build" for lease in leases)
        loose = [
            info for folder in (MANIFESTS, CHUNKS, BLOBS) for info in backend.list(folder) if info.path not in reached
        ]
        limit = float("-inf") if building else time.time() - grace_s
        doomed = [info for info in loose if info.modified_s <= limit]
        if not dry_run:
            for path in (*(ref_path(ref.name) for ref in expired), *(info.path for info in doomed)):
                backend.delete(path)
        temporaries = backend.sweep_temporaries(dry_run)
    removed: list[ObjectInfo] = [*doomed, *temporaries]
    return GcReport(
        dry_run=dry_run,
        expired=tuple(ref.name for ref in expired),
        removed=tuple(info.path for info in removed),
        removed_bytes=sum(info.size_bytes for info in removed),
        kept_unreferenced=len(loose) - len(doomed),
        live_leases=len(leases),
        build_running=building,
    )


def _reached(store: Store, kept: list[str], held: list[str]) -> set[str]:
    """Paths of everything that the manifests of refs (`kept`) and of leases (`held`, may be gone) reach."""
    reached: set[str] = set()
    for digest in {*kept, *held}:
        try:
            manifest = store.manifest(digest)
        except EntryNotFound:
            continue
        except StoreError as error:
            raise type(error)(
                f"{error}; gc removed nothing: remove the cache of this manifest first", **error.facts
            ) from error
        reached.add(manifest_path(digest))
        reached.update(chunk_path(chunk.key) for chunk in manifest.chunks)
        reached.update(blob_path(digest) for digest in manifest.blob_digests)
    return reached
