"""Hostile inputs for every parser of the store: seeded mutations of real files, with and without mended checksums.

A `Target` knows real inputs, how to mend what a mutation broke (so that it gets past the checksums), and how to read
one: reading raises an error of the store or proves that what came back is right.
"""

import base64
import copy
import hashlib
import json
import random
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import xxhash
import zstandard

from cag_store import Manifest, codec_from_config, storage_dtype
from cag_store.backends import flocks
from cag_store.blob import pack_blob, unpack_blob
from cag_store.chunk import parse_index
from cag_store.codecs.transform import Basis
from cag_store.errors import CorruptEntry, StoreError, UnknownCodec, UnsupportedFormat
from cag_store.gc import _held_by
from cag_store.jsontext import canonical_bytes, parse_object
from cag_store.ref import Ref

NUMBERS = [
    0, 1, -1, 2, 63, 64, 255, 256, 2**16, 2**20 + 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30,
]  # fmt: skip
DEEP = json.loads("[" * 300 + "]" * 300)
ODD = [
    None,
    True,
    False,
    "",
    "0" * 64,
    "é\u2028\0",
    "x" * 5000,
    [],
    {},
    [[]],
    {"id": []},
    0.5,
    -0.0,
    1e308,
    DEEP,
    {"a": DEEP},
]
CPU_S = 5  # of one input; processor time, so that a paused machine fails nothing
MEMORY_BYTES = 1 << 30


class TooSlow(Exception):
    """One input took more than `CPU_S` of processor time."""


@dataclass
class Target:
    """`read(data)` raises one of `allowed`, or nothing when what it got is right."""

    name: str
    seeds: list
    read: Callable
    allowed: tuple = (CorruptEntry, UnsupportedFormat)
    mend: Callable = None  # (chance, seed) -> input: a change of the content under right checksums
    only_mended: bool = False


@contextmanager
def limits():
    """For this process: `MEMORY_BYTES` more than it has now, and an exception after `CPU_S` of one input."""

    def stop(signum, frame):
        raise TooSlow

    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, old[1]))
    before = signal.signal(signal.SIGVTALRM, stop)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, old)


def run(target, count, seed):
    """`count` inputs, inside of `limits`; returns how many were accepted. Raises what is not allowed, and the input."""
    chance, accepted = random.Random(f"{target.name} {seed}"), 0
    for number in range(count):
        if target.mend is not None and (target.only_mended or chance.random() < 0.6):
            data = target.mend(chance, chance.choice(target.seeds))
        else:
            data = mutated(chance, chance.choice(target.seeds), target.seeds)
        signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
        try:
            target.read(data)
            accepted += 1
        except target.allowed:
            pass
        except BaseException as error:
            shown = base64.b64encode(data[:4000]).decode() if isinstance(data, bytes) else repr(data)[:4000]
            raise AssertionError(f"{target.name}, input {number} of seed {seed}: {error!r}\n{shown}") from error
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return accepted


def mutated(chance, data, others):
    """One to three changes of bytes: flips, cuts, insertions, copies, hostile integers, pieces of other inputs."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.choice([1, 4, 8, 30, 300]))
        match chance.randrange(9):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            case 2:
                del data[at:]
            case 3:
                del data[at:end]
            case 4:
                data[at:at] = data[at:end] * chance.choice([1, 2, 50])
            case 5:
                data[at:end] = chance.randbytes(end - at)
            case 6:
                size = chance.choice([1, 2, 4, 8])
                data[at : at + size] = (chance.choice(NUMBERS) % 256**size).to_bytes(size, "little")
            case 7:
                other = chance.choice(others)
                place = chance.randrange(len(other) + 1)
                data[at:] = other[place:]
            case _:
                data[at:end] = chance.choice([b"\0", b"\xff", b'"', b"{", b"[", b"9", b"\\ud800", b"NaN"]) * (end - at)
    return bytes(data)


def changed_json(chance, value):
    """A copy with one to three values replaced, removed, added or exchanged, anywhere in it."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice([1, 1, 2, 3])):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
                place = place[key]
                continue
            match chance.randrange(6):
                case 0:
                    del place[key]
                case 1 if isinstance(place, list):
                    place.append(copy.deepcopy(place[key]))
                case 2 if isinstance(place, dict):
                    place[chance.choice(["new", "", "é", "id"])] = copy.deepcopy(place[key])
                case 3 if type(place[key]) is int:
                    place[key] += chance.choice([-1, 1, 8, -8])
                case 4:
                    place[key] = chance.choice(NUMBERS)
                case _:
                    place[key] = copy.deepcopy(chance.choice(ODD))
            break
    return value


def as_json(value):
    """Canonical where that exists; otherwise something like it."""
    try:
        return canonical_bytes(value)
    except ValueError:
        return json.dumps(value).encode()


