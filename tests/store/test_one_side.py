"""Caches of one side, whose keys are values as well: stored once, and never taken for caches of two sides."""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cag_store import Manifest, Store, chunk_key
from cag_store.codecs.transform import Basis
from cag_store.errors import CorruptEntry, UnencodableArray, UnsupportedFormat
from cag_store.jsontext import canonical_bytes
from cag_store.paths import chunk_path
from cag_store.testing.bases import sample_basis

GOLDEN = Path(__file__).parent / "golden" / "store-3.json"


@pytest.fixture
def one_sided(small_class):
    return lambda codec="lossless", **changes: small_class(codec, sides=1, **changes)


@pytest.mark.parametrize("codec", ["lossless", "int8", "int4"])
@pytest.mark.parametrize("in_files", [True, False], ids=["files", "memory"])
def test_it_is_read_as_it_was_written(codec, in_files, one_sided, tmp_path):
    """In files by compiled jobs, elsewhere by the steps that these take."""
    store = Store.open(tmp_path / "store") if in_files else Store.in_memory()
    cache = one_sided(codec, num_tokens=50, chunk_tokens=16)
    manifest, whole, late = cache.build(store), cache.buffers(), cache.buffers(spare=0)
    with store.reader(manifest) as reader:
        reader.load(whole)
        assert reader.coded_shapes() is None
        assert reader.stream_shapes() is None
        reader.load([(side[:, 16:],) for (side,) in late], first_tokens=[16, 16, 16])
    for (side,), (end,) in zip(whole, late, strict=True):
        assert np.array_equal(side[:, 16:50], end[:, 16:])
    if codec == "lossless":
        cache.check(whole)
    store.verify("small").raise_first()


def test_a_basis_of_one_side(small, one_sided):
    """It has directions for keys alone; it decodes no values, and one of two sides is as good for keys."""
    store = Store.in_memory()
    for sides in (1, 2):
        basis = sample_basis((2, 1, 2), (8, 16, 4), 2, sides=sides)
        again = Basis.from_bytes(basis.to_bytes())
        assert [len(group) for group in again.groups] == [sides] * 2
        assert again.to_bytes() == basis.to_bytes()
        config = {"id": "transform", "basis": store.put_blob(basis.to_bytes()), "joint_layers": 2, "step": -256}
        one_sided(config).build(store, f"of-{sides}")
        store.verify(f"of-{sides}").raise_first()
        if sides == 1:
            with pytest.raises(UnencodableArray, match="the cache has values"):
                small(config).build(store)
    header = basis.to_bytes().replace(b"[[32,32],[8,8]]", b"[[32,32],[8]]  ")
    assert header != basis.to_bytes()
    with pytest.raises(CorruptEntry):
        Basis.from_bytes(header)


def test_it_takes_half_of_the_room(small, one_sided):
    one, two = one_sided().build(Store.in_memory()), small().build(Store.in_memory())
    assert 2 * one.raw_bytes == two.raw_bytes
    assert [chunk.raw_bytes for chunk in one.chunks] == [one.kv.raw_bytes(chunk.num_tokens) for chunk in one.chunks]


def test_nothing_else_has_changed_its_bytes(small):
    manifest = small().build(Store.in_memory())
    assert b"sides" not in manifest.to_bytes() + manifest.context.canonical
    assert manifest.to_json()["schema"] == 1


def test_its_keys_are_its_own(small, one_sided):
    contexts = one_sided().context, small().context
    one, two = (chunk_key("", [1, 2, 3], context) for context in contexts)
    assert one != two


def test_buffers_and_arrays_of_two_sides_are_refused(one_sided):
    cache, store = one_sided(), Store.in_memory()
    manifest = cache.build(store)
    with store.reader(manifest) as reader, pytest.raises(UnencodableArray, match="expected 1 buffers"):
        reader.load([2 * sides for sides in cache.buffers()])
    cache = one_sided(seed=1)
    header = cache.header("", 0)
    with pytest.raises(UnencodableArray, match="sides do not fit"):
        store.put_chunk(header, [2 * sides for sides in cache.arrays(0)], cache.ids(0))


def test_a_manifest_that_says_otherwise_than_its_chunks_is_refused(one_sided):
    """Whoever counts other sides would look for values where keys are."""
    store = Store.in_memory()
    manifest = one_sided().build(store)
    value = json.loads(manifest.to_bytes())
    assert value["schema"] == 3
    del value["kv"]["sides"]
    for schema in (1, 3):
        with pytest.raises(CorruptEntry):
            Manifest.from_json(value | {"schema": schema})
    doubled = [replace(chunk, raw_bytes=2 * chunk.raw_bytes) for chunk in manifest.chunks]
    forged = replace(manifest, kv=replace(manifest.kv, sides=2), chunks=tuple(doubled))
    with store.build_lease():
        store.commit("small", forged)
    with pytest.raises(CorruptEntry):
        store.open_reader("small")


def test_a_chunk_of_the_other_version_is_refused(one_sided):
    store = Store.in_memory()
    manifest = one_sided().build(store)
    entry = manifest.chunks[0]
    data = store.backend.get(chunk_path(entry.key), 1 << 20)
    head = data[: entry.header_bytes].replace(b'"version":"2"', b'"version":"1"')
    assert head != data[: entry.header_bytes]
    store.backend.replace(chunk_path(entry.key), head + data[entry.header_bytes :])
    pinned = replace(entry, header_checksum=hashlib.sha256(head).hexdigest())
    store.commit("small", replace(manifest, chunks=(pinned, *manifest.chunks[1:])))
    with pytest.raises(CorruptEntry):
        store.open_reader("small")


def test_each_damaged_byte_of_a_chunk_is_found(one_sided):
    store = Store.in_memory()
    cache = one_sided("int8", num_tokens=4, chunk_tokens=4)
    path = chunk_path(cache.build(store).chunks[0].key)
    whole = store.backend.get(path, 1 << 20)
    for place in range(len(whole)):
        store.backend.replace(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not store.verify("small").ok, place


def test_a_program_of_before_refuses_it_by_its_schema(one_sided):
    """As this one refuses what comes next."""
    value = json.loads(one_sided().build(Store.in_memory()).to_bytes())
    with pytest.raises(UnsupportedFormat, match="use a newer one"):
        Manifest.from_bytes(canonical_bytes(value | {"schema": 4}))


def test_a_golden_cache():
    """Written by the first version with one side; it reads for ever."""
    golden = json.loads(GOLDEN.read_text())
    store = Store.in_memory()
    for path, data in golden["objects"].items():
        store.backend.replace(path, base64.b64decode(data))
    store.verify("golden").raise_first()
    _, manifest, reader = store.open_reader("golden")
    shapes = zip(manifest.kv.num_kv_heads, manifest.kv.head_dim, strict=True)
    buffers = [(np.zeros((heads, manifest.num_tokens, dim), np.uint16),) for heads, dim in shapes]
    with reader:
        reader.load(buffers)
        assert reader.token_ids().tolist() == golden["token_ids"]
    decoded = b"".join(side.tobytes() for (side,) in buffers)
    assert hashlib.sha256(decoded).hexdigest() == golden["decoded_sha256"]
