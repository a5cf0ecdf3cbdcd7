"""Defects that hostile or unlucky files once had, each by its name."""

import hashlib
import json
import os
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import xxhash
import zstandard

from cag_store import KVGeometry, Manifest, Store, codec_from_config
from cag_store.blob import unpack_blob
from cag_store.chunk import ChunkIndex, parse_index
from cag_store.dtypes import widen
from cag_store.errors import CorruptEntry, StoreError, UnencodableArray
from cag_store.jsontext import MAX_DEPTH, canonical_bytes, parse_object
from cag_store.paths import chunk_path, manifest_path, ref_path
from cag_store.ref import Ref
from fuzzing import header_facts, rebuilt_header


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def put_manifest(store, data):
    """`data` under its own digest, and the name `small` means it."""
    digest = hashlib.sha256(data).hexdigest()
    store.backend.replace(manifest_path(digest), data)
    store.backend.replace(ref_path("small"), Ref("small", digest, False, None, "2026-01-02T03:04:05Z").to_bytes())
    return digest


@pytest.mark.parametrize("depth", [MAX_DEPTH, 400, 900, 20_000])
def test_deep_nesting_does_not_exhaust_the_stack(small, depth):
    text = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(CorruptEntry):
        parse_object(text, "text")
    parse_object(text.replace(b"[" * depth, b"[" * (MAX_DEPTH - 1)).replace(b"]" * depth, b"]" * (MAX_DEPTH - 1)), "x")
    store = Store.in_memory()
    whole = small().build(store).to_bytes()
    put_manifest(store, whole.replace(b'"layout":{"marker":1}', b'"layout":' + text))
    for read in (lambda: store.resolve("small"), lambda: store.gc(), lambda: store.open_reader("small")):
        with pytest.raises(CorruptEntry):
            read()
    with pytest.raises(CorruptEntry):
        Ref.from_bytes(text, "small")


def test_a_manifest_has_one_spelling(small):
    """Another one under its right digest would be leased under a digest that gc does not find."""
    store = Store.in_memory()
    manifest = small().build(store)
    value = json.loads(manifest.to_bytes())
    assert Manifest.from_json(value) == manifest
    for other in (
        json.dumps(value, ensure_ascii=False).encode(),
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode(),
        manifest.to_bytes() + b"\n",
    ):
        put_manifest(store, other)
        with pytest.raises(CorruptEntry, match="canonical"):
            store.resolve("small")


def test_a_ref_has_one_spelling():
    ref = Ref("small", "ab" * 32, False, None, "2026-01-02T03:04:05Z")
    for other in (json.dumps(json.loads(ref.to_bytes())).encode(), ref.to_bytes() + b" "):
        with pytest.raises(CorruptEntry, match="canonical"):
            Ref.from_bytes(other, "small")


def test_times_have_ascii_digits():
    ref = Ref("small", "ab" * 32, False, None, "\u0662026-01-02T03:04:05Z")
    with pytest.raises(CorruptEntry, match="updated_at"):
        Ref.from_bytes(ref.to_bytes(), "small")


@pytest.mark.parametrize("tokens", [1 << 20, 4096])
def test_a_forged_geometry_takes_no_memory(small, tokens):
    """`verify` decodes into arrays of its own, as large as header and manifest agree on."""
    from cag_store.keys import chunk_key

    cache, store = small(), Store.in_memory(workers=1)
    context = replace(cache.context, chunk_tokens=tokens)
    heads, dims = (1 << 16,) * 3, (1 << 10,) * 3
    ids = np.zeros(tokens, dtype=np.uint32)
    key = chunk_key("", ids, context)
    header = replace(
        cache.header("", 0), key=key, num_tokens=tokens, num_kv_heads=heads, head_dim=dims, context=context
    )
    segment = b"\x02" + bytes(10)
    index = ChunkIndex(header, (len(segment),) * 6, (xxhash.xxh3_128_hexdigest(segment),) * 6)
    head = index.to_bytes()
    file = head + ids.tobytes() + segment * 6
    with pytest.raises(CorruptEntry, match="a layer and side"):
        parse_index(head, len(file), "chunk")
    entry = index.entry(head)
    kv = KVGeometry(heads, dims, "bfloat16", "float32", {"theta": 10000.0}, tokens)
    manifest = Manifest(cache.model, kv, cache.codec.config(), (entry,), (), created_at="2026-01-02T03:04:05Z")
    store.backend.replace(f"chunks/{key[:2]}/{key}", file)
    put_manifest(store, manifest.to_bytes())
    assert store.resolve("small")[1] == manifest
    (problem,) = store.verify("small").problems
    assert isinstance(problem, CorruptEntry)


