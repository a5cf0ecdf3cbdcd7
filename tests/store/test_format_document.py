"""A reader written from docs/format.md alone reads what the store writes, and uses none of its code."""

import hashlib
import json
import struct

import numpy as np
import pytest
import xxhash
import zstandard

from cag_store import Store

ITEM = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}


def read_cache(root, name):
    assert (root / "format").read_text() == "cag-store 1\n"
    ref = json.loads((root / "refs" / f"{name}.json").read_bytes())
    check = ref.pop("check")
    assert check == hashlib.sha256(canonical(ref)).hexdigest()
    digest = ref["manifest"]
    data = (root / "manifests" / digest[:2] / f"{digest}.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest
    manifest = json.loads(data)
    assert manifest["schema"] == 1
    parent, chunks = "", []
    for chunk in manifest["chunks"]:
        chunks.append(read_chunk(root, chunk, parent))
        parent = chunk["key"]
    texts = [read_blob(root, document["sha256"]) for document in manifest["documents"]]
    return manifest, chunks, texts


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read_blob(root, sha256):
    data = (root / "blobs" / sha256[:2] / sha256).read_bytes()
    assert xxhash.xxh3_128_digest(data[16:]) == data[:16]
    text = zstandard.ZstdDecompressor().decompress(data[16:])
    assert hashlib.sha256(text).hexdigest() == sha256
    return text


def read_chunk(root, entry, parent):
    key = entry["key"]
    data = (root / "chunks" / key[:2] / key).read_bytes()
    assert len(data) == entry["stored_bytes"]
    (length,) = struct.unpack_from("<Q", data)
    end = 8 + length
    assert end == entry["header_bytes"]
    assert hashlib.sha256(data[:end]).hexdigest() == entry["header_checksum"]
    header = json.loads(data[8:end])
    facts = json.loads(header["__metadata__"]["chunk"])
    ids = data[end : end + 4 * entry["num_tokens"]]
    parts = [parent.encode(), canonical(facts["context"]), ids]
    digest = hashlib.sha256(b"cag.chunk.v1\0" + b"".join(struct.pack("<Q", len(part)) + part for part in parts))
    assert digest.hexdigest() == key
    end += len(ids)
    arrays = []
    for index, (codec, raw_bytes, encoded_bytes, xxh3) in enumerate(facts["segments"]):
        segment = data[end : end + encoded_bytes]
        name = f"layers.{index // 2:03d}.{'values' if index % 2 else 'keys'}"
        assert header[name]["data_offsets"] == [
            end - entry["header_bytes"],
            end - entry["header_bytes"] + encoded_bytes,
        ]
        end += encoded_bytes
        assert xxhash.xxh3_128_hexdigest(segment) == xxh3
        shape = facts["num_kv_heads"][index // 2], facts["num_tokens"], facts["head_dim"][index // 2]
        config, dtype = facts["context"]["codec"], facts["context"]["dtype"]
        array = {"lossless": lossless, "int8": int8}[codec](segment, shape, config, dtype)
        assert array.nbytes == raw_bytes
        arrays.append(array)
    assert end == len(data)
    return np.frombuffer(ids, "<u4"), arrays


def lossless(segment, shape, config, dtype):
    num_planes, offset, planes = segment[0], 1 + 5 * segment[0], []
    for index in range(num_planes):
        packer, length = struct.unpack_from("<BI", segment, 1 + 5 * index)
        plane = segment[offset : offset + length]
        offset += length
        planes.append(zstandard.ZstdDecompressor().decompress(plane) if packer else plane)
    assert offset == len(segment)
    width, bits = 8 * num_planes, config["transform"]["bits"]
    numbers = [int.from_bytes(element, "big") for element in zip(*planes, strict=True)]
    restored = [(number >> bits | number << (width - bits)) & ((1 << width) - 1) for number in numbers]
    return np.array(restored, dtype=f"<u{num_planes}").view(ITEM[dtype]).reshape(shape)


def int8(segment, shape, config, dtype):
    side, packed, _, num_exact, stored = struct.unpack_from("<BBHII", segment)
    heads, tokens, dim = shape
    group = config["group_tokens"]
    count = heads * tokens if side else heads * -(-tokens // group) * dim
    rest = segment[12:]
    scales, offsets = (
        (np.frombuffer(rest[2 * count * i :][: 2 * count], "<u2").astype("<u4") << 16).view("<f4") for i in (0, 1)
    )
    rest = rest[4 * count :]
    exact_bytes = heads * num_exact * dim * np.dtype(ITEM[dtype]).itemsize
    exact = np.frombuffer(rest[:exact_bytes], ITEM[dtype]).reshape(heads, num_exact, dim)
    codes = zstandard.ZstdDecompressor().decompress(rest[exact_bytes:]) if packed else rest[exact_bytes:]
    assert len(rest[exact_bytes:]) == stored
    codes = np.frombuffer(codes, np.int8).reshape(shape).astype(np.float32)
    if side:
        values = codes * scales.reshape(heads, tokens, 1) + offsets.reshape(heads, tokens, 1)
    else:
        by_token = [np.repeat(p.reshape(heads, -1, dim), group, axis=1)[:, :tokens] for p in (scales, offsets)]
        values = codes * by_token[0] + by_token[1]
    if dtype == "bfloat16":
        out = ((values.view("<u4") + np.uint32(0x8000)) >> 16).astype("<u2")
    else:
        out = values.clip(-65504, 65504).astype("<f2") if dtype == "float16" else values
    out[:, :num_exact] = exact
    return out


@pytest.mark.parametrize("dtype", ITEM)
@pytest.mark.parametrize(
    "codec", ["lossless", "int8", {"id": "int8", "group_tokens": 3, "packer": {"id": "zstd"}}], ids=str
)
def test_an_independent_reader_agrees(tmp_path, small, codec, dtype):
    cache = small(codec, dtype=dtype)
    store = Store.open(tmp_path / "store")
    built = cache.build(store)
    manifest, chunks, texts = read_cache(tmp_path / "store", "small")
    assert manifest == json.loads(built.to_bytes())
    assert texts == cache.texts
    assert np.array_equal(np.concatenate([ids for ids, _ in chunks]), cache.token_ids)
    buffers = cache.buffers(spare=0)
    with store.reader(built) as reader:
        reader.load(buffers)
    for index in range(6):
        found = np.concatenate([arrays[index] for _, arrays in chunks], axis=1)
        assert np.array_equal(found.view(np.uint8), buffers[index // 2][index % 2].view(np.uint8))
