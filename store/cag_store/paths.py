"""Where each kind of object lies in a store (docs/format.md section 1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from cag_store.errors import InvalidName
from cag_store.jsontext import is_digest
from cag_store.ref import checked_name, is_name

if TYPE_CHECKING:
    from cag_store.manifest import Manifest

CHUNKS, BLOBS, MANIFESTS, REFS = "chunks", "blobs", "manifests", "refs"


def chunk_path(key: str) -> str:
    """Raises: InvalidName."""
    return f"{CHUNKS}/{_checked(key)[:2]}/{key}"


def blob_path(sha256: str) -> str:
    """Raises: InvalidName."""
    return f"{BLOBS}/{_checked(sha256)[:2]}/{sha256}"


def manifest_path(digest: str) -> str:
    """Raises: InvalidName."""
    return f"{MANIFESTS}/{_checked(digest)[:2]}/{digest}.json"


def ref_path(name: str) -> str:
    """Raises: InvalidName."""
    return f"{REFS}/{checked_name(name)}.json"


def ref_name(path: str) -> str | None:
    """The name of the ref at `path`; None for something else."""
    name = path.removeprefix(f"{REFS}/").removesuffix(".json")
    return name if path == f"{REFS}/{name}.json" and is_name(name) else None


def is_addressed(path: str) -> bool:
    """Whether a chunk, snapshot, blob or manifest can lie at `path`."""
    address = path.rpartition("/")[2].removesuffix(".json")
    return is_digest(address) and path in (chunk_path(address), blob_path(address), manifest_path(address))


def object_paths(manifest: Manifest) -> Iterator[str]:
    """Paths of the chunks, snapshots and blobs of `manifest`, each once."""
    yield from manifest.chunk_sizes
    yield from (blob_path(digest) for digest in manifest.blob_digests)


def _checked(digest: str) -> str:
    if not is_digest(digest):
        raise InvalidName(
            f"{digest!r} is not the address of an object: expected 64 lower-case hexadecimal digits", found=digest
        )
    return digest