def with_check(value):
    """A ref with the right checksum."""
    inner = {key: item for key, item in value.items() if key != "check"}
    return as_json({**inner, "check": hashlib.sha256(as_json(inner)).hexdigest()})


def rebuilt_header(facts, version="1"):
    """A chunk's header whose offsets and checksum fit `facts`, where that can be."""
    text = as_json(facts)
    metadata = {
        "chunk": text.decode(), "format": "cag-chunk", "sha256": hashlib.sha256(text).hexdigest(), "version": version,
    }  # fmt: skip
    tensors = {}
    try:
        end = 4 * facts["num_tokens"]
        tensors["token_ids"] = {"data_offsets": [0, end], "dtype": "U32", "shape": [facts["num_tokens"]]}
        for index, row in enumerate(facts["segments"]):
            name = f"layers.{index // 2:03d}.{'values' if index % 2 else 'keys'}"
            tensors[name] = {"data_offsets": [end, end + row[2]], "dtype": "U8", "shape": [row[2]]}
            end += row[2]
    except (LookupError, TypeError):
        pass
    text = as_json({"__metadata__": metadata, **tensors})
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def parser_targets(cache, store, manifest):
    """One target for each kind of text, from the files of a store that holds `cache`."""
    entry = manifest.chunks[0]
    chunk = store.backend.get(f"chunks/{entry.key[:2]}/{entry.key}", 1 << 20)
    header, facts = chunk[: entry.header_bytes], header_facts(chunk)
    ref = Ref("small", manifest.digest, True, "2030-01-01T00:00:00Z", "2026-01-02T03:04:05Z")
    lease = {"kind": "reader", "manifests": [manifest.digest], "pid": 1, "host": "h", "started_at": ref.updated_at}
    blobs = [pack_blob(text) for text in (b"", b"text", bytes(3 << 20), bytes(range(256)) * 20)]
    bomb = zstandard.ZstdCompressor().compress(bytes(300 << 20))

    def read_header(data):
        assert parse_index(data, entry.stored_bytes, "fuzz").to_bytes() == data

    def read_manifest(data):
        found = Manifest.from_bytes(data)
        assert found.to_bytes() == data
        assert found.digest == hashlib.sha256(data).hexdigest()

    def read_ref(data):
        assert Ref.from_bytes(data, "small").to_bytes() == data

    def read_blob(data):
        unpack_blob(data, "fuzz")
        assert xxhash.xxh3_128_digest(data[16:]) == data[:16]

    def read_lease(data):
        held = _held_by(flocks._content(data))
        assert held is None or all(len(digest) == 64 for digest in held)

    def read_text(data):
        canonical_bytes(parse_object(data, "fuzz"))

    def mended_blob(chance, seed):
        frame = chance.choice([bomb, bomb[:100]]) if chance.random() < 0.01 else mutated(chance, seed[16:], blobs)
        return xxhash.xxh3_128_digest(frame) + frame

    texts = [manifest.to_bytes(), ref.to_bytes(), as_json(facts), as_json(lease)]
    value = json.loads(manifest.to_bytes())
    return [
        Target("header", [header], read_header, mend=lambda chance, _: rebuilt_header(changed_json(chance, facts))),
        Target("manifest", texts[:1], read_manifest, mend=lambda chance, _: as_json(changed_json(chance, value))),
        Target(
            "ref",
            texts[1:2],
            read_ref,
            mend=lambda chance, seed: with_check(changed_json(chance, json.loads(seed))),
        ),
        Target("blob", blobs, read_blob, mend=mended_blob),
        Target("lease", texts[3:], read_lease, mend=lambda chance, s: as_json(changed_json(chance, json.loads(s)))),
        Target("json", texts, read_text, mend=lambda chance, s: as_json(changed_json(chance, json.loads(s)))),
        configuration_target(cache.codec.config()),
    ]


def header_facts(chunk):
    length = int.from_bytes(chunk[:8], "little")
    return json.loads(json.loads(chunk[8 : 8 + length])["__metadata__"]["chunk"])


def configuration_target(*configurations):
    """Codec configurations come out of files too."""
    seeds = [as_json(configuration) for configuration in configurations]

    def read(data):
        codec = codec_from_config(parse_object(data, "fuzz"))
        assert codec_from_config(codec.config()) == codec

    return Target(
        "configuration",
        seeds,
        read,
        (CorruptEntry, UnknownCodec),
        lambda chance, seed: as_json(changed_json(chance, json.loads(seed))),
    )


