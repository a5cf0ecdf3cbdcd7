"""Every way in which a store can be damaged ends in a typed error; wrong bytes never come back."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cag_store import Store
from cag_store.blob import MAX_BLOB_BYTES, pack_blob
from cag_store.chunk import parse_index
from cag_store.chunk_files import read_entry
from cag_store.codecs import Zstd
from cag_store.errors import CorruptEntry, EntryNotFound, StoreError, UnsupportedFormat
from cag_store.jsontext import canonical_bytes
from cag_store.paths import blob_path, chunk_path, manifest_path, ref_path


def read_all(store, cache):
    """Everything that a user of the cache gets to see; checked, so that only an error may differ."""
    _, manifest = store.resolve("small")
    with store.reader(manifest) as reader:
        assert np.array_equal(reader.token_ids(), cache.token_ids)
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)
    assert [store.get_blob(document.sha256) for document in manifest.documents] == cache.texts
    assert manifest.layout == {"marker": 1}


def objects(store):
    return {
        info.path: store.backend.get(info.path, 1 << 30)
        for folder in ("refs", "manifests", "chunks", "blobs")
        for info in store.backend.list(folder)
    }


def positions(data, count):
    """Positions over the whole of `data`, every one of small files."""
    return range(0, len(data), max(1, len(data) // count))


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_a_flipped_bit_anywhere_is_an_error(small, flip):
    cache = small(num_tokens=12)
    store = Store.in_memory(workers=1)
    cache.build(store)
    for path, data in objects(store).items():
        for position in positions(data, 80):
            damaged = bytearray(data)
            damaged[position] ^= flip
            store.backend.replace(path, bytes(damaged))
            with pytest.raises(StoreError):
                read_all(store, cache)
            assert not verified(store), (path, position)
        store.backend.replace(path, data)
    read_all(store, cache)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["lossless", "int8", "int4"])
def test_every_single_flipped_bit_is_an_error(small, codec):
    """Of every file: ref, manifest, header, token ids, each segment, each blob."""
    cache = small(codec, num_tokens=4)
    store = Store.in_memory(workers=1)
    manifest = cache.build(store)
    num_bits = 0
    for path, data in objects(store).items():
        for position in range(len(data)):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                store.backend.replace(path, bytes(damaged))
                with pytest.raises(StoreError):
                    open_all(store, manifest)
                assert not verified(store), (path, position, bit)
                num_bits += 1
        store.backend.replace(path, data)
    assert num_bits == 8 * (manifest.stored_bytes + len(manifest.to_bytes()) + len(objects(store)[ref_path("small")]))
    open_all(store, manifest)


def open_all(store, manifest):
    """Read all that there is, without the codec; only an error may say that something differs."""
    _, found, reader = store.open_reader("small")
    with reader:
        shapes = zip(manifest.kv.num_kv_heads, manifest.kv.head_dim, strict=True)
        reader.load([tuple(np.zeros((heads, 4, dim), "<u2") for _ in range(2)) for heads, dim in shapes])
    for document in found.documents:
        store.get_blob(document.sha256)
    assert found == manifest


def verified(store):
    try:
        return store.verify("small").ok
    except EntryNotFound:
        return False


def test_a_truncation_or_extension_anywhere_is_an_error(small):
    cache = small(num_tokens=12)
    store = Store.in_memory(workers=1)
    cache.build(store)
    for path, data in objects(store).items():
        for changed in (*(data[:end] for end in positions(data, 40)), data + b"\0", data + data):
            store.backend.replace(path, changed)
            with pytest.raises(StoreError):
                read_all(store, cache)
            assert not verified(store), (path, len(changed))
        store.backend.replace(path, data)
    read_all(store, cache)


def test_missing_objects_are_errors(small):
    cache = small(num_tokens=12)
    store = Store.in_memory()
    cache.build(store)
    for path, data in objects(store).items():
        store.backend.delete(path)
        with pytest.raises(EntryNotFound):
            read_all(store, cache)
        assert not verified(store)
        store.backend.replace(path, data)


def test_swapped_objects_are_errors(small):
    cache, other = small(), small(seed=1)
    store = Store.in_memory()
    cache.build(store)
    other.texts = [b"other text 1", b"other text two"]
    other.build(store, "other")
    found = objects(store)
    for path, data in found.items():
        for other_path, other_data in found.items():
            if path != other_path and path.split("/")[0] == other_path.split("/")[0]:
                store.backend.replace(path, other_data)
                assert not (verified(store) and store.verify("other").ok), (path, other_path)
        store.backend.replace(path, data)


def test_swapped_segments_within_a_chunk_are_errors(small):
    cache = small({"id": "lossless", "packers": []})
    store = Store.in_memory()
    entry = cache.build(store).chunks[0]
    path = chunk_path(entry.key)
    data = store.backend.get(path, 1 << 20)
    index = parse_index(data[: entry.header_bytes], len(data), path)
    start, middle, end = index.offsets(entry.header_bytes)[:3]
    assert middle - start == end - middle
    store.backend.replace(path, data[:start] + data[middle:end] + data[start:middle] + data[end:])
    with pytest.raises(CorruptEntry, match="keys of layer 0"):
        read_all(store, cache)


def test_a_damaged_chunk_is_removed_for_the_next_build(small):
    cache = small()
    store = Store.in_memory()
    manifest = cache.build(store)
    path = chunk_path(manifest.chunks[1].key)
    data = store.backend.get(path, 1 << 20)
    for position in (3, 100, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[position] ^= 4
        store.backend.replace(path, bytes(damaged))
        with pytest.raises(CorruptEntry):
            store.chunk_entry(manifest.chunks[1].key)
        assert not store.has_chunk(manifest.chunks[1].key)
        assert cache.build(store) == manifest
        store.backend.replace(path, bytes(damaged))
        assert cache.build(store) == manifest
        read_all(store, cache)


def test_damage_is_seen_in_a_chunk_that_no_manifest_pins(small):
    store = Store.in_memory()
    entry = small().put_chunks(store)[1]
    path = chunk_path(entry.key)
    data = store.backend.get(path, 1 << 20)
    for position in positions(data, 300):
        damaged = bytearray(data)
        damaged[position] ^= 1
        store.backend.replace(path, bytes(damaged))
        with pytest.raises(CorruptEntry):
            store.chunk_entry(entry.key)
        assert not store.has_chunk(entry.key)


def test_a_manifest_of_another_model_cannot_borrow_chunks(small):
    """The digest guards against accidents; against a forged manifest the chain of keys does."""
    cache = small()
    store = Store.in_memory()
    manifest = cache.build(store)
    for forged in (
        replace(manifest, model=replace(manifest.model, fingerprint="another")),
        replace(manifest, model=replace(manifest.model, adapter_fingerprint="lora")),
        replace(manifest, kv=replace(manifest.kv, compute_dtype="bfloat16")),
        replace(manifest, kv=replace(manifest.kv, rope={"theta": 5.0})),
        replace(manifest, codec={"id": "int8"}),
    ):
        store.commit("forged", forged)
        with pytest.raises(CorruptEntry):
            store.reader(forged)
        assert not store.verify("forged").ok
    assert list(store.backend.live_leases()) == []


def stored_chunk(small):
    cache = small()
    store = Store.in_memory()
    entry = cache.put_chunks(store)[0]
    data = store.backend.get(chunk_path(entry.key), 1 << 20)
    index = parse_index(data[: entry.header_bytes], len(data), "chunk")
    return store, entry, data, index


@pytest.mark.parametrize("length", [0, 1, 7, 8, 1 << 20, (1 << 23) + 8, 1 << 40, (1 << 64) - 8, (1 << 64) - 1])
def test_hostile_header_lengths(small, length):
    store, entry, data, _ = stored_chunk(small)
    store.backend.replace(chunk_path(entry.key), length.to_bytes(8, "little") + data[8:])
    with pytest.raises(CorruptEntry):
        read_entry(store.backend, entry.key)


HOSTILE_SEGMENTS = [
    ["lossless", -1, 10, "0" * 32],
    ["lossless", 1 << 62, 10, "0" * 32],
    ["lossless", 256, -10, "0" * 32],
    ["lossless", 256, 0, "0" * 32],
    ["lossless", 256, 1 << 62, "0" * 32],
    ["int8", 256, 100, "0" * 32],
    [None, 256, 100, "0" * 32],
    ["lossless", 256, True, "0" * 32],
    ["lossless", 256.0, 100, "0" * 32],
    ["lossless", 256, 100, None],
    ["lossless", 256, 100, "0" * 31],
    ["lossless", 256, 100],
    {},
    None,
]


@pytest.mark.parametrize("row", HOSTILE_SEGMENTS)
def test_hostile_segment_tables(small, row):
    _, entry, data, _ = stored_chunk(small)
    value = json.loads(json.loads(data[8 : entry.header_bytes])["__metadata__"]["chunk"])
    value["segments"][0] = row
    with pytest.raises(CorruptEntry):
        parse_index(with_chunk(value), len(data), "chunk")


def with_chunk(value, version="1", tensors=None):
    facts = canonical_bytes(value)
    sha256 = hashlib.sha256(facts).hexdigest()
    metadata = {"chunk": facts.decode(), "format": "cag-chunk", "sha256": sha256, "version": version}
    text = canonical_bytes({"__metadata__": metadata, **(tensors or {})})
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def test_headers_whose_offsets_lie(small):
    """Overlapping, negative, missing or extra tensors: the header must be exactly what its segment table says."""
    _, entry, data, index = stored_chunk(small)
    outer = json.loads(data[8 : entry.header_bytes])
    value = json.loads(outer.pop("__metadata__")["chunk"])
    assert parse_index(with_chunk(value, tensors=outer), len(data), "chunk") == index
    name = "layers.001.keys"
    for tensor in (
        {**outer[name], "data_offsets": [0, 10]},
        {**outer[name], "data_offsets": [-5, 10]},
        {**outer[name], "data_offsets": [0, 1 << 63]},
        {**outer[name], "dtype": "F64"},
        {**outer[name], "shape": [1 << 40]},
    ):
        with pytest.raises(CorruptEntry):
            parse_index(with_chunk(value, tensors={**outer, name: tensor}), len(data), "chunk")
    with pytest.raises(CorruptEntry):
        parse_index(with_chunk(value, tensors={key: outer[key] for key in outer if key != name}), len(data), "chunk")
    with pytest.raises(CorruptEntry):
        parse_index(with_chunk(value, tensors={**outer, "zzz": outer[name]}), len(data), "chunk")
    with pytest.raises(UnsupportedFormat, match="'3'"):
        parse_index(with_chunk(value, "3", outer), len(data), "chunk")


def test_a_bomb_with_a_right_checksum_is_refused(small):
    """Sizes are those of the buffers, so a forged chunk cannot make the reader unpack more."""

    cache = small()
    store = Store.in_memory()
    manifest = cache.put(store)
    entry = manifest.chunks[0]
    path = chunk_path(entry.key)
    data = store.backend.get(path, 1 << 20)
    index = parse_index(data[: entry.header_bytes], len(data), path)
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 30))[:300]
    zstd = 1 + next(i for i, packer in enumerate(cache.codec.packers) if isinstance(packer, Zstd))
    bomb = bytes([2, zstd]) + len(frame).to_bytes(4, "little") + bytes([zstd]) + (0).to_bytes(4, "little") + frame
    sizes, checksums = (len(bomb), *index.sizes[1:]), (xxhash.xxh3_128_hexdigest(bomb), *index.checksums[1:])
    forged = replace(index, sizes=sizes, checksums=checksums)
    start, behind = index.offsets(entry.header_bytes)[:2]
    head = forged.to_bytes()
    body = data[entry.header_bytes : start] + bomb + data[behind:]
    store.backend.replace(path, head + body)
    forged_manifest = replace(manifest, chunks=(forged.entry(head), *manifest.chunks[1:]))
    store.commit("small", forged_manifest)
    with store.reader(forged_manifest) as reader, pytest.raises(CorruptEntry, match="content size"):
        reader.load(cache.buffers())
    assert not store.verify("small").ok


def test_blob_bombs():
    store = Store.in_memory()
    sha = store.put_blob(b"text")
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_BLOB_BYTES + 1))
    store.backend.replace(blob_path(sha), xxhash.xxh3_128_digest(bomb) + bomb)
    with pytest.raises(CorruptEntry, match="more than"):
        store.get_blob(sha)
    for data in (b"", b"x", pack_blob(b"tent"), pack_blob(b"text")[:-1], pack_blob(b"text") + b"x"):
        store.backend.replace(blob_path(sha), data)
        with pytest.raises(CorruptEntry):
            store.get_blob(sha)
        assert store.put_blob(b"text") == sha
        assert store.get_blob(sha) == b"text"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"schema": 1}',
        b"\xff",
        b'{"schema":1,"schema":1}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":"\\ud800"}',
    ],
)
def test_files_that_are_not_what_they_should_be(small, data):
    cache = small()
    store = Store.in_memory()
    manifest = cache.build(store)
    for path in (ref_path("small"), manifest_path(manifest.digest), chunk_path(manifest.chunks[0].key)):
        kept = store.backend.get(path, 1 << 20)
        store.backend.replace(path, data)
        with pytest.raises(StoreError):
            read_all(store, cache)
        with pytest.raises(CorruptEntry):
            read_entry(store.backend, manifest.chunks[0].key) if path.startswith("chunks") else store.verify(
                "small"
            ).raise_first()
        store.backend.replace(path, kept)


@settings(max_examples=300)
@given(st.binary(max_size=300), st.integers(0, 1 << 64))
def test_fuzzed_headers(data, size):
    for header in (data, b"12345678" + b'{"__metadata__":' + data):
        with pytest.raises((CorruptEntry, UnsupportedFormat)):
            parse_index(header, size, "fuzz")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_chunk_facts(small_index, data):
    value, tensors, size = small_index
    key = data.draw(st.sampled_from(sorted(set(value) - {"start", "parent", "key"})))
    changed = data.draw(JSON)
    if canonical_like(changed) == canonical_like(value[key]):
        return
    with pytest.raises((CorruptEntry, UnsupportedFormat)):
        parse_index(with_chunk({**value, key: changed}, tensors=tensors), size, "fuzz")


def canonical_like(value):
    return json.dumps(value, sort_keys=True)


@pytest.fixture(scope="module")
def small_index(small_class):
    store = Store.in_memory()
    entry = small_class().put_chunks(store)[0]
    data = store.backend.get(chunk_path(entry.key), 1 << 20)
    outer = json.loads(data[8 : entry.header_bytes])
    return json.loads(outer.pop("__metadata__")["chunk"]), outer, len(data)
