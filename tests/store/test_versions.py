"""A reader refuses versions that it does not know, of each of the four kinds of object, and says what to do."""

import hashlib
import json
from dataclasses import replace

import pytest

from cag_store import Store
from cag_store.chunk import ChunkIndex, parse_index
from cag_store.errors import CorruptEntry, UnsupportedFormat
from cag_store.jsontext import canonical_bytes
from cag_store.paths import chunk_path, manifest_path, ref_path


def ref_to(digest, **changes):
    """Bytes of a ref called `small` with a right checksum."""
    value = {
        "schema": 1, "name": "small", "manifest": digest, "pinned": False, "expires_at": None,
        "updated_at": "2026-01-02T03:04:05Z", **changes,
    }  # fmt: skip
    return canonical_bytes({**value, "check": hashlib.sha256(canonical_bytes(value)).hexdigest()})


def check_refused(store):
    for read in (
        lambda: store.open_reader("small"),
        lambda: store.verify("small").raise_first(),
        lambda: store.gc(),
    ):
        with pytest.raises(UnsupportedFormat, match="this program reads"):
            read()


def test_a_store(tmp_path, small):
    small().build(Store.open(tmp_path / "store"))
    (tmp_path / "store" / "format").write_text("cag-store 2\n")
    with pytest.raises(UnsupportedFormat, match="use the version that wrote it") as caught:
        Store.open(tmp_path / "store")
    assert caught.value.facts == {"expected": "cag-store 1\n", "found": "cag-store 2\n"}


def test_a_ref(small):
    store = Store.in_memory()
    digest = small().build(store).digest
    store.backend.replace(ref_path("small"), ref_to(digest))
    store.verify("small").raise_first()
    store.backend.replace(ref_path("small"), ref_to(digest, schema=2, something="new"))
    check_refused(store)
    with pytest.raises(UnsupportedFormat, match="use a newer one"):
        store.ref("small")
    with pytest.raises(UnsupportedFormat):
        store.pin("small")
    store.remove("small")
    assert store.names() == []


def test_a_manifest(small):
    store = Store.in_memory()
    manifest = json.loads(small().build(store).to_bytes())
    data = canonical_bytes({**manifest, "schema": 4, "something": "new"})
    digest = hashlib.sha256(data).hexdigest()
    store.backend.replace(manifest_path(digest), data)
    store.backend.replace(ref_path("small"), ref_to(digest))
    check_refused(store)
    with pytest.raises(UnsupportedFormat, match="use a newer one"):
        store.resolve("small")


def test_a_chunk(small):
    store = Store.in_memory()
    manifest = small().build(store)
    entry = manifest.chunks[0]
    data = store.backend.get(chunk_path(entry.key), 1 << 20)
    head = data[: entry.header_bytes].replace(b'"version":"1"', b'"version":"3"')
    assert head != data[: entry.header_bytes]
    store.backend.replace(chunk_path(entry.key), head + data[entry.header_bytes :])
    with pytest.raises(CorruptEntry):  # of a cache of version 1 it is damage: its manifest pins the header
        store.open_reader("small")
    pinned = replace(entry, header_checksum=hashlib.sha256(head).hexdigest())
    store.commit("small", replace(manifest, chunks=(pinned, *manifest.chunks[1:])))
    with pytest.raises(UnsupportedFormat, match="use a newer one"):
        store.open_reader("small")
    with pytest.raises(UnsupportedFormat, match="use a newer one"):
        store.verify("small").raise_first()
    with pytest.raises(CorruptEntry):  # its key is of version 1: the next build replaces it
        store.chunk_entry(entry.key)
    assert isinstance(parse_index(data[: entry.header_bytes], len(data), "chunk"), ChunkIndex)
