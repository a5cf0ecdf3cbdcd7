"""A reader of stores written from docs/format.md alone: stdlib, numpy, zstandard and xxhash; nothing of the store.
Codec `transform` is in `independent_transform`.

`read_cache` resolves a name, walks ref -> manifest -> chunks -> segments, verifies all of it and decodes to arrays.
Slow and plain on purpose: it is the document, executed. `objects` is anything with `[path]` (a `Folder`, a dictionary).
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
import zstandard

from independent_transform import need, transform_values

ITEM = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}
MANIFEST_FIELDS = {
    "schema", "created_at", "model", "kv", "codec", "chunks", "documents", "layout", "num_tokens", "raw_bytes",
    "blob_bytes", "stored_bytes", "fidelity", "versions", "machine", "build",
}  # fmt: skip
MODEL_FIELDS = {"id", "fingerprint", "tokenizer_fingerprint", "template_fingerprint", "adapter_fingerprint"}
KV_FIELDS = {"num_layers", "num_kv_heads", "head_dim", "dtype", "compute_dtype", "rope", "chunk_tokens"}
CHUNK_FIELDS = {
    "key", "start", "num_tokens", "stored_bytes", "raw_bytes", "header_bytes", "header_checksum",
}  # fmt: skip
SNAPSHOT_FIELDS = {
    "key", "chunk", "num_tokens", "stored_bytes", "raw_bytes", "header_bytes", "header_checksum",
}  # fmt: skip
STATE_FIELDS = {"chunk", "codec", "key", "num_tokens", "tensors"}
DOCUMENT_FIELDS = {"doc_id", "title", "path", "sha256", "start", "end"}
CONTEXT_FIELDS = {
    "adapter_fingerprint", "chunk_tokens", "codec", "compute_dtype", "dtype", "model_fingerprint", "rope",
}  # fmt: skip
HEADER_FIELDS = {
    "context", "head_dim", "key", "num_kv_heads", "num_layers", "num_tokens", "parent", "segments", "start",
}  # fmt: skip
REF_FIELDS = {"schema", "name", "manifest", "pinned", "expires_at", "updated_at", "check"}


class Folder:
    """The files below a directory, by their relative path."""

    def __init__(self, root):
        self.root = Path(root)

    def __getitem__(self, path):
        return (self.root / path).read_bytes()


@dataclass
class Cache:
    """`arrays[layer] = (keys, values)`, or what is both, each [num_kv_heads, num_tokens, head_dim] as the store's dtype
    carries them;
    `states` of each snapshot, by name."""

    ref: dict
    manifest: dict
    token_ids: np.ndarray
    arrays: list
    texts: list
    states: list


def read_cache(objects, name):
    need(objects["format"] == b"cag-store 1\n", "format")
    ref = read_ref(objects, name)
    manifest = read_manifest(objects, ref["manifest"])
    parent, start, ids, parts = "", 0, [], []
    for entry in manifest["chunks"]:
        need(entry["start"] == start, "chunks follow each other")
        chunk_ids, arrays = read_chunk(objects, manifest, entry, parent)
        parent, start = entry["key"], start + entry["num_tokens"]
        ids.append(chunk_ids)
        parts.append(arrays)
    whole = [np.concatenate(side, axis=1) for side in zip(*parts, strict=True)]
    texts = read_blobs(objects, manifest)
    token_ids = np.concatenate(ids)
    states = read_snapshots(objects, manifest, token_ids) if "states" in manifest else []
    sides = manifest["kv"].get("sides", 2)
    layers = list(zip(*(whole[side::sides] for side in range(sides)), strict=True))
    return Cache(ref, manifest, token_ids, layers, texts, states)


def canonical(value):
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parse(data):
    value = json.loads(data)
    need(isinstance(value, dict) and canonical(value) == data, "canonical JSON")
    return value


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def is_digest(text):
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{64}", text) is not None


def read_ref(objects, name):
    need(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", name), "name")
    ref = parse(objects[f"refs/{name}.json"])
    need(ref.get("schema") == 1, "schema of the ref")
    need(set(ref) == REF_FIELDS and ref["name"] == name, "fields of the ref")
    need(ref["check"] == sha256(canonical({key: ref[key] for key in REF_FIELDS - {"check"}})), "check")
    need(isinstance(ref["pinned"], bool) and is_digest(ref["manifest"]), "fields of the ref")
    for time in (ref["expires_at"] or "2000-01-01T00:00:00Z", ref["updated_at"]):
        need(re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", time), "times")
    return ref


def read_manifest(objects, digest):
    data = objects[f"manifests/{digest[:2]}/{digest}.json"]
    need(len(data) <= 64 << 20 and sha256(data) == digest, "digest of the manifest")
    manifest = parse(data)
    schema, kv = manifest.get("schema"), manifest["kv"]
    need(schema in (1, 2, 3), "schema of the manifest")
    need(("sides" in kv) == (schema == 3) and kv.get("sides", 1) == 1, "sides")
    with_states = {"states"} if schema == 2 or (schema == 3 and "states" in manifest) else set()
    snapshots = manifest["states"]["snapshots"] if with_states else []
    need(
        set(manifest) == MANIFEST_FIELDS | with_states
        and set(manifest["model"]) == MODEL_FIELDS
        and set(kv) - {"sides"} == KV_FIELDS,
        "fields",
    )
    need(all(set(chunk) == CHUNK_FIELDS for chunk in manifest["chunks"]), "fields of chunks")
    need(all(set(document) == DOCUMENT_FIELDS for document in manifest["documents"]), "fields of documents")
    need(kv["num_layers"] == len(kv["num_kv_heads"]) == len(kv["head_dim"]) and kv["dtype"] in ITEM, "geometry")
    chunks = manifest["chunks"]
    need(manifest["num_tokens"] == sum(chunk["num_tokens"] for chunk in chunks), "num_tokens")
    need(manifest["raw_bytes"] == sum(entry["raw_bytes"] for entry in chunks + snapshots), "raw_bytes")
    stored_bytes = sum(entry["stored_bytes"] for entry in chunks + snapshots)
    need(manifest["stored_bytes"] == stored_bytes + manifest["blob_bytes"], "stored")
    need(len({chunk["key"] for chunk in chunks}) == len(chunks), "chunks occur once")
    need(all(1 <= chunk["num_tokens"] <= kv["chunk_tokens"] for chunk in chunks), "tokens of chunks")
    position = 0
    for document in manifest["documents"]:
        need(position <= document["start"] <= document["end"] <= manifest["num_tokens"], "spans of documents")
        position = document["end"]
    need(len({document["doc_id"] for document in manifest["documents"]}) == len(manifest["documents"]), "doc_id")
    return manifest


def read_blobs(objects, manifest):
    """The documents' texts; the basis of the codec is counted with them."""
    digests = [document["sha256"] for document in manifest["documents"]]
    basis = manifest["codec"].get("basis")
    found = {digest: read_blob(objects, digest) for digest in (*digests, *([] if basis is None else [basis]))}
    need(sum(size for _, size in found.values()) == manifest["blob_bytes"], "blob_bytes")
    return [found[digest][0] for digest in digests]


