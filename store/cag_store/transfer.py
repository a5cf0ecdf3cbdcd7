"""Copying a cache from one store to another: blobs and chunks, then manifest and ref. Nothing of the source is trusted.

Each chunk is read once, checked as a reader checks it (size, header against the manifest, ids against the key, every
segment's checksum), and then written; what the destination has already is checked too and left alone when it is whole:
every byte, but for an object store, from which it would have to be fetched, the header only. So a copy that was killed
is resumed by the same call, one mends what was damaged, and the destination's names change in the last step or not at
all.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cag_store.blob import MAX_BLOB_FILE_BYTES
from cag_store.chunk import ChunkEntry
from cag_store.chunk_files import OpenChunk, check_segments, open_chunk, read_entry, verified_segments
from cag_store.errors import CorruptEntry, EntryConflict, EntryNotFound
from cag_store.manifest import Manifest
from cag_store.paths import blob_path, chunk_path
from cag_store.reader import check_chain
from cag_store.reading import check_blob, read_blob, read_manifest
from cag_store.ref import checked_name
from cag_store.state_entry import StateEntry
from cag_store.states import check_states, copied_states
from cag_store.verify import check_geometry

if TYPE_CHECKING:
    from cag_store.store import Store

MAX_CHUNK_BYTES = 1 << 30
_PARALLEL_COPIES = 4  # chunks in memory at the same time

OnProgress = Callable[[int, int], None]
"""`on_progress(done_bytes, total_bytes)`, from one thread at a time; what was there already counts as done."""


@dataclass(frozen=True)
class CopyReport:
    """What a copy did. Bytes are those of chunks and blobs; `reused_bytes` were at the destination already."""

    name: str
    digest: str
    source: str
    destination: str
    num_chunks: int
    num_documents: int
    copied_bytes: int
    reused_bytes: int
    seconds: float


def copy_cache(
    source: Store, destination: Store, name: str, new_name: str | None = None, on_progress: OnProgress | None = None
) -> CopyReport:
    """Copy the cache `name`, and let `new_name` (or `name`) mean it at the destination. Expiry and pin stay behind.

    Raises:
        InvalidName: a name that the store does not accept, an empty one among them.
        EntryNotFound: no such cache, or a part of it is missing.
        CorruptEntry, UnsupportedFormat, UnknownCodec: the source holds something else than its manifest says.
        EntryConflict: the destination holds a chunk of the same key with other bytes.
        StoreFull, StoreBusy, BackendUnavailable: as the backends.
    """
    started = time.perf_counter()
    target = checked_name(name if new_name is None else new_name)
    source.resolve(name)  # not one that has expired
    with source.held_ref(name) as ref, destination.build_lease():
        manifest = read_manifest(source.backend, digest := ref.manifest)
        copied = _copy_objects(source, destination, manifest, on_progress or _tell_nobody)
        destination.commit(target, manifest, copied=True)
    return CopyReport(
        name=target,
        digest=digest,
        source=source.backend.url,
        destination=destination.backend.url,
        num_chunks=len(manifest.chunks),
        num_documents=len(manifest.documents),
        copied_bytes=copied,
        reused_bytes=manifest.stored_bytes - copied,
        seconds=time.perf_counter() - started,
    )


def only_name(store: Store) -> str:
    """The name of the one cache of `store`. Raises: EntryNotFound when there is none or several."""
    names = store.names()
    if len(names) != 1:
        there = f"holds {len(names)}: {', '.join(names[:10])}; say which" if names else "holds no cache"
        raise EntryNotFound(f"{store.backend.url} {there}", where=store.backend.url)
    return names[0]


def _copy_objects(source: Store, destination: Store, manifest: Manifest, on_progress: OnProgress) -> int:
    """Copy what is missing; returns its bytes."""
    total, done, copied = manifest.stored_bytes, 0, 0
    on_progress(0, total)
    chunks: list[OpenChunk] = []
    with ThreadPoolExecutor(_PARALLEL_COPIES, "cag-copy") as pool:
        works = [pool.submit(_copy_blob, source, destination, sha256) for sha256 in manifest.blob_digests]
        works += [pool.submit(_copy_chunk, source, destination, entry) for entry in manifest.chunks]
        snapshots = manifest.states.snapshots if manifest.states is not None else ()
        works += [pool.submit(_copy_states, source, destination, entry) for entry in snapshots]
        try:
            for work in as_completed(works):
                num_bytes, written, chunk = work.result()
                done, copied = done + num_bytes, copied + num_bytes * written
                chunks += [chunk] if chunk is not None else []
                on_progress(min(done, total), total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    chunks.sort(key=lambda chunk: chunk.entry.start)
    check_chain(chunks, manifest.context)
    check_geometry(chunks, manifest)
    check_states(manifest, np.concatenate([chunk.token_ids for chunk in chunks]))
    return copied


def _tell_nobody(_done: int, _total: int) -> None:
    pass


def _copy_blob(source: Store, destination: Store, sha256: str) -> tuple[int, bool, OpenChunk | None]:
    """Bytes of a blob's file, and whether it was written."""
    path = blob_path(sha256)
    with contextlib.suppress(EntryNotFound, CorruptEntry):
        read_blob(destination.backend, sha256)
        destination.backend.touch(path)
        return destination.backend.stat(path).size_bytes, False, None
    file = source.backend.get(path, MAX_BLOB_FILE_BYTES)
    check_blob(file, sha256, f"{source.backend.url}/{path}")
    if not destination.backend.put_if_absent(path, [file]):
        destination.backend.replace(path, file)  # it was damaged
    return len(file), True, None


