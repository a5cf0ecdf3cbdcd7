"""Snapshots as files: exact to the bit, one spelling, and every defect a typed error."""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cag_store import CacheStates, StateArray, StateEntry, Store, copy_cache
from cag_store.codecs import codec_from_config
from cag_store.errors import CorruptEntry, EntryConflict, EntryNotFound, UnencodableArray, UnsupportedFormat
from cag_store.jsontext import canonical_bytes
from cag_store.state_entry import state_key
from independent_reader import Folder, read_cache

CHUNK = "ab" * 32
RNG = np.random.default_rng(0)
STATES = {
    "layers.000.conv.0": StateArray("bfloat16", RNG.integers(0, 1 << 16, (1, 6, 4)).astype("<u2")),
    "layers.000.recurrent.0": StateArray("float32", RNG.standard_normal((1, 2, 3, 5)).astype("<f4")),
    "layers.001.conv.0": StateArray("float16", RNG.standard_normal(7).astype("<f2")),
}


@pytest.fixture
def store(tmp_path):
    return Store.open(tmp_path)


@pytest.fixture
def entry(store):
    return store.put_states(CHUNK, 12, STATES)


def test_states_come_back_to_the_bit(store, entry):
    found = store.states(entry)
    assert list(found) == sorted(STATES)
    for name, (dtype, array) in STATES.items():
        assert found[name].dtype == dtype and found[name].array.shape == array.shape
        assert found[name].array.tobytes() == array.tobytes()
    assert entry.raw_bytes == sum(array.nbytes for _, array in STATES.values())
    assert entry.stored_bytes == store.backend.stat(entry.path).size_bytes
    assert entry == store.state_entry(CHUNK) and entry.key == state_key(CHUNK)


def test_values_that_are_no_numbers_are_kept(store):
    odd = np.array([[np.nan, np.inf, -0.0, 1e-45]], dtype="<f4")
    entry = store.put_states(CHUNK, 1, {"a": StateArray("float32", odd)})
    assert store.states(entry)["a"].array.tobytes() == odd.tobytes()


def test_the_file_is_a_safetensors_container(store, entry, tmp_path):
    from safetensors import safe_open

    with safe_open(tmp_path / entry.path, framework="np") as stream:
        assert set(stream.keys()) == set(STATES)
        assert stream.metadata()["format"] == "cag-state"
        assert json.loads(stream.metadata()["state"])["num_tokens"] == 12


def test_the_first_one_wins(store, entry):
    assert store.put_states(CHUNK, 12, {"a": StateArray("float32", np.zeros(1, "<f4"))}) == entry


def test_every_byte_counts(store, entry):
    data = store.backend.get(entry.path, 1 << 20)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x20
        store.backend.replace(entry.path, bytes(changed))
        with pytest.raises(CorruptEntry):
            store.states(entry)
        with pytest.raises((CorruptEntry, EntryNotFound)):
            store.state_entry(CHUNK)  # and it is gone
        with pytest.raises(EntryNotFound):
            store.states(entry)
    for length in (0, 7, 8, entry.header_bytes, len(data) - 1):
        store.backend.replace(entry.path, data[:length])
        with pytest.raises(CorruptEntry):
            store.states(entry)


def test_a_snapshot_behind_another_chunk_is_none_of_this(store, entry):
    other = store.put_states("cd" * 32, 12, STATES)
    store.backend.replace(entry.path, store.backend.get(other.path, 1 << 20))
    with pytest.raises(CorruptEntry):
        store.states(entry)
    with pytest.raises(CorruptEntry, match="another chunk"):
        store.state_entry(CHUNK)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "cag-chunk"}, CorruptEntry),
        ({"version": "2"}, UnsupportedFormat),
        ({"tensors": []}, CorruptEntry),
        ({"tensors": [["a", "float64", [1], 1, "0" * 32]]}, CorruptEntry),
        ({"tensors": [["a", "float32", [0], 1, "0" * 32]]}, CorruptEntry),
        ({"tensors": [["a", "float32", [1 << 20, 1 << 20], 1, "0" * 32]]}, CorruptEntry),
        ({"tensors": [["a", "float32", [1], 1 << 60, "0" * 32]]}, CorruptEntry),
        ({"tensors": [["../a", "float32", [1], 1, "0" * 32]]}, CorruptEntry),
        ({"tensors": [["b", "float32", [1], 1, "0" * 32], ["a", "float32", [1], 1, "0" * 32]]}, CorruptEntry),
        ({"codec": {"id": "int8"}}, CorruptEntry),
        ({"key": "00" * 32}, CorruptEntry),
        ({"more": 1}, CorruptEntry),
    ],
)
def test_forged_headers(store, entry, change, error):
    """Under a manifest that pins just these bytes."""
    data = store.backend.get(entry.path, 1 << 20)
    header = json.loads(data[8 : entry.header_bytes])
    metadata = header["__metadata__"]
    facts = json.loads(metadata["state"])
    for key, value in change.items():
        (metadata if key in metadata else facts)[key] = value
    metadata["state"] = canonical_bytes(facts).decode()
    metadata["sha256"] = hashlib.sha256(metadata["state"].encode()).hexdigest()
    text = canonical_bytes(header)
    text += b" " * (-len(text) % 8)
    forged = len(text).to_bytes(8, "little") + text
    whole = forged + data[entry.header_bytes :]
    store.backend.replace(entry.path, whole)
    checksum = hashlib.sha256(forged).hexdigest()
    pinned = replace(entry, header_bytes=len(forged), header_checksum=checksum, stored_bytes=len(whole))
    with pytest.raises(error):
        store.states(pinned)


