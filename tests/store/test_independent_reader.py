"""docs/format.md is enough to read what the store writes: the independent reader agrees to the bit, or refuses too."""

import ast
import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import independent_reader
import independent_transform
from cag_store import Store, codec_ids
from cag_store.testing.bases import sample_basis
from independent_reader import DECODERS, Folder, decode, decode_group, read_cache
from independent_transform import FormatError

GOLDEN = Path(__file__).parent / "golden"
HEADS, DIMS = (2, 1, 2), (8, 16, 4)  # of `small_class`
CODECS = [
    "lossless",
    {"id": "lossless", "transform": {"id": "rotate", "bits": 0}, "packers": []},
    {"id": "lossless", "transform": {"id": "rotate", "bits": 5}, "packers": [{"id": "zstd", "level": 3}]},
    {"id": "lossless", "packers": [{"id": "ranks"}]},
    {"id": "lossless", "packers": [{"id": "zstd"}, {"id": "ranks"}]},
    "int8",
    {"id": "int8", "group_tokens": 3, "packer": {"id": "ranks"}},
    {"id": "int8", "group_tokens": 3, "packer": {"id": "zstd"}},
    {"id": "int8", "group_tokens": 1, "exact_tokens": 0},
    {"id": "int8", "group_tokens": 5, "exact_tokens": 11},
    "int4",
    {"id": "int4", "group_tokens": 3, "group_channels": 3, "packer": {"id": "zstd"}, "recent_tokens": 0},
    {"id": "int4", "group_tokens": 5, "exact_tokens": 11, "chunk_tokens": 7, "wide_key_layers": [0, 2, 40]},
    {"id": "int4", "group_channels": 5, "recent_tokens": 2, "chunk_tokens": 8, "wide_key_layers": [1]},
]


@pytest.mark.parametrize("module", [independent_reader, independent_transform], ids=lambda module: module.__name__)
def test_it_uses_nothing_of_the_store(module):
    tree = ast.parse(Path(module.__file__).read_text())
    found = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    allowed = {"collections", "hashlib", "json", "math", "re", "struct", "dataclasses", "pathlib"}
    allowed |= {"numpy", "xxhash", "zstandard"}
    assert found <= allowed | {"independent_transform"}


def test_it_knows_every_codec():
    assert set(DECODERS) == set(codec_ids())


def same_bits(one, other):
    return one.shape == other.shape and np.array_equal(
        np.ascontiguousarray(one).view(np.uint8), np.ascontiguousarray(other).view(np.uint8)
    )


def check_agreement(objects, store, built, cache, name="small"):
    found = read_cache(objects, name)
    assert found.manifest == json.loads(built.to_bytes())
    assert found.texts == cache.texts
    assert np.array_equal(found.token_ids, cache.token_ids)
    buffers = cache.buffers(spare=0)
    with store.reader(built) as reader:
        reader.load(buffers)
    for sides, expected in zip(found.arrays, buffers, strict=True):
        assert all(map(same_bits, sides, expected)) and len(sides) == len(expected)


@settings(max_examples=40)
@given(
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(sorted(independent_reader.ITEM)),
    num_tokens=st.integers(2, 40),
    chunk_tokens=st.integers(1, 17),
    seed=st.integers(0, 1000),
    sides=st.sampled_from([2, 1]),
)
def test_random_caches(small_class, codec, dtype, num_tokens, chunk_tokens, seed, sides):
    cache = small_class(codec, num_tokens, chunk_tokens, dtype, seed, sides)
    store = Store.in_memory(workers=1)
    built = cache.build(store)
    objects = {path: data for path, (data, _) in store.backend._objects.items()} | {"format": b"cag-store 1\n"}
    check_agreement(objects, store, built, cache)


@settings(max_examples=8)
@given(
    joint_layers=st.integers(1, 3),
    pairing=st.sampled_from(["halves", "adjacent"]),
    step=st.sampled_from([-500, -256, 0]),
    dtype=st.sampled_from(sorted(independent_reader.ITEM)),
    exact_tokens=st.integers(0, 9),
    num_tokens=st.integers(2, 90),
    chunk_tokens=st.integers(6, 80),
    sides=st.sampled_from([2, 1]),
)
def test_random_caches_with_a_basis(
    small_class, joint_layers, pairing, step, dtype, exact_tokens, num_tokens, chunk_tokens, sides
):
    store = Store.in_memory(workers=1)
    found = sample_basis(HEADS, DIMS, joint_layers, step + 512, pairing=pairing, sides=sides)
    basis = store.put_blob(found.to_bytes())
    config = {
        "id": "transform", "basis": basis, "joint_layers": joint_layers, "step": step, "exact_tokens": exact_tokens,
    }  # fmt: skip
    cache = small_class(config, num_tokens, chunk_tokens, dtype, sides=sides)
    built = cache.build(store)
    objects = {path: data for path, (data, _) in store.backend._objects.items()} | {"format": b"cag-store 1\n"}
    check_agreement(objects, store, built, cache)


def test_a_folder(tmp_path, small):
    store, cache = Store.open(tmp_path / "store"), small()
    built = cache.build(store)
    store.pin("small")
    store.set_ttl("small", 100)
    check_agreement(Folder(tmp_path / "store"), store, built, cache)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("store-*.json")), ids=lambda path: path.stem)
def test_golden_stores(path):
    golden = json.loads(path.read_text())
    objects = {name: base64.b64decode(data) for name, data in golden["objects"].items()}
    found = read_cache({"format": b"cag-store 1\n", **objects}, "golden")
    assert found.token_ids.tolist() == golden["token_ids"]
    decoded = b"".join(side.tobytes() for pair in found.arrays for side in pair)
    assert hashlib.sha256(decoded).hexdigest() == golden["decoded_sha256"]


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("segments-*.json")), ids=lambda path: path.stem)
def test_golden_segments(path):
    for segment in json.loads(path.read_text()):
        side = ("keys", "values").index(segment["side"])
        data = base64.b64decode(segment["encoded"])
        start, layer = segment.get("start", 0), segment.get("layer", 0)
        found = decode(data, segment["shape"], segment["codec"], segment["dtype"], side, start, layer)
        assert hashlib.sha256(found.tobytes()).hexdigest() == segment["decoded_sha256"]


def test_golden_segments_with_a_basis():
    golden = json.loads((GOLDEN / "transform-1.json").read_text())
    basis = base64.b64decode(golden["basis"])
    for segment in golden["segments"]:
        side, data = ("keys", "values").index(segment["side"]), base64.b64decode(segment["encoded"])
        place = side, segment["start"], segment["first_layer"], basis
        found = decode_group(data, segment["shapes"], golden["codec"], segment["dtype"], *place)
        assert hashlib.sha256(b"".join(array.tobytes() for array in found)).hexdigest() == segment["decoded_sha256"]


def test_it_refuses_what_the_store_refuses(small):
    """A flipped bit in every file: the document says enough to see it."""
    store = Store.in_memory(workers=1)
    small(num_tokens=12).build(store)
    objects = {path: data for path, (data, _) in store.backend._objects.items()} | {"format": b"cag-store 1\n"}
    for path, data in objects.items():
        for position in range(0, len(data), max(1, len(data) // 40)):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 8
            with pytest.raises((FormatError, ValueError, LookupError, TypeError)):
                read_cache({**objects, path: bytes(damaged)}, "small")