def _copy_states(source: Store, destination: Store, entry: StateEntry) -> tuple[int, bool, OpenChunk | None]:
    """Bytes of a snapshot, and whether it was written."""
    with contextlib.suppress(EntryNotFound, CorruptEntry):
        if destination.state_entry(entry.chunk) != entry:
            raise EntryConflict(
                f"{destination.backend.url} holds snapshot {entry.key} with other bytes, computed elsewhere: remove "
                "the caches that use it and run gc, or copy to another store",
                where=entry.path,
                expected=entry,
            )
        return entry.stored_bytes, False, None
    parts = copied_states(source.backend, entry)
    if not destination.backend.put_if_absent(entry.path, parts):  # somebody else was sooner
        copied_states(destination.backend, entry)
    return entry.stored_bytes, True, None


def _copy_chunk(source: Store, destination: Store, entry: ChunkEntry) -> tuple[int, bool, OpenChunk | None]:
    """Bytes of a chunk, whether it was written, and its verified header."""
    there = _chunk_at(destination, entry)
    if there is not None:
        return entry.stored_bytes, False, there
    if entry.stored_bytes > MAX_CHUNK_BYTES:
        where = chunk_path(entry.key)
        message = f"{where}: {entry.stored_bytes} bytes, expected at most {MAX_CHUNK_BYTES}"
        raise CorruptEntry(message, where=where, expected=MAX_CHUNK_BYTES, found=entry.stored_bytes)
    chunk = open_chunk(source.backend, entry)
    written = destination.backend.put_if_absent(chunk.path, _verified_parts(source, chunk))
    if not written:  # somebody else was sooner
        open_chunk(destination.backend, entry)
    return entry.stored_bytes, written, chunk


def _chunk_at(destination: Store, entry: ChunkEntry) -> OpenChunk | None:
    """The chunk at the destination, protected from `gc`; None when it is missing or was damaged, and is gone now."""
    with contextlib.suppress(CorruptEntry):
        return _protected(destination, entry)
    with destination.backend.locked("repair"):  # whoever held it may have put a whole one there
        try:
            return _protected(destination, entry)
        except CorruptEntry:
            _check_same_bytes(destination, entry)
            destination.backend.delete(chunk_path(entry.key))
            return None


def _protected(destination: Store, entry: ChunkEntry) -> OpenChunk | None:
    """The chunk, touched; None when it is missing. Raises: CorruptEntry."""
    with contextlib.suppress(EntryNotFound):
        chunk = open_chunk(destination.backend, entry)
        if destination.backend.tier != "object-store":
            check_segments(destination.backend, chunk, decode=False)
        destination.backend.touch(chunk.path)
        return chunk
    return None


def _check_same_bytes(destination: Store, entry: ChunkEntry) -> None:
    """Raises: EntryConflict when a chunk that is whole has the key, but not the bytes of `entry`."""
    with contextlib.suppress(CorruptEntry, EntryNotFound):
        found = read_entry(destination.backend, entry.key)
        if found != entry:
            raise EntryConflict(
                f"{destination.backend.url} holds chunk {entry.key} with other bytes, computed elsewhere: remove the "
                "caches that use it and run gc, or copy to another store",
                where=chunk_path(entry.key),
                expected=entry,
                found=found,
            )


def _verified_parts(source: Store, chunk: OpenChunk) -> list[bytes | memoryview]:
    """All bytes of a chunk file, every one of them checked. Raises: CorruptEntry."""
    head = [chunk.index.to_bytes(), chunk.token_ids.tobytes()]  # what `open_chunk` has verified, to the byte
    return [*head, *verified_segments(source.backend, chunk)]