@pytest.mark.parametrize(
    "states",
    [
        {},
        {"A": StateArray("float32", np.zeros(1, "<f4"))},
        {"a": StateArray("float32", np.zeros((1, 0), "<f4"))},
        {"a": StateArray("float32", np.zeros(1, "<f2"))},
        {"a": StateArray("float32", np.zeros((), "<f4"))},
    ],
)
def test_what_is_no_state_is_refused(store, states):
    with pytest.raises(UnencodableArray):
        store.put_states(CHUNK, 1, states)


@pytest.fixture(params=["lossless", "int8"])
def cached(request, small, store):
    """A cache with snapshots behind its second chunk and at its end, both of the chain of exact chunks."""
    exact, cache = small("lossless"), small(request.param)
    keys = [entry.key for entry in exact.put_chunks(store)]
    entries = tuple(store.put_states(keys[index], tokens, STATES) for index, tokens in ((1, 16), (2, 20)))
    states = CacheStates(exact.codec.config(), entries)
    return store, cache.build(store, states=states)


def test_a_cache_with_snapshots(cached, tmp_path, small):
    store, manifest = cached
    assert json.loads(manifest.to_bytes())["schema"] == 2
    assert store.resolve("small")[1] == manifest
    store.verify("small").raise_first()
    store.gc(grace_s=0)
    there = Store.open(tmp_path / "there")
    assert copy_cache(store, there, "small").copied_bytes == manifest.stored_bytes
    there.verify("small").raise_first()
    usage = there.usage()
    assert usage.caches["small"].own_bytes == usage.total_bytes
    found = read_cache(Folder(there.backend.root), "small")
    for states in found.states:
        assert {name: array.tobytes() for name, array in states.items()} == {
            name: array.tobytes() for name, (_, array) in STATES.items()
        }
    assert len(found.states) == 2 and json.loads(small().build(Store.in_memory()).to_bytes())["schema"] == 1


def test_a_cache_whose_snapshot_is_gone(cached):
    store, manifest = cached
    store.backend.delete(manifest.states.snapshots[0].path)
    (problem,) = store.verify("small").problems
    assert isinstance(problem, EntryNotFound)
    with pytest.raises(EntryNotFound):
        store.commit("again", manifest)


def test_other_bytes_at_the_destination_are_a_conflict(cached, tmp_path):
    store, manifest = cached
    there, last = Store.open(tmp_path / "there"), manifest.states.snapshots[-1]
    other = STATES | {"layers.000.conv.0": StateArray("bfloat16", np.zeros((1, 6, 4), "<u2"))}
    there.put_states(last.chunk, last.num_tokens, other)
    with pytest.raises(EntryConflict, match="snapshot"):
        copy_cache(store, there, "small")
    assert there.names() == []


def test_a_golden_cache():
    """Written by the first version with snapshots; it reads for ever."""
    golden = json.loads((Path(__file__).parent / "golden" / "store-2.json").read_text())
    store = Store.in_memory()
    for path, data in golden["objects"].items():
        store.backend.replace(path, base64.b64decode(data))
    store.verify("golden").raise_first()
    states = store.states(store.resolve("golden")[1].states.snapshots[-1])
    decoded = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, (_, array) in states.items()}
    assert decoded == golden["states_sha256"]


def listed(entry, **changes):
    codec = codec_from_config("lossless").config()
    return CacheStates(codec, (entry,)).to_json() | changes


def test_what_a_manifest_says_of_snapshots(entry):
    assert CacheStates.from_json(listed(entry), "states", [6, 12]).snapshots == (entry,)
    assert StateEntry.from_json(listed(entry)["snapshots"][0], "entry") == entry
    for value, ends in (
        (listed(entry), [6, 13]),  # not at the end of the prefix
        (listed(entry, snapshots=[]), [6, 12]),
        (listed(entry, snapshots=listed(entry)["snapshots"] * 2), [6, 12]),
        (listed(entry, codec={"id": "int8"}), [6, 12]),
        (listed(entry, codec={"id": "lossless"}), [6, 12]),  # not in full
        (listed(replace(entry, key="00" * 32)), [6, 12]),
        (listed(replace(entry, num_tokens=7)), [6, 7, 12]),
        (listed(entry, more=1), [6, 12]),
    ):
        with pytest.raises(CorruptEntry):
            CacheStates.from_json(value, "states", ends)
