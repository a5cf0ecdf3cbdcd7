"""All caches of a store, those that cannot be read apart from the others."""

from __future__ import annotations

from cag.server.errors import public_message
from cag_store import Manifest, Ref, Store
from cag_store.errors import EntryNotFound, StoreError


def readable_caches(store: Store) -> tuple[list[tuple[Ref, Manifest]], list[dict[str, str]]]:
    """(ref, manifest) of every cache in order of names, expired ones too; and name and error of each damaged one."""
    readable, damaged = [], []
    for name in store.names():
        try:
            ref = store.ref(name)
        except EntryNotFound:  # removed since the names were read
            continue
        except StoreError as error:
            damaged.append({"name": name, "error": public_message(error)})
            continue
        try:
            readable.append((ref, store.manifest(ref.manifest)))
        except StoreError as error:
            damaged.append({"name": name, "error": public_message(error)})
    return readable, damaged
