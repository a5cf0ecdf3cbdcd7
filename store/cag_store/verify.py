"""Checking every byte of a cache: ref -> manifest -> chunk headers -> chain of keys -> segments -> decoding ->
snapshots -> blobs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cag_store.chunk_files import OpenChunk, check_segments, open_chunk
from cag_store.errors import BackendUnavailable, CorruptEntry, EntryNotFound, StoreError, StoreFull, UnknownCodec
from cag_store.manifest import Manifest
from cag_store.paths import blob_path, manifest_path, ref_path
from cag_store.reader import check_chain
from cag_store.reading import read_blob, read_manifest
from cag_store.states import check_states, read_states

if TYPE_CHECKING:
    from cag_store.store import Store

_NO_DAMAGE = (BackendUnavailable, StoreFull, UnknownCodec)  # what may not be read, or decoded, here may be whole


@dataclass(frozen=True)
class VerifyReport:
    """What was read, and everything that was wrong. `digest` is None when the ref itself is damaged."""

    name: str
    digest: str | None
    num_chunks: int
    num_blobs: int
    bytes_read: int
    seconds: float
    problems: tuple[StoreError, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems

    def raise_first(self) -> None:
        """Raises: the first problem, if there is one."""
        if self.problems:
            raise self.problems[0]


def verify_cache(store: Store, name: str) -> VerifyReport:
    """See `Store.verify`. Raises: EntryNotFound when there is no such name, InvalidName, BackendUnavailable,
    UnknownCodec; StoreFull: no permission to read it."""
    started = time.perf_counter()
    digest, manifest, problems = None, None, list[StoreError]()
    path = ref_path(name)
    bytes_read = store.backend.stat(path).size_bytes if name in store.names() else 0
    num_chunks = num_blobs = 0
    with contextlib.ExitStack() as held:
        try:
            digest = held.enter_context(store.held_ref(name)).manifest
            manifest = read_manifest(store.backend, digest)
            bytes_read += store.backend.stat(manifest_path(digest)).size_bytes
        except _NO_DAMAGE:
            raise
        except StoreError as error:
            if digest is None and isinstance(error, EntryNotFound):
                raise
            problems.append(error)
        if manifest is not None:
            num_chunks, read = _verify_chunks(store, manifest, problems)
            num_blobs, more = _verify_blobs(store, manifest, problems)
            bytes_read += read + more
    return VerifyReport(name, digest, num_chunks, num_blobs, bytes_read, time.perf_counter() - started, tuple(problems))


@contextlib.contextmanager
def _damage_to(problems: list[StoreError]) -> Iterator[None]:
    """What is wrong within goes to `problems`. Raises: BackendUnavailable, StoreFull, UnknownCodec."""
    try:
        yield
    except _NO_DAMAGE:
        raise
    except StoreError as error:
        problems.append(error)


def _verify_chunks(store: Store, manifest: Manifest, problems: list[StoreError]) -> tuple[int, int]:
    chunks: list[OpenChunk] = []
    bytes_read = 0
    for entry in manifest.chunks:
        with _damage_to(problems):
            chunk = open_chunk(store.backend, entry, store.codec)
            chunks.append(chunk)
            bytes_read += check_segments(store.backend, chunk, decode=True)
    if len(chunks) == len(manifest.chunks):
        with _damage_to(problems):
            check_chain(chunks, manifest.context)
            check_geometry(chunks, manifest)
            check_states(manifest, np.concatenate([chunk.token_ids for chunk in chunks]))
    for snapshot in manifest.states.snapshots if manifest.states is not None else ():
        with _damage_to(problems):
            read_states(store.backend, snapshot)
            bytes_read += snapshot.stored_bytes
    return len(manifest.chunks), bytes_read


def _verify_blobs(store: Store, manifest: Manifest, problems: list[StoreError]) -> tuple[int, int]:
    bytes_read = 0
    for address in sorted(manifest.blob_digests):
        with _damage_to(problems):
            read_blob(store.backend, address)
            bytes_read += store.backend.stat(blob_path(address)).size_bytes
    return len(manifest.blob_digests), bytes_read


def check_geometry(chunks: list[OpenChunk], manifest: Manifest) -> None:
    """Raises: CorruptEntry when the chunks have another number or shape of layers than the manifest says."""
    expected = (manifest.kv.num_kv_heads, manifest.kv.head_dim)
    for chunk in chunks:
        found = (chunk.index.header.num_kv_heads, chunk.index.header.head_dim)
        if found != expected:
            raise CorruptEntry(
                f"{chunk.path}: layers {found}, the manifest says {expected}",
                where=chunk.path,
                expected=expected,
                found=found,
            )
