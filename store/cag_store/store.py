"""The store: chunks, blobs and manifests by address, caches by name. The one class that callers need.

What may be done with it stands in docs/format.md; how it survives kill -9, concurrent builders and gc in
docs/design/002-store.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cag_store.backends import Backend, Lease, MemoryBackend, ReadableBackend, is_url, open_backend
from cag_store.backends.object_cache import CachedReads, PieceCache
from cag_store.blob import MAX_BLOB_BYTES, pack_blob
from cag_store.chunk import ChunkEntry, ChunkHeader
from cag_store.chunk_files import LayerArrays, check_segments, default_workers, encode_chunk, open_chunk, read_entry
from cag_store.codecs import Codec, codec_from_config
from cag_store.errors import (
    CorruptEntry,
    EntryNotFound,
    EntryPinned,
    StoreFull,
    UnsupportedBackend,
    UnsupportedFormat,
)
from cag_store.gc import GcReport, collect
from cag_store.jsontext import canonical_bytes
from cag_store.keys import ChunkContext, TokenIds
from cag_store.manifest import Manifest, utc_after, utc_now
from cag_store.paths import REFS, blob_path, chunk_path, manifest_path, object_paths, ref_name, ref_path
from cag_store.reader import CacheReader
from cag_store.reading import ADVICE, read_blob, read_manifest, reread
from cag_store.ref import MAX_REF_BYTES, Ref
from cag_store.state_entry import StateEntry, state_key
from cag_store.states import StateArray, encode_states, find_states, read_states
from cag_store.usage import StoreUsage, measure, record_use
from cag_store.verify import VerifyReport, verify_cache

Entry = TypeVar("Entry")
_KEPT_CODECS = 4  # a codec may hold a basis of megabytes
_ONLY_READ = StoreFull, UnsupportedBackend  # no permission, no space or no locks: a cache can be read all the same


class Store:
    """A store on a backend. Safe to use from several threads and processes.

    Attributes:
        backend: where everything is written, looked up and verified.
        nearby: what caches are read through: `backend`, or `backend` behind a cache of pieces on the local disk.
    """

    def __init__(self, backend: Backend, workers: int | None = None, pieces: PieceCache | None = None) -> None:
        self.backend = backend
        self.nearby: ReadableBackend = CachedReads(backend, pieces) if pieces is not None else backend
        self.workers = workers or default_workers()
        self._codecs: dict[bytes, Codec] = {}
        self._codecs_guard = threading.Lock()

    @classmethod
    def open(cls, location: str | Path, workers: int | None = None, pieces: PieceCache | None = None) -> Store:
        """The store in a directory or at a URL (`file://`, `s3://`, `gs://`, `az://`), made by the first write.

        `pieces` keeps what is read from an object store. Raises: UnsupportedFormat; UnsupportedBackend and
        BackendUnavailable for URLs.
        """
        remote = is_url(location) and not str(location).startswith("file:")
        return cls(open_backend(location), workers, pieces if remote else None)

    @classmethod
    def in_memory(cls, workers: int | None = None) -> Store:
        """A store that ends with the process."""
        return cls(MemoryBackend(), workers)

    def has_chunk(self, key: str) -> bool:
        """Whether a chunk lies at `key`, unverified."""
        return self._exists(chunk_path(key))

    def put_chunk(self, header: ChunkHeader, layers: Iterable[LayerArrays], token_ids: TokenIds) -> ChunkEntry:
        """Encode and store a chunk; `layers` gives each layer's sides, `[num_kv_heads, num_tokens, head_dim]` each.

        An existing chunk of the same key is verified and kept; then `layers` is not consumed.
        A damaged one is replaced.
        Raises: InvalidName when the key is not that of the tokens, UnencodableArray, UnknownCodec, StoreFull.
        """
        with contextlib.suppress(EntryNotFound, CorruptEntry):
            return self._reused(header)
        with ThreadPoolExecutor(self.workers, "cag-encode") as pool:
            codec = self.codec(header.context.codec)
            entry, parts = encode_chunk(header, layers, token_ids, codec, pool, 2 * self.workers)
        if self.backend.put_if_absent(chunk_path(header.key), parts):
            return entry
        return self._reused(header)

    def chunk_entry(self, key: str) -> ChunkEntry:
        """The entry of an existing chunk after every byte was verified, and protected from `gc` for its grace time.

        Raises: EntryNotFound; CorruptEntry after a damaged chunk was removed: compute it again.
        """
        return self._mended(chunk_path(key), partial(self._whole_chunk, key))

    def put_states(self, chunk: str, num_tokens: int, states: Mapping[str, StateArray]) -> StateEntry:
        """Store what recurrent layers know behind the chunk with key `chunk`, after `num_tokens` tokens. A whole
        snapshot that lies there is kept. Raises: UnencodableArray, StoreFull."""
        with contextlib.suppress(EntryNotFound, CorruptEntry):
            return self.state_entry(chunk)
        entry, parts = encode_states(chunk, num_tokens, states)
        return entry if self.backend.put_if_absent(entry.path, parts) else self.state_entry(chunk)

    def state_entry(self, chunk: str) -> StateEntry:
        """The entry of the snapshot behind a chunk after every byte was verified, and protected from `gc` for its grace
        time. Raises: EntryNotFound; CorruptEntry after a damaged one was removed: compute it again."""
        return self._mended(chunk_path(state_key(chunk)), partial(self._whole_states, chunk))

    def states(self, entry: StateEntry) -> dict[str, StateArray]:
        """A snapshot, verified. Raises: EntryNotFound, CorruptEntry."""
        return read_states(self.nearby, entry)

    def put_blob(self, data: bytes) -> str:
        """Store `data`; returns its sha256, its address. A whole blob that lies there is kept, a damaged one replaced.
        Raises: StoreFull, ValueError above `MAX_BLOB_BYTES`."""
        if len(data) > MAX_BLOB_BYTES:
            raise ValueError(f"a blob has at most {MAX_BLOB_BYTES} bytes, found {len(data)}")
        sha256 = hashlib.sha256(data).hexdigest()
        path, whole = blob_path(sha256), partial(self._whole_blob, sha256)
        with contextlib.suppress(EntryNotFound, CorruptEntry):
            return self._mended(path, whole)
        return sha256 if self.backend.put_if_absent(path, [pack_blob(data)]) else whole()

    def get_blob(self, sha256: str) -> bytes:
        """The blob, verified. Raises: EntryNotFound, CorruptEntry."""
        return reread(self.nearby, blob_path(sha256), lambda: read_blob(self.nearby, sha256))

    def blob_bytes(self, sha256s: Iterable[str]) -> int:
        """Size on the backend of these blobs, each counted once. Raises: EntryNotFound."""
        return sum(self.backend.stat(blob_path(sha256)).size_bytes for sha256 in set(sha256s))

    def codec(self, config: Mapping[str, Any]) -> Codec:
        """The codec of a configuration, ready to work with the blobs that it names; the last few are kept.

        Raises: UnknownCodec; EntryNotFound, CorruptEntry for a blob.
        """
        key = canonical_bytes(config)
        with self._codecs_guard:  # not to fetch a blob once for each thread
            codec = self._codecs.get(key)
            if codec is None:
                codec = codec_from_config(config, self.get_blob)
                kept = list(self._codecs.items())[1 - _KEPT_CODECS :]
                self._codecs = {**dict(kept), key: codec}
        return codec

    def forget_codec(self, config: Mapping[str, Any]) -> None:
        """Free what `codec` keeps for a configuration that is not needed any more."""
        with self._codecs_guard:
            self._codecs.pop(canonical_bytes(config), None)

    def commit(self, name: str, manifest: Manifest, expires_at: str | None = None, *, copied: bool = False) -> str:
        """Store `manifest` and let `name` mean it; returns its digest. A pin stays, an old expiry does not.

        With `copied`, a text that was here before may be packed otherwise than the manifest counts.
        Raises: InvalidName; EntryNotFound when a chunk or blob is missing;
        CorruptEntry when the manifest contradicts them or itself.
        """
        data = manifest.to_bytes()
        Manifest.from_bytes(data)
        path = ref_path(name)
        with self.backend.locked("gc", shared=True):
            self._check_present(manifest, copied)
            stored = manifest_path(manifest.digest)
            if not self.backend.put_if_absent(stored, [data]) and not self._holds(stored, data):
                self.backend.replace(stored, data)
            with self.backend.locked("refs"):
                pinned = False
                with contextlib.suppress(EntryNotFound, CorruptEntry):
                    pinned = self.ref(name).pinned
                ref = Ref(name, manifest.digest, pinned, expires_at, utc_now())
                self.backend.replace(path, ref.to_bytes())
        return manifest.digest

    def names(self) -> list[str]:
        """The names of all refs, readable or not, in order."""
        found = (ref_name(info.path) for info in self.backend.list(REFS))
        return sorted(name for name in found if name is not None)

    def ref(self, name: str) -> Ref:
        """The ref `name`, expired or not. Raises: EntryNotFound, CorruptEntry, InvalidName."""
        path = ref_path(name)
        try:
            return Ref.from_bytes(self.backend.get(path, MAX_REF_BYTES), name)
        except CorruptEntry as error:
            raise CorruptEntry(f"{error}: {ADVICE}", **error.facts) from error
        except EntryNotFound:
            known = ", ".join(self.names()[:10]) or "none"
            raise EntryNotFound(
                f"no cache is called {name!r} in {self.backend.url}; there: {known}", name=name
            ) from None

    def refs(self) -> list[Ref]:
        """All refs, expired ones too. Raises: CorruptEntry when one is damaged."""
        found = []
        for name in self.names():
            with contextlib.suppress(EntryNotFound):  # removed since the names were read
                found.append(self.ref(name))
        return found

    def resolve(self, name: str) -> tuple[Ref, Manifest]:
        """What `name` means now. Raises: EntryNotFound (also when it has expired), CorruptEntry, InvalidName."""
        ref = self.ref(name)
        if ref.expired(utc_now()):
            raise EntryNotFound(
                f"cache {name!r} expired at {ref.expires_at}: build it again, or set a later expiry before gc",
                name=name,
                expires_at=ref.expires_at,
            )
        try:
            return ref, self.manifest(ref.manifest)
        except EntryNotFound:
            if self.ref(name).manifest == ref.manifest:
                raise
        return self.resolve(name)  # replaced since the ref was read, and the old manifest collected

    def manifest(self, digest: str) -> Manifest:
        """The manifest at `digest`, verified. Raises: EntryNotFound, CorruptEntry, UnsupportedFormat."""
        return reread(self.nearby, manifest_path(digest), lambda: read_manifest(self.nearby, digest))

    def pin(self, name: str) -> Ref:
        """Keep `name` from expiry until `unpin`. Raises: EntryNotFound."""
        return self._update(name, lambda ref: replace(ref, pinned=True))

    def unpin(self, name: str) -> Ref:
        """Undo `pin`. Raises: EntryNotFound."""
        return self._update(name, lambda ref: replace(ref, pinned=False))

    def set_ttl(self, name: str, ttl_s: float | None) -> Ref:
        """Let `name` expire `ttl_s` seconds from now; None: never. Raises: EntryNotFound, ValueError."""
        expires_at = utc_after(ttl_s)
        return self._update(name, lambda ref: replace(ref, expires_at=expires_at))

    def remove(self, name: str, *, force: bool = False) -> None:
        """Forget `name`, damaged or not; `gc` frees what only it held. `force`: also when it is pinned.
        Raises: EntryNotFound, EntryPinned."""
        with self.backend.locked("refs"):
            if not force and self._is_pinned(name):
                raise EntryPinned(f"cache {name!r} is pinned: unpin it first, or remove it with force", name=name)
            if not self.backend.delete(ref_path(name)):
                self.ref(name)

    def _is_pinned(self, name: str) -> bool:
        try:
            return self.ref(name).pinned
        except (CorruptEntry, UnsupportedFormat):  # what it says is not known: it may go
            return False

    def reader(self, manifest: Manifest, workers: int | None = None) -> CacheReader:
        """A reader of the whole cache; close it. Raises: EntryNotFound, CorruptEntry, UnknownCodec."""
        with self._gc_kept_out():
            lease = self._reader_lease([manifest.digest])
        return CacheReader(self.nearby, manifest.chunks, manifest.context, lease, workers or self.workers, self.codec)

    def open_reader(self, name: str, workers: int | None = None) -> tuple[Ref, Manifest, CacheReader]:
        """`resolve` and `reader` in one step, so that no `gc` comes between. Opening and closing it count as uses.
        Raises: as both."""
        with self._gc_kept_out():
            ref, manifest = self.resolve(name)
            lease = self._reader_lease([manifest.digest])
        used = partial(record_use, self.backend, name)
        used()
        workers = workers or self.workers
        context = manifest.context
        return ref, manifest, CacheReader(self.nearby, manifest.chunks, context, lease, workers, self.codec, used)

    def chunk_reader(
        self, entries: Sequence[ChunkEntry], context: ChunkContext, workers: int | None = None
    ) -> CacheReader:
        """A reader of chunks from the root on that no manifest holds yet: call it inside a `build_lease`.
        At least one entry."""
        return CacheReader(self.backend, entries, context, None, workers or self.workers, self.codec)

    def lease(self, *digests: str, kind: str = "reader") -> Lease:
        """Hold the manifests `digests` against `gc` until released, or until this process ends. Raises: StoreFull."""
        with self.backend.locked("gc", shared=True):
            return self._new_lease(digests, kind)

    @contextlib.contextmanager
    def held_ref(self, name: str) -> Iterator[Ref]:
        """The ref `name`, expired or not, while what it means is held against `gc`; without a lease on a store that may
        only be read. Raises: as `ref`."""
        with self._gc_kept_out():
            ref = self.ref(name)
            lease = self._reader_lease([ref.manifest])
        with lease or contextlib.nullcontext():
            yield ref

    def build_lease(self) -> Lease:
        """Hold all chunks and blobs, referenced or not, against `gc` while a build runs. Raises: StoreFull."""
        return self.lease(kind="build")

    def verify(self, name: str) -> VerifyReport:
        """Read and check every byte of the cache. Damage is in the report, not raised. Raises: EntryNotFound for the
        name; InvalidName; BackendUnavailable, UnknownCodec, StoreFull (no permission): nothing can be said of it."""
        return verify_cache(self, name)

    def gc(
        self,
        grace_s: float = 3600.0,
        dry_run: bool = False,
        max_bytes: int | None = None,
        keep: Collection[str] = (),
    ) -> GcReport:
        """Remove what no ref and no live lease reaches, and is older than `grace_s`; see `cag_store.gc`.

        With `max_bytes` for all chunks, blobs and manifests: then also what is younger, then caches, those of least
        worth first (`cag_store.quota`); never pinned ones, those that are being read, or `keep`. While a build runs,
        nothing is evicted. Raises: CorruptEntry before anything is removed.
        """
        return collect(self, grace_s, dry_run, max_bytes, keep)

    def usage(self) -> StoreUsage:
        """Own and shared bytes and last use of each readable cache, and the sums over the store."""
        return measure(self)

    def drop_page_cache(self, name: str) -> bool:
        """Make the next reading of this cache come from the device; False where that cannot be done."""
        ref, manifest = self.resolve(name)
        paths = [ref_path(name), manifest_path(ref.manifest), *object_paths(manifest)]
        dropped = [self.backend.drop_page_cache(path) for path in paths]
        return all(dropped)

    def _mended(self, path: str, whole: Callable[[], Entry]) -> Entry:
        """`whole()`; where it finds damage, the object at `path` is removed."""
        with contextlib.suppress(CorruptEntry):
            return whole()
        with self.backend.locked("repair"):  # whoever held it may have put a whole one there
            try:
                return whole()
            except CorruptEntry:
                self.backend.delete(path)
                raise

    def _whole_states(self, chunk: str) -> StateEntry:
        entry = find_states(self.backend, chunk)
        self.backend.touch(entry.path)
        return entry

    def _whole_chunk(self, key: str) -> ChunkEntry:
        entry = read_entry(self.backend, key)
        check_segments(self.backend, open_chunk(self.backend, entry), decode=False)
        self.backend.touch(chunk_path(key))
        return entry

    def _whole_blob(self, sha256: str) -> str:
        read_blob(self.backend, sha256)
        self.backend.touch(blob_path(sha256))
        return sha256

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self.backend.get(path, len(data)) == data
        except CorruptEntry:
            return False

    def _exists(self, path: str) -> bool:
        try:
            self.backend.stat(path)
        except EntryNotFound:
            return False
        return True

    def _reused(self, header: ChunkHeader) -> ChunkEntry:
        entry = self.chunk_entry(header.key)
        stored = open_chunk(self.backend, entry).index.header
        if stored != header:
            raise CorruptEntry(
                f"chunk {header.key} is stored with another geometry", where=header.key, expected=header, found=stored
            )
        return entry

    def _check_present(self, manifest: Manifest, copied: bool) -> None:
        for path, expected in manifest.chunk_sizes.items():
            found = self.backend.stat(path).size_bytes
            if found != expected:
                raise CorruptEntry(f"{path} has {found} bytes, the manifest says {expected}", where=path)
        found = self.blob_bytes(manifest.blob_digests)
        if found != manifest.blob_bytes and not copied:
            raise CorruptEntry(
                f"the blobs have {found} bytes, the manifest says {manifest.blob_bytes}", where="manifest: blob_bytes"
            )

    def _update(self, name: str, change: Callable[[Ref], Ref]) -> Ref:
        with self.backend.locked("refs"):
            ref = replace(change(self.ref(name)), updated_at=utc_now())
            self.backend.replace(ref_path(name), ref.to_bytes())
        return ref

    def _new_lease(self, digests: Sequence[str], kind: str) -> Lease:
        process = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": utc_now()}
        return self.backend.acquire_lease({"kind": kind, "manifests": list(digests), **process})

    @contextlib.contextmanager
    def _gc_kept_out(self) -> Iterator[None]:
        """Hold the lock `gc` shared; on a store that may only be read, whoever runs gc must know its readers."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(*_ONLY_READ):
                stack.enter_context(self.backend.locked("gc", shared=True))
            yield

    def _reader_lease(self, digests: Sequence[str]) -> Lease | None:
        """A lease, under `_gc_kept_out`; None on a store that may only be read."""
        with contextlib.suppress(*_ONLY_READ):
            return self._new_lease(digests, "reader")
        return None