@pytest.mark.parametrize("codec_id", [[], {}, None, 3, "int8"])
def test_a_codec_id_that_is_no_text_is_refused(small, codec_id):
    """Found by the fuzzer: a list cannot be looked up in a set."""
    store = Store.in_memory()
    entry = small().put_chunks(store)[0]
    facts = header_facts(store.backend.get(chunk_path(entry.key), 1 << 20))
    facts["context"]["codec"]["id"] = codec_id
    with pytest.raises(CorruptEntry, match="segments"):
        parse_index(rebuilt_header(facts), entry.stored_bytes, "chunk")


def test_a_chunk_that_no_reader_would_take_is_not_written(small):
    cache, store = small(), Store.in_memory()
    header = replace(cache.header("", 0), num_kv_heads=(1 << 16,) * 3, head_dim=(1 << 16,) * 3)
    with pytest.raises(UnencodableArray, match="fewer tokens a chunk"):
        store.put_chunk(header, cache.arrays(0), cache.ids(0))


def test_a_text_that_cannot_be_compressed_can_be_read_back(monkeypatch):
    """Its file is larger than the text."""
    size = 1 << 17
    monkeypatch.setattr("cag_store.store.MAX_BLOB_BYTES", size)
    monkeypatch.setattr("cag_store.reading.MAX_BLOB_FILE_BYTES", size + (size >> 7))
    store, text = Store.in_memory(), os.urandom(size)
    assert store.get_blob(store.put_blob(text)) == text


def test_a_frame_with_a_huge_window_takes_no_memory():
    parameters = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    frame = stream.compress(b"text") + stream.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 1 << 27
    with pytest.raises(CorruptEntry, match="memory"):
        unpack_blob(xxhash.xxh3_128_digest(frame) + frame, "blob")


def test_reading_a_small_file_takes_as_much_memory_as_it_has(tmp_path):
    store = Store.open(tmp_path / "store")
    store.backend.replace("refs/small.json", b"x" * 1000)
    tracemalloc.start()
    store.backend.get("refs/small.json", 256 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "lease",
    [
        {"kind": "reader"},
        {"kind": "reader", "manifests": None},
        {"kind": "reader", "manifests": [["a"]]},
        {"kind": "reader", "manifests": ["../../refs/small"]},
        {"kind": "reader", "manifests": [3]},
        {"kind": "something new", "manifests": []},
        {},
    ],
)
def test_a_lease_that_is_not_understood_holds_everything(store, small, lease):
    small(seed=1).put_chunks(store)
    with store.backend.acquire_lease(lease):
        report = store.gc(grace_s=0)
    assert (report.removed, report.build_running) == ((), True)
    assert store.gc(grace_s=0).removed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("config", [{"id": "int8"}, {"id": "int4", "recent_tokens": 0}], ids=["int8", "int4"])
def test_a_forged_scale_overflows_quietly(config, dtype, side):
    """Infinity, as the arithmetic of the format says; float16 clamps."""
    from cag_store.testing import sample_array

    codec, array = codec_from_config({**config, "exact_tokens": 0}), sample_array((1, 3, 2), dtype)
    data, found, plain = bytearray(codec.encode(array, dtype, side)), array.copy(), array.copy()
    codec.decode_into(bytes(data), plain)
    data[12:14] = b"\x7f\x7f"  # 3.4e38
    codec.decode_into(bytes(data), found)
    forged = np.zeros((1, 3, 2), bool)  # what the first scale is of: a channel of the keys, a token of the values
    forged[(0, slice(None), 0) if side == "keys" else (0, 0)] = True
    magnitude = np.abs(widen(found, dtype))
    assert np.array_equal(found[~forged], plain[~forged])
    assert magnitude[forged].max() == (65504 if dtype == "float16" else np.inf)
    assert not np.isnan(magnitude).any()


def test_damage_of_refs_and_manifests_says_what_to_do(small):
    store = Store.in_memory()
    manifest = small().build(store)
    for path in (ref_path("small"), manifest_path(manifest.digest)):
        whole = store.backend.get(path, 1 << 20)
        store.backend.replace(path, whole[:-2] + b"x}")
        for read in (lambda: store.resolve("small"), lambda: store.open_reader("small")):
            with pytest.raises(CorruptEntry, match="build the cache again, or remove it"):
                read()
        with pytest.raises(StoreError, match="removed nothing: remove that cache, or build it again"):
            store.gc()
        store.backend.replace(path, whole)


def test_a_manifest_object_that_was_damaged_is_mended_by_the_next_commit(store, small):
    cache = small()
    manifest = cache.build(store)
    for damaged in (b"", b"{}", manifest.to_bytes() + b" " * 100):
        store.backend.replace(manifest_path(manifest.digest), damaged)
        with pytest.raises(CorruptEntry):
            store.resolve("small")
        cache.build(store)
        assert store.resolve("small")[1] == manifest


def test_canonical_bytes_are_what_the_manifest_is_compared_with(small):
    manifest = small().put(Store.in_memory(), fidelity={"mean_kl": 1e-07, "nll": -0.0}, build={"prefill_s": 1.50})
    assert Manifest.from_bytes(canonical_bytes(manifest.to_json())).digest == manifest.digest
