"""Copies between stores: verified, resumable, all or nothing."""

import os
import signal
import threading
import traceback
from dataclasses import replace

import numpy as np
import pytest

from cag_store import Codec, PieceCache, Store, codecs, copy_cache, only_name
from cag_store.backends.local import LocalBackend
from cag_store.errors import (
    CorruptEntry,
    EntryConflict,
    EntryNotFound,
    InvalidName,
    StoreError,
    StoreFull,
    UnsupportedFormat,
)
from cag_store.jsontext import canonical_bytes
from cag_store.paths import blob_path, chunk_path, manifest_path, ref_path


@pytest.fixture
def source(tmp_path, small):
    store = Store.open(tmp_path / "source")
    small(num_tokens=40).build(store)
    return store


def loaded(store, cache, name="small"):
    with store.open_reader(name)[2] as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)


def objects(store):
    found = [info.path for folder in ("chunks", "blobs", "manifests", "refs") for info in store.backend.list(folder)]
    return {path: store.backend.get(path, 1 << 30) for path in found}


def test_a_copy_is_the_same_cache_under_any_name(source, tmp_path, small):
    destination = Store.open((tmp_path / "there").as_uri())
    told = []
    report = copy_cache(source, destination, "small", "other", lambda done, total: told.append((done, total)))
    manifest = source.resolve("small")[1]
    assert destination.resolve("other")[1] == manifest
    assert (report.name, report.digest) == ("other", manifest.digest)
    assert (report.copied_bytes, report.reused_bytes) == (manifest.stored_bytes, 0)
    assert told[0] == (0, manifest.stored_bytes)
    assert told[-1] == (manifest.stored_bytes, manifest.stored_bytes)
    assert told == sorted(told)
    assert destination.verify("other").ok
    loaded(destination, small(num_tokens=40), "other")
    assert only_name(destination) == "other"


def test_what_is_there_is_not_copied_again(source, tmp_path, small):
    destination = Store.open(tmp_path / "there")
    copy_cache(source, destination, "small")
    again = copy_cache(source, destination, "small")
    assert (again.copied_bytes, again.reused_bytes) == (0, again.reused_bytes)
    (tmp_path / "there" / chunk_path(source.resolve("small")[1].chunks[2].key)).unlink()
    assert copy_cache(source, destination, "small").copied_bytes == source.resolve("small")[1].chunks[2].stored_bytes
    assert destination.verify("small").ok


def test_a_copy_to_and_from_an_object_store(source, tmp_path, small, s3_url):
    copy_cache(source, Store.open(s3_url), "small")
    back = Store.open(tmp_path / "back")
    report = copy_cache(Store.open(s3_url), back, only_name(Store.open(s3_url)), "again")
    assert report.source == s3_url
    assert back.resolve("again")[1] == source.resolve("small")[1]
    assert back.verify("again").ok


class Masked(Codec):
    """Two layers a segment, their bytes xored with those of a basis."""

    codec_id, lossless = "masked", True

    def __init__(self, basis, content=None):
        self.basis, self.content = basis, content

    @classmethod
    def from_config(cls, config):
        return cls(config["basis"])

    def config(self):
        return {"id": self.codec_id, "basis": self.basis, "joint_layers": 2}

    def with_resources(self, resources):
        return type(self)(self.basis, np.frombuffer(resources(self.basis), "u1"))

    def encode_layers(self, arrays, dtype, side, first_layer, start=0):
        return self._masked(b"".join(array.tobytes() for array in arrays))

    def decode_layers_into(self, data, outs, side, first_layer, start=0):
        data = self._masked(data)
        for out in outs:
            out[:] = np.frombuffer(data[: out.nbytes], out.dtype).reshape(out.shape)
            data = data[out.nbytes :]

    def encode(self, array, dtype, side="keys", start=0):
        return self.encode_layers([array], dtype, side, 0, start)

    def decode_into(self, data, out):
        self.decode_layers_into(data, [out], "keys", 0)

    def _masked(self, data):
        data = np.frombuffer(data, "u1")
        return (data ^ np.resize(self.content, data.size)).tobytes()


@pytest.mark.parametrize("on_a_server", [False, True])
def test_the_blob_that_a_codec_needs_is_copied_and_read_nearby(tmp_path, small, monkeypatch, on_a_server, request):
    monkeypatch.setitem(codecs._CODECS, "masked", Masked)
    source = Store.open(tmp_path / "source")
    basis = source.put_blob(bytes(range(1, 200)))
    cache = small({"id": "masked", "basis": basis})
    manifest = cache.build(source)
    assert basis in manifest.blob_digests
    where = request.getfixturevalue("s3_url") if on_a_server else tmp_path / "there"
    report = copy_cache(source, Store.open(where), "small")
    assert report.copied_bytes == manifest.stored_bytes
    pieces = PieceCache(tmp_path / "pieces")
    for _ in range(2):  # the second time from the pieces
        loaded(Store.open(where, pieces=pieces), cache)
    destination = Store.open(where)
    assert destination.verify("small").ok
    destination.gc(grace_s=-10)
    assert destination.verify("small").num_blobs == 3
    back = Store.open(tmp_path / "back")
    copy_cache(destination, back, "small")
    loaded(back, cache)
    destination.backend.replace(blob_path(basis), b"damaged")
    with pytest.raises(CorruptEntry):
        copy_cache(destination, Store.open(tmp_path / "nowhere"), "small")
    assert not destination.verify("small").ok
    if on_a_server:
        for piece in (tmp_path / "pieces").glob("??/*/*"):
            piece.write_bytes(b"damaged too")
    with pytest.raises(CorruptEntry):
        loaded(Store.open(where, pieces=pieces), cache)


