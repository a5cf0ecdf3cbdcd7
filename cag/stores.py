"""Which store is meant, and what lies in it: a directory or a URL, the cache of pieces before a URL, caches by name.
Knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cag.errors import CacheNotFound, UsageError
from cag.home import cag_home, user_path
from cag_store import DEFAULT_CACHE_BYTES, CopyReport, Manifest, PieceCache, Ref, Store, copy_cache, is_url, only_name
from cag_store.errors import CorruptEntry, EntryNotFound


def open_store(store: Store | str | Path | None = None, *, cache_bytes: int | None = None) -> Store:
    """A store as it is, the store in a directory or at a URL, or the user's own.

    What is read from an object store is kept on the local disk in at most `cache_bytes`; 0 keeps nothing.
    Raises: UsageError: no place, or an empty text, as of a variable that is not set; UnsupportedFormat,
    UnsupportedBackend, BackendUnavailable.
    """
    if isinstance(store, Store):
        return store
    if store == "":
        raise UsageError("the place of the store is empty.", hint="Give a directory or a URL.")
    if not isinstance(store, str | Path | None):
        raise UsageError(f"the place of the store is {store!r}; it must be a directory, a URL or a `Store`.")
    if store is None:
        return Store.open(cag_home() / "store")
    if not is_url(store):
        return Store.open(user_path(store))
    bound = DEFAULT_CACHE_BYTES if cache_bytes is None else cache_bytes
    return Store.open(str(store), pieces=PieceCache(cag_home() / "objects", bound) if bound else None)


def find_cache(store: Store, name: str) -> tuple[Ref, Manifest]:
    """Ref and manifest of a cache. Raises: CacheNotFound."""
    with translated_lookup():
        return store.resolve(name)


def known_documents(manifest: Manifest) -> list[tuple[str, str]]:
    """Paths and ids of a cache's documents: what `load_corpus` is told of them for an update."""
    return [(document.path, document.doc_id) for document in manifest.documents]


def export_cache(
    store: Store,
    name: str,
    destination: Store | str | Path,
    *,
    new_name: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """See `Engine.export_cache`."""
    with translated_lookup():
        return copy_cache(store, open_store(destination, cache_bytes=0), name, new_name, on_progress)


def import_cache(
    store: Store,
    source: Store | str | Path,
    name: str | None = None,
    *,
    cache: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> CopyReport:
    """See `Engine.import_cache`."""
    opened = open_store(source, cache_bytes=0)
    if cache is None and len(names := opened.names()) > 1:
        raise UsageError(
            f"{opened.backend.url} holds {len(names)} caches: {', '.join(names[:10])}.",
            hint="Say which with --cache NAME.",
        )
    with translated_lookup():
        return copy_cache(opened, store, only_name(opened) if cache is None else cache, name, on_progress)


@contextmanager
def translated_lookup() -> Iterator[None]:
    """The store's missing name as the engine's missing cache; a missing file of a cache that has a name is damage.
    Raises: CacheNotFound, CorruptEntry."""
    try:
        yield
    except EntryNotFound as error:
        if "path" in error.facts:
            raise CorruptEntry(
                f"{error}: the cache is incomplete; build it again", where=error.facts["path"]
            ) from error
        hint = "`cag ls` lists caches, `cag build` makes one."
        if "expires_at" in error.facts:
            hint = f"`cag pin {error.facts['name']}` brings it back."
        raise CacheNotFound(f"{error}.", hint=hint, **error.facts) from error