def read_blob(objects, digest):
    """The content of a blob, and the size of its file."""
    need(is_digest(digest), "address of a blob")
    data = objects[f"blobs/{digest[:2]}/{digest}"]
    need(xxhash.xxh3_128_digest(data[16:]) == data[:16], "checksum of a blob")
    content = unpack(data[16:], max_bytes=256 << 20)
    need(sha256(content) == digest, "content of a blob")
    return content, len(data)


def read_chunk(objects, manifest, entry, parent):
    """Token ids, and keys and values (or what is both) layer by layer in one list."""
    key = entry["key"]
    need(is_digest(key), "key")
    data = objects[f"chunks/{key[:2]}/{key}"]
    need(len(data) == entry["stored_bytes"] and entry["header_bytes"] <= min(len(data), 8 << 20), "sizes of a chunk")
    end = 8 + int.from_bytes(data[:8], "little")
    need(end == entry["header_bytes"] and end % 8 == 0, "length of the header")
    need(sha256(data[:end]) == entry["header_checksum"], "checksum of the header")
    facts = parse_header(data[8:end])
    check_facts(facts, manifest, entry, parent)
    ids = data[end : end + 4 * facts["num_tokens"]]
    need(chunk_key(parent, facts["context"], ids) == key, "key of the token ids")
    end += len(ids)
    count = sides_of(facts)
    sides = [[None] * facts["num_layers"] for _ in range(count)]
    config = facts["context"]["codec"]
    basis = read_blob(objects, config["basis"])[0] if "basis" in config else None
    for index, (codec, raw_bytes, encoded_bytes, xxh3) in enumerate(facts["segments"]):
        layers = group(facts, index // count)
        shapes = [(facts["num_kv_heads"][i], facts["num_tokens"], facts["head_dim"][i]) for i in layers]
        dtype = facts["context"]["dtype"]
        sizes = [np.dtype(ITEM[dtype]).itemsize * heads * tokens * dim for heads, tokens, dim in shapes]
        need(codec == config["id"] and 1 <= encoded_bytes <= 2 * raw_bytes + 65536, "row of the segment table")
        need(raw_bytes == sum(sizes) and max(sizes) <= 1 << 30, "raw_bytes")
        segment = data[end : end + encoded_bytes]
        need(xxhash.xxh3_128_hexdigest(segment) == xxh3, "checksum of a segment")
        found = decode_group(segment, shapes, config, dtype, index % count, facts["start"], layers[0], basis)
        for layer, array in zip(layers, found, strict=True):
            sides[index % count][layer] = array
        end += encoded_bytes
    need(end == len(data), "the file ends with the last segment")
    return np.frombuffer(ids, "<u4"), [array for layer in zip(*sides, strict=True) for array in layer]


def sides_of(facts):
    """Segments of each group of layers."""
    return facts["context"].get("sides", 2)


def group(facts, index):
    """The layers of group `index`: one, or as many as the codec joins; the last group may have fewer."""
    joint = facts["context"]["codec"].get("joint_layers", 1)
    need(type(joint) is int and 1 <= joint <= 64, "joint_layers")
    layers = range(index * joint, min((index + 1) * joint, facts["num_layers"]))
    need(len(layers) > 0, "number of segments")
    return layers


def parse_header(text):
    """The object in `chunk`, after the whole header was rebuilt from it and compared."""
    metadata = json.loads(text)["__metadata__"]
    need(metadata["format"] == "cag-chunk" and metadata["version"] in ("1", "2"), "version of the chunk")
    need(metadata["sha256"] == sha256(metadata["chunk"].encode("utf-8")), "checksum in the header")
    facts = parse(metadata["chunk"].encode("utf-8"))
    need(sides_of(facts) == {"1": 2, "2": 1}[metadata["version"]], "sides of the chunk")
    end = 4 * facts["num_tokens"]
    tensors = {"token_ids": {"data_offsets": [0, end], "dtype": "U32", "shape": [facts["num_tokens"]]}}
    for index, (_, _, encoded_bytes, _) in enumerate(facts["segments"]):
        layers = group(facts, index // sides_of(facts))
        span = f"{layers[0]:03d}" + (
            f"-{layers[-1]:03d}" if facts["context"]["codec"].get("joint_layers", 1) > 1 else ""
        )
        name = f"layers.{span}.{'values' if index % sides_of(facts) else 'keys'}"
        tensors[name] = {"data_offsets": [end, end + encoded_bytes], "dtype": "U8", "shape": [encoded_bytes]}
        end += encoded_bytes
    rebuilt = canonical({"__metadata__": metadata, **tensors})
    need(set(metadata) == {"chunk", "format", "sha256", "version"}, "fields of __metadata__")
    need(text == rebuilt + b" " * (-len(rebuilt) % 8), "the header is what its segment table says")
    return facts


def read_snapshots(objects, manifest, token_ids):
    """States by name, snapshot by snapshot."""
    states, behind, key = manifest["states"], {}, ""
    need(set(states) == {"codec", "snapshots"} and states["codec"]["id"] == "lossless", "fields of states")
    for chunk in manifest["chunks"]:
        end = chunk["start"] + chunk["num_tokens"]
        ids = token_ids[chunk["start"] : end].astype("<u4").tobytes()
        behind[end] = key = chunk_key(key, context_of(manifest) | {"codec": states["codec"]}, ids)
    places = [entry["num_tokens"] for entry in states["snapshots"]]
    need(places == sorted(set(places)) and places[-1] == manifest["num_tokens"], "places of snapshots")
    need(all(behind.get(entry["num_tokens"]) == entry["chunk"] for entry in states["snapshots"]), "chain of keys")
    return [read_snapshot(objects, entry) for entry in states["snapshots"]]


def read_snapshot(objects, entry):
    key = hashlib.sha256(b"cag.state.v1\0" + struct.pack("<Q", 64) + entry["chunk"].encode("ascii")).hexdigest()
    need(set(entry) == SNAPSHOT_FIELDS and entry["key"] == key, "key of a snapshot")
    data = objects[f"chunks/{key[:2]}/{key}"]
    need(len(data) == entry["stored_bytes"] and entry["header_bytes"] <= min(len(data), 8 << 20), "sizes of a snapshot")
    end = 8 + int.from_bytes(data[:8], "little")
    need(end == entry["header_bytes"] and end % 8 == 0, "length of the header")
    need(sha256(data[:end]) == entry["header_checksum"], "checksum of the header")
    metadata = json.loads(data[8:end])["__metadata__"]
    need(set(metadata) == {"format", "sha256", "state", "version"}, "fields of __metadata__")
    need((metadata["format"], metadata["version"]) == ("cag-state", "1"), "version of the snapshot")
    need(metadata["sha256"] == sha256(metadata["state"].encode("utf-8")), "checksum in the header")
    facts, tensors, offset, found, raw = parse(metadata["state"].encode("utf-8")), {}, 0, {}, 0
    need(set(facts) == STATE_FIELDS, "fields of a snapshot")
    need(all(facts[field] == entry[field] for field in ("chunk", "key", "num_tokens")), "facts of a snapshot")
    names = [row[0] for row in facts["tensors"]]
    need(names == sorted(set(names)) and all(re.fullmatch(r"[a-z][a-z0-9._]{0,127}", name) for name in names), "names")
    for name, dtype, shape, encoded_bytes, xxh3 in facts["tensors"]:
        need(dtype in ITEM and 1 <= len(shape) <= 8 and all(1 <= number <= 1 << 20 for number in shape), "shape")
        need(encoded_bytes >= 1, "encoded_bytes")
        segment = data[end + offset : end + offset + encoded_bytes]
        need(xxhash.xxh3_128_hexdigest(segment) == xxh3, "checksum of a state")
        tensors[name] = {"data_offsets": [offset, offset + encoded_bytes], "dtype": "U8", "shape": [encoded_bytes]}
        rows = (1, int(np.prod(shape[:-1], dtype=np.int64)), shape[-1])
        found[name] = lossless(segment, rows, facts["codec"], dtype, 0, 0, 0).reshape(shape)
        offset, raw = offset + encoded_bytes, raw + found[name].nbytes
    rebuilt = canonical({"__metadata__": metadata, **tensors})
    need(data[8:end] == rebuilt + b" " * (-len(rebuilt) % 8), "the header is what its table says")
    need(end + offset == len(data) and raw == entry["raw_bytes"], "the file ends with the last state")
    return found


def context_of(manifest):
    """What the keys of the chunks depend on, besides their tokens."""
    kv = manifest["kv"]
    return {
        "adapter_fingerprint": manifest["model"]["adapter_fingerprint"],
        "chunk_tokens": kv["chunk_tokens"],
        "codec": manifest["codec"],
        "compute_dtype": kv["compute_dtype"],
        "dtype": kv["dtype"],
        "model_fingerprint": manifest["model"]["fingerprint"],
        "rope": kv["rope"],
    } | ({"sides": 1} if "sides" in kv else {})


def check_facts(facts, manifest, entry, parent):
    kv, context = manifest["kv"], context_of(manifest)
    need(set(facts) == HEADER_FIELDS and set(context) - {"sides"} == CONTEXT_FIELDS, "fields of a chunk")
    need(facts["context"] == context, "context")
    need((facts["key"], facts["parent"]) == (entry["key"], parent), "chain of keys")
    for field in ("start", "num_tokens"):
        need(facts[field] == entry[field], field)
    for field in ("num_layers", "num_kv_heads", "head_dim"):
        need(facts[field] == kv[field], field)
    groups = -(-facts["num_layers"] // facts["context"]["codec"].get("joint_layers", 1))
    need(len(facts["segments"]) == sides_of(facts) * groups and facts["num_layers"] <= 999, "number of segments")
    need(sum(row[1] for row in facts["segments"]) == entry["raw_bytes"], "raw_bytes of the chunk")


def chunk_key(parent, context, ids):
    digest = hashlib.sha256(b"cag.chunk.v1\0")
    for part in (parent.encode("ascii"), canonical(context), ids):
        digest.update(struct.pack("<Q", len(part)) + part)
    return digest.hexdigest()


def decode_group(segment, shapes, config, dtype, side, start, first_layer=0, basis=None):
    """Each layer of a segment. basis: the content of the blob that the codec names."""
    if config["id"] == "transform":
        return transform(segment, shapes, config, dtype, side, start, first_layer, basis)
    need(len(shapes) == 1, "layers of a segment")
    return [decode(segment, shapes[0], config, dtype, side, start, first_layer)]


def decode(segment, shape, config, dtype, side, start, layer):
    """One layer and side of one chunk. side: 0 keys, 1 values; start: position of its first token in the prefix."""
    need(config["id"] in DECODERS, "codec")
    return DECODERS[config["id"]](segment, shape, config, dtype, side, start, layer)


def unpack(frame, *, size=None, max_bytes=None):
    """One zstd frame with nothing behind it; its content has `size`, or at most `max_bytes` bytes."""
    stated = zstandard.get_frame_parameters(frame).content_size
    need(stated == size if size is not None else stated <= max_bytes, "content size of a zstd frame")
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    content = decompressor.decompress(frame)
    need(decompressor.eof and not decompressor.unused_data and len(content) == stated, "one zstd frame")
    return content


def lossless(segment, shape, config, dtype, side, start, layer):
    itemsize, count = np.dtype(ITEM[dtype]).itemsize, shape[0] * shape[1] * shape[2]
    need(segment[0] == itemsize, "number of planes")
    planes, offset = [], 1 + 5 * itemsize
    for index in range(itemsize):
        packer, length = struct.unpack_from("<BI", segment, 1 + 5 * index)
        plane = segment[offset : offset + length]
        offset += length
        need(packer <= len(config["packers"]), "packer of a plane")
        planes.append(unpacked(plane, config["packers"][packer - 1], shape) if packer else plane)
        need(len(planes[-1]) == count, "length of a plane")
    need(offset == len(segment), "nothing follows the planes")
    bits = np.zeros(count, dtype=f"<u{itemsize}")
    for plane in planes:
        bits = (bits << bits.dtype.type(8)) | np.frombuffer(plane, np.uint8).astype(bits.dtype)
    transform = config["transform"]
    need(transform["id"] == "rotate", "transform")
    right, left = transform["bits"], (8 * itemsize - transform["bits"]) % (8 * itemsize)
    restored = (bits >> bits.dtype.type(right)) | (bits << bits.dtype.type(left))
    return restored.view(ITEM[dtype]).reshape(shape)


def unpacked(data, packer, shape):
    """Bytes of an array of `shape`."""
    if packer["id"] == "ranks":
        return ranks(data, shape)
    need(packer["id"] == "zstd", "packer")
    return unpack(data, size=shape[0] * shape[1] * shape[2])


def ranks(data, shape):
    heads, tokens, channels = shape
    second, third, num_rest = struct.unpack_from("<III", data)
    table, offset = data[12:25], 25 + heads * channels
    base = np.frombuffer(data, np.uint8, heads * channels, 25).reshape(heads, 1, channels)
    groups = (heads * -(-tokens * channels // 64), -(-second // 64), -(-third // 64))
    levels = []
    for bits, count in zip((2, 2, 3), groups, strict=True):
        words = np.frombuffer(data, "<u8", bits * count, offset)
        offset += words.nbytes
        levels.append([[word >> at & 1 for at in range(64)] for word in words.tolist()])
    rest = list(data[offset:])
    need(len(rest) == num_rest, "nothing follows the differences")
    codes = [code_stream(words, bits) for words, bits in zip(levels, (2, 2, 3), strict=True)]
    differences = np.zeros((heads, tokens * channels), np.uint8)
    for head in range(heads):
        for place in range(-(-tokens * channels // 64) * 64):
            code = next(codes[0])
            if place >= tokens * channels:
                need(code == 0, "padding")
                continue
            rank = code if code < 3 else 3 + (low := next(codes[1], 9))
            if rank >= 6:
                need(low == 3, "codes of level 2")
                rank = 6 + next(codes[2], 9)
                need(rank <= 13, "codes of level 3")
            differences[head, place] = table[rank] if rank < 13 else rest.pop(0)
    need(not rest, "number of differences without rank")
    for number, count in ((1, second), (2, third)):
        left = list(codes[number])
        need(len(left) == 64 * groups[number] - count and not any(left), "numbers of codes, and padding")
    return (differences.reshape(shape) + base).tobytes()


def code_stream(words, bits):
    for group in range(0, len(words), bits):
        for at in range(64):
            yield sum(words[group + bit][at] << bit for bit in range(bits))


def int8(segment, shape, config, dtype, side, start, layer):
    return grouped(segment, shape, config, dtype, side, start, bits=0)


def int4(segment, shape, config, dtype, side, start, layer):
    wide = side == 0 and layer in config["wide_key_layers"]
    return grouped(segment, shape, config, dtype, side, start, bits=8 if wide else 4)


def grouped(segment, shape, config, dtype, side, start, bits):
    """Sections 5.2 and 5.3: codes with a scale and an offset a group. bits: 0 in a segment of int8, 4 or 8 of int4."""
    heads, tokens, dim = shape
    stated_side, packed, stated_bits, num_exact, stored = struct.unpack_from("<BBHII", segment)
    need((stated_side, stated_bits) == (side, bits) and packed in (0, 1), "head of a segment")
    need(num_exact == min(max(config["exact_tokens"] - start, 0), tokens), "number of exact tokens")
    group, channels = config["group_tokens"], config.get("group_channels", dim)
    parameter_shape = (heads, tokens, -(-dim // channels)) if side else (heads, -(-tokens // group), dim)
    count = int(np.prod(parameter_shape))
    offset = 12
    scales, offsets = (
        (np.frombuffer(segment, "<u2", count, offset + 2 * count * i).astype("<u4") << 16).view("<f4") for i in (0, 1)
    )
    need(np.isfinite(scales).all() and np.isfinite(offsets).all() and (scales >= 0).all(), "scales and offsets")
    offset += 4 * count
    is_last = config["id"] == "int4" and tokens < config["chunk_tokens"]
    num_recent = min(config["recent_tokens"], tokens - num_exact) if is_last else 0
    exact = np.frombuffer(segment, ITEM[dtype], heads * (num_exact + num_recent) * dim, offset)
    codes = segment[offset + exact.nbytes :]
    need(len(codes) == stored, "nothing follows the codes")
    row_bytes = -(-dim // 2) if bits == 4 else dim
    codes = unpacked(codes, config["packer"], (heads, tokens, row_bytes)) if packed else codes
    codes = np.frombuffer(codes, np.uint8).reshape(heads, tokens, row_bytes)
    codes = nibbles(codes, dim) if bits == 4 else codes.view(np.int8)
    axis, size = (2, channels) if side else (1, group)
    by_code = [
        np.repeat(pair.reshape(parameter_shape), size, axis=axis)[:, :tokens, :dim] for pair in (scales, offsets)
    ]
    out = narrow(codes.astype(np.float32) * by_code[0] + by_code[1], dtype)
    first, last = np.split(exact.reshape(heads, num_exact + num_recent, dim), [num_exact], axis=1)
    out[:, :num_exact], out[:, tokens - num_recent :] = first, last
    return out


def transform(segment, shapes, config, dtype, side, start, first_layer, basis):
    item = np.dtype(ITEM[dtype])
    facts = config, item.itemsize, side, start, first_layer, basis
    layers, exact, rows = transform_values(segment, shapes, *facts)
    outs, offset = [], 0
    for values, (heads, _, dim) in zip(layers, shapes, strict=True):
        out = narrow(np.ascontiguousarray(values), dtype).copy()
        kept = np.ascontiguousarray(rows[:, offset : offset + heads * dim * item.itemsize]).view(item)
        out[:, exact] = kept.reshape(-1, heads, dim).transpose(1, 0, 2)
        offset += heads * dim * item.itemsize
        outs.append(out)
    return outs


def nibbles(codes, dim):
    """The low halves of the bytes are the first channels, the high halves the others."""
    both = np.concatenate([codes & 15, codes >> 4], axis=2)
    need(not both[:, :, dim:].any(), "bits that belong to no code")
    return both[:, :, :dim]


def narrow(values, dtype):
    """float32 to the storage dtype, as section 5.2 defines it."""
    if dtype == "bfloat16":
        return ((values.view("<u4") + np.uint32(0x8000)) >> 16).astype("<u2")
    return values.clip(-65504, 65504).astype("<f2") if dtype == "float16" else values


DECODERS = {"lossless": lossless, "int8": int8, "int4": int4, "transform": transform}