def basis_target(seed):
    """A basis that is accepted is the one that is written again, and its numbers are within their bounds."""
    start = seed.index(b"{")
    size = int.from_bytes(seed[start - 4 : start], "little")
    header, arrays = json.loads(seed[start : start + size]), seed[start + size :]

    def read(data):
        basis = Basis.from_bytes(data)
        assert basis.to_bytes() == data
        for side in (side for group in basis.groups for side in group):
            assert np.abs(side.rows).max(initial=0) < 1 << 15

    def mend(chance, _):
        if chance.random() < 0.5:
            return seed[:start] + mutated(chance, seed[start:], [seed])
        text = as_json(changed_json(chance, header))
        return seed[: start - 4] + len(text).to_bytes(4, "little") + text + arrays

    return Target("basis", [seed], read, mend=mend)


def segment_target(configuration, dtype, side, array, basis=b""):
    """Decoding must refuse, or write into the buffer it was given and nowhere else."""
    codec = codec_from_config(configuration, lambda digest: basis)
    seeds = [codec.encode(array, dtype, side, start) for start in (0, 1000)]
    heads, tokens, dim = array.shape

    def read(data):
        buffer = np.full((heads, tokens + 4, dim), 7, storage_dtype(dtype))
        try:
            codec.decode_into(data, buffer[:, 2:-2])
        finally:
            assert np.all(buffer[:, :2] == 7)
            assert np.all(buffer[:, -2:] == 7)

    return Target(f"segment {codec.config()} {dtype} {side}", seeds, read, (CorruptEntry,))


def store_target(cache, store, read_all):
    """Mutations of a whole store: `read_all(store)` proves that what comes back is right. Inputs are {path: bytes}."""
    seed = {
        info.path: store.backend.get(info.path, 1 << 30)
        for folder in ("refs", "manifests", "chunks", "blobs")
        for info in store.backend.list(folder)
    }

    def read(objects):
        for path in set(seed) - set(objects):
            store.backend.delete(path)
        for path, data in objects.items():
            store.backend.replace(path, data)
        try:
            read_all(store)
        finally:
            for path in set(objects) - set(seed):
                store.backend.delete(path)
            for path, data in seed.items():
                store.backend.replace(path, data)

    return seed, read


def damaged_store(chance, seed):
    """A copy of the files with one to three of them flipped, cut, missing, exchanged, or edited under right digests."""
    objects = dict(seed)
    for _ in range(chance.choice([1, 1, 2, 3])):
        path, other = chance.choice(sorted(seed)), chance.choice(sorted(seed))
        match chance.randrange(8):
            case 0:
                objects.pop(path, None)
            case 1:
                objects[path] = seed[other]
            case 2:
                objects[path], objects[other] = seed[other], seed[path]
            case 3 | 4:
                edit_manifest(chance, objects)
            case 5:
                edit_chunk(chance, objects)
            case _:
                objects[path] = mutated(chance, seed[path], list(seed.values()))
    return objects


def edit_manifest(chance, objects):
    """Another manifest under its right digest, and the ref means it."""
    paths = [path for path in objects if path.startswith("manifests/")]
    refs = [path for path in objects if path.startswith("refs/")]
    try:
        value = json.loads(objects[chance.choice(paths)])
        ref = json.loads(objects[refs[0]])
    except (ValueError, IndexError):
        return
    put_manifest(objects, refs[0], ref, changed_json(chance, value))


def put_manifest(objects, path, ref, value):
    data = as_json(value)
    digest = hashlib.sha256(data).hexdigest()
    objects[f"manifests/{digest[:2]}/{digest}.json"] = data
    if isinstance(ref, dict):
        objects[path] = with_check({**ref, "manifest": digest})


def edit_chunk(chance, objects):
    """A chunk with another header that fits its own facts, pinned by a manifest under its right digest."""
    paths = [path for path in objects if path.startswith("chunks/")]
    manifests = [path for path in objects if path.startswith("manifests/")]
    refs = [path for path in objects if path.startswith("refs/")]
    path = chance.choice(paths) if paths else ""
    try:
        chunk, ref = objects[path], json.loads(objects[refs[0]])
        value = json.loads(objects[chance.choice(manifests)])
        length = int.from_bytes(chunk[:8], "little")
        head = rebuilt_header(changed_json(chance, header_facts(chunk)))
        entries = [entry for entry in value["chunks"] if path.endswith(entry["key"])]
    except (ValueError, LookupError, TypeError):
        return
    objects[path] = head + chunk[8 + length :]
    for entry in entries:
        entry["header_bytes"], entry["stored_bytes"] = len(head), len(objects[path])
        entry["header_checksum"] = hashlib.sha256(head).hexdigest()
    try:
        value["stored_bytes"] = sum(entry["stored_bytes"] for entry in value["chunks"]) + value["blob_bytes"]
    except (LookupError, TypeError):
        return
    put_manifest(objects, refs[0], ref, value)


ALLOWED_OF_STORES = (StoreError,)
