"""A manifest is either right in every field or refused."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cag_store import Manifest, Store
from cag_store.errors import CorruptEntry, UnsupportedFormat
from cag_store.jsontext import canonical_bytes
from cag_store.ref import Ref


@pytest.fixture(scope="module")
def manifest(small_class):
    return small_class().put(Store.in_memory(), fidelity={"mean_kl": 0.0}, build={"seconds": 1.5})


def test_round_trip(manifest):
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data
    assert again.digest == manifest.digest
    assert "é".encode() in data
    assert manifest.num_tokens == 20
    assert manifest.raw_bytes == manifest.kv.raw_bytes(20)
    assert manifest.stored_bytes == manifest.blob_bytes + sum(chunk.stored_bytes for chunk in manifest.chunks)


CHANGES = [
    ("num_tokens", 21),
    ("raw_bytes", 1),
    ("stored_bytes", 0),
    ("blob_bytes", -1),
    ("created_at", "yesterday"),
    ("codec", "lossless"),
    ("codec", None),
    ("fidelity", []),
    ("layout", None),
    ("chunks", []),
    ("chunks", {}),
    ("chunks.0.key", "../../etc/passwd"),
    ("chunks.0.key", "A" * 64),
    ("chunks.0.start", 1),
    ("chunks.1.start", 7),
    ("chunks.1.num_tokens", 9),
    ("chunks.1.num_tokens", 0),
    ("chunks.1.num_tokens", 8.0),
    ("chunks.1.num_tokens", True),
    ("chunks.0.raw_bytes", 1 << 62),
    ("chunks.0.header_bytes", 1 << 40),
    ("chunks.0.header_checksum", ""),
    ("chunks.0.stored_bytes", 1 << 70),
    ("documents.0.start", 11),
    ("documents.0.end", 0),
    ("documents.1.end", 21),
    ("documents.1.start", 5),
    ("documents.1.doc_id", "d0"),
    ("documents.0.sha256", None),
    ("documents.0.title", 3),
    ("kv.num_layers", 2),
    ("kv.num_layers", 1 << 40),
    ("kv.num_kv_heads", [2, 1]),
    ("kv.num_kv_heads", [2, 1, 0]),
    ("kv.head_dim", [8, 16, 1 << 30]),
    ("kv.dtype", "float64"),
    ("kv.rope", 10000),
    ("kv.chunk_tokens", 4),
    ("model.id", None),
    ("model.adapter_fingerprint", 3),
]


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=lambda item: str(item)[:30])
def test_wrong_fields_are_refused(manifest, path, value):
    changed = copy.deepcopy(json.loads(manifest.to_bytes()))
    *parents, name = [int(step) if step.isdigit() else step for step in path.split(".")]
    place = changed
    for step in parents:
        place = place[step]
    place[name] = value
    with pytest.raises(CorruptEntry):
        Manifest.from_json(changed)
    del place[name]
    with pytest.raises(CorruptEntry):
        Manifest.from_json(changed)


@pytest.mark.parametrize("place", ["", "model", "kv", "chunks.0", "documents.0"])
def test_unknown_fields_are_refused(manifest, place):
    changed = json.loads(manifest.to_bytes())
    target = changed
    for step in filter(None, place.split(".")):
        target = target[int(step) if step.isdigit() else step]
    target["new"] = 1
    with pytest.raises(CorruptEntry, match="new"):
        Manifest.from_json(changed)


@pytest.mark.parametrize("schema", [0, 4, "1", None, True])
def test_other_schemas_are_refused(manifest, schema):
    with pytest.raises(UnsupportedFormat):
        Manifest.from_json({**json.loads(manifest.to_bytes()), "schema": schema})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
OPAQUE = {"layout", "versions", "machine", "build", "fidelity", "codec", "created_at"}


@settings(max_examples=300)
@given(st.data())
def test_fuzzed_manifests(manifest, data):
    value = json.loads(manifest.to_bytes())
    place, key = value, data.draw(st.sampled_from(sorted(set(value) - OPAQUE)))
    while isinstance(place[key], (dict, list)) and data.draw(st.booleans()):
        place = place[key]
        steps = sorted(place) if isinstance(place, dict) else range(len(place))
        if not steps:
            break
        key = data.draw(st.sampled_from(steps))
    place[key] = data.draw(JSON)
    try:
        found = Manifest.from_bytes(canonical_bytes(value))
    except (CorruptEntry, UnsupportedFormat):
        return
    assert Manifest.from_bytes(found.to_bytes()) == found


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_fuzzed_bytes(data):
    with pytest.raises((CorruptEntry, UnsupportedFormat)):
        Manifest.from_bytes(data)
    with pytest.raises((CorruptEntry, UnsupportedFormat)):
        Ref.from_bytes(data, "x")


def test_refs_know_their_name_and_their_checksum():
    ref = Ref("x", "ab" * 32, True, None, "2026-01-02T03:04:05Z")
    assert Ref.from_bytes(ref.to_bytes(), "x") == ref
    with pytest.raises(CorruptEntry, match="name"):
        Ref.from_bytes(ref.to_bytes(), "y")
    with pytest.raises(CorruptEntry, match="check"):
        Ref.from_bytes(ref.to_bytes().replace(b'"pinned":true', b'"pinned":false'), "x")
    with pytest.raises(UnsupportedFormat):
        Ref.from_bytes(ref.to_bytes().replace(b'"schema":1', b'"schema":2'), "x")
