"""Verified reading of small objects, and a second try where a copy kept nearby proved wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

from cag_store.backends import ReadableBackend
from cag_store.blob import MAX_BLOB_FILE_BYTES, unpack_blob
from cag_store.errors import CorruptEntry
from cag_store.manifest import MAX_MANIFEST_BYTES, Manifest
from cag_store.paths import blob_path, manifest_path

T = TypeVar("T")

ADVICE = "the file is damaged; build the cache again, or remove it"


def reread(backend: ReadableBackend, path: str, read: Callable[[], T]) -> T:
    """`read()`; once more when it found damage while a copy of the object at `path` was kept nearby."""
    try:
        return read()
    except CorruptEntry:
        if not backend.forget(path):
            raise
        return read()


def read_manifest(backend: ReadableBackend, digest: str) -> Manifest:
    """The manifest at `digest`, verified. Raises: EntryNotFound, CorruptEntry, UnsupportedFormat."""
    path = manifest_path(digest)
    data = backend.get(path, MAX_MANIFEST_BYTES)
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise CorruptEntry(f"{path}: content has sha256 {found}: {ADVICE}", where=path, expected=digest, found=found)
    return Manifest.from_bytes(data, path)


def read_blob(backend: ReadableBackend, sha256: str) -> bytes:
    """The content of a blob, verified. Raises: EntryNotFound, CorruptEntry."""
    path = blob_path(sha256)
    return check_blob(backend.get(path, MAX_BLOB_FILE_BYTES), sha256, path)


def check_blob(file: bytes, sha256: str, where: str) -> bytes:
    """The content in the file of a blob. Raises: CorruptEntry unless it is the one with that address."""
    data = unpack_blob(file, where)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptEntry(f"{where}: content has sha256 {found}", where=where, expected=sha256, found=found)
    return data