def every_object(store):
    manifest = store.resolve("small")[1]
    return [
        *(chunk_path(chunk.key) for chunk in manifest.chunks),
        *(blob_path(digest) for digest in manifest.blob_digests),
        manifest_path(manifest.digest),
        ref_path("small"),
    ]


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("number", range(9))
def test_a_flipped_bit_anywhere_stops_an_import(source, tmp_path, number, where):
    path = tmp_path / "source" / (found := every_object(source))[number % len(found)]
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 4
    path.write_bytes(data)
    destination = Store.open(tmp_path / "there")
    with pytest.raises(StoreError) as caught:
        copy_cache(Store.open(tmp_path / "source"), destination, "small")
    assert isinstance(caught.value, CorruptEntry | UnsupportedFormat)
    assert destination.names() == []
    assert list(destination.backend.list("manifests")) == []


@pytest.mark.parametrize("number", range(8))
def test_a_missing_or_cut_object_stops_an_import(source, tmp_path, number):
    path = tmp_path / "source" / (found := every_object(source))[number % len(found)]
    whole = path.read_bytes()
    for content, error in ((whole[:-1], CorruptEntry), (whole + b"0", CorruptEntry), (None, EntryNotFound)):
        path.unlink() if content is None else path.write_bytes(content)
        destination = Store.open(tmp_path / "there")
        with pytest.raises(error):
            copy_cache(Store.open(tmp_path / "source"), destination, "small")
        assert destination.names() == []


def test_a_swapped_chunk_and_a_foreign_version_are_refused(source, tmp_path):
    manifest = source.resolve("small")[1]
    first, second = (tmp_path / "source" / chunk_path(chunk.key) for chunk in manifest.chunks[:2])
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    destination = Store.open(tmp_path / "there")
    with pytest.raises(CorruptEntry):
        copy_cache(source, destination, "small")
    first.write_bytes(kept)
    newer = canonical_bytes({**manifest.to_json(), "schema": 4})
    ref = replace(source.ref("small"), manifest=__import__("hashlib").sha256(newer).hexdigest())
    source.backend.put_if_absent(manifest_path(ref.manifest), [newer])
    source.backend.replace(ref_path("small"), ref.to_bytes())
    with pytest.raises(UnsupportedFormat, match="schema 4"):
        copy_cache(source, destination, "small")
    assert destination.names() == []


def test_other_bytes_under_the_same_key_are_a_conflict_and_damage_is_replaced(source, tmp_path, small):
    destination = Store.open(tmp_path / "there")
    other = small(num_tokens=40)
    other.layers = [tuple(side[::-1].copy() for side in pair) for pair in other.layers]
    other.build(destination, "mine")
    before = objects(destination)
    with pytest.raises(EntryConflict, match="computed elsewhere"):
        copy_cache(source, destination, "small")
    assert {path: data for path, data in objects(destination).items() if path in before} == before
    damaged = Store.open(tmp_path / "damaged")
    copy_cache(source, damaged, "small")
    manifest = source.resolve("small")[1]
    for number, chunk in enumerate(manifest.chunks[:3]):
        path = tmp_path / "damaged" / chunk_path(chunk.key)
        data = bytearray(path.read_bytes())
        data[(0, chunk.header_bytes, -1)[number]] ^= 1  # in the header, the token ids, the last segment
        path.write_bytes(data)
    report = copy_cache(source, damaged, "small")
    assert report.copied_bytes == sum(chunk.stored_bytes for chunk in manifest.chunks[:3])
    assert damaged.verify("small").ok


def test_names_are_checked_and_only_one_cache_needs_no_name(source, tmp_path, small):
    for name in ("../x", ""):
        with pytest.raises(InvalidName):
            copy_cache(source, Store.open(tmp_path / "there"), "small", name)
    with pytest.raises(EntryNotFound, match="holds no cache"):
        only_name(Store.open(tmp_path / "there"))
    small(seed=4).build(source, "second")
    with pytest.raises(EntryNotFound, match="second, small"):
        only_name(source)


def test_a_full_destination_is_said_and_keeps_what_it_had(source, tmp_path, small, monkeypatch):
    destination = Store.open(tmp_path / "there")
    small(seed=7).build(destination)
    before = objects(destination)

    def full(path, parts):
        raise StoreFull("no space left")

    monkeypatch.setattr(destination.backend, "put_if_absent", full)
    with pytest.raises(StoreFull):
        copy_cache(source, destination, "small")
    assert objects(destination) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("writes", range(0, 10, 2))
def test_a_killed_import_leaves_the_names_and_is_resumed(source, tmp_path, small, writes, monkeypatch):
    root = tmp_path / "there"
    older = small(seed=7)
    older.texts = [b"other", b"texts"]
    old = older.build(Store.open(root))
    child = os.fork()
    if not child:
        left, original = threading.Semaphore(writes), LocalBackend.put_if_absent

        def put(self, path, parts):
            if not left.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, path, parts)

        LocalBackend.put_if_absent = put
        try:
            copy_cache(Store.open(tmp_path / "source"), Store.open(root), "small")
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    destination = Store.open(root)
    whole = len(source.resolve("small")[1].chunks) + 3
    assert (os.WTERMSIG(status) == signal.SIGKILL) == (writes < whole)
    assert destination.resolve("small")[1] == (old if writes < whole else source.resolve("small")[1])
    assert destination.verify("small").ok
    report = copy_cache(source, destination, "small")
    assert report.reused_bytes > 0 or writes <= 4  # what other threads were writing when they died is lost
    assert destination.verify("small").ok
    destination.gc(grace_s=0)
    loaded(destination, small(num_tokens=40))
