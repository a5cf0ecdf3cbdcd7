import inspect
import time
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open

from cag_store import ROOT, ChunkHeader, Store, chunk_key, errors
from cag_store.backends.page_cache import resident_pages
from cag_store.errors import CorruptEntry, EntryNotFound, EntryPinned, InvalidName, StoreError, UnencodableArray
from cag_store.paths import chunk_path


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store.open(tmp_path / "store") if request.param == "local" else Store.in_memory()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("num_tokens", [1, 8, 20])
def test_a_lossless_cache_comes_back_to_the_bit(store, small, dtype, num_tokens):
    cache = small(dtype=dtype, num_tokens=num_tokens)
    cache.texts = [b"text"] if num_tokens == 1 else cache.texts
    built = cache.build(store) if num_tokens > 1 else None
    if built is None:
        entries = cache.put_chunks(store)
        with store.chunk_reader(entries, cache.context) as reader:
            buffers = cache.buffers()
            reader.load(buffers)
            cache.check(buffers)
        return
    ref, manifest = store.resolve("small")
    assert manifest == built
    assert ref.manifest == built.digest
    with store.reader(manifest) as reader:
        assert np.array_equal(reader.token_ids(), cache.token_ids)
        buffers, layers = cache.buffers(), []
        reader.load(buffers, layers.append)
        assert layers == [0, 1, 2]
        assert reader.timings.wall_s > 0
        assert 0 < reader.timings.bytes_read < manifest.stored_bytes
    cache.check(buffers)


def test_a_layer_is_whole_when_it_is_announced(store, small):
    cache = small(num_tokens=200, chunk_tokens=7)
    manifest = cache.build(store)
    for workers in (1, 4):
        buffers, whole = cache.buffers(), []

        def on_layer(layer, buffers=buffers, whole=whole):
            whole.append(
                all(np.array_equal(a, b[:, :200]) for a, b in zip(cache.layers[layer], buffers[layer], strict=True))
            )

        with store.reader(manifest, workers=workers) as reader:
            reader.load(buffers, on_layer)
        assert whole == [True, True, True]


def test_the_caller_may_stop_a_load(store, small):
    cache = small(num_tokens=200, chunk_tokens=7)
    manifest = cache.build(store)

    def stop(layer):
        raise KeyboardInterrupt

    with store.reader(manifest) as reader:
        with pytest.raises(KeyboardInterrupt):
            reader.load(cache.buffers(), stop)
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)


def test_buffers_that_do_not_fit_are_refused(store, small):
    cache = small()
    manifest = cache.build(store)
    with store.reader(manifest) as reader:
        good = cache.buffers()
        read_only = cache.buffers()
        read_only[1][0].flags.writeable = False
        wide = [(np.zeros((*k.shape[:2], 2 * k.shape[2]), k.dtype)[:, :, ::2], v) for k, v in good]
        for bad in (
            good[:2],
            [(k[:, :5], v) for k, v in good],
            [(k.view(np.float16), v) for k, v in good],
            [(v, k[:1]) for k, v in good],
            wide,
            read_only,
        ):
            with pytest.raises(UnencodableArray):
                reader.load(bad)


def test_common_beginnings_share_chunks(store, small):
    cache = small(num_tokens=24)
    first = cache.build(store, "one")
    other = small(num_tokens=24)
    other.token_ids[10] += 1
    second = other.build(store, "two")
    assert first.chunks[0] == second.chunks[0]
    assert first.chunks[1].key != second.chunks[1].key
    assert first.chunks[2].key != second.chunks[2].key


def test_an_existing_chunk_is_not_encoded_again(store, small):
    cache = small()
    entries = cache.put_chunks(store)

    def never():
        raise AssertionError("consumed")
        yield

    header = cache.header(ROOT, 0)
    assert store.put_chunk(header, never(), cache.ids(0)) == entries[0]
    assert store.has_chunk(header.key)
    assert store.chunk_entry(header.key) == entries[0]


def test_the_key_depends_on_everything(small):
    cache = small()
    context = cache.context
    changes = {
        "model_fingerprint": "x",
        "adapter_fingerprint": "x",
        "rope": {"theta": 10001.0},
        "dtype": "float16",
        "compute_dtype": "x",
        "codec": {"id": "int8"},
        "chunk_tokens": 9,
        "sides": 1,
    }
    assert set(changes) == set(inspect.signature(type(context)).parameters)
    keys = [chunk_key(ROOT, [1, 2], replace(context, **{name: value})) for name, value in changes.items()]
    keys += [
        chunk_key(*arguments, context)
        for arguments in ((ROOT, [1, 2]), (ROOT, [2, 1]), (ROOT, [1]), ("ab" * 32, [1, 2]))
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_never_changes(small):
    """The value of the first release: another one would orphan every cache there is."""
    from cag_store import ChunkContext

    context = ChunkContext("m", {"theta": 1e4, "ü": [1, None]}, "bfloat16", "bfloat16", {"id": "lossless"}, 256)
    assert chunk_key("ab" * 32, [0, 1, 2**32 - 1], context) == KEY


KEY = "061e89b4f170712240ebdf28e18cd919b223d65eda93ee126dc36bc5f726a113"


@pytest.mark.parametrize("ids", [[-1], [2**32], [[1]], [1.0], ["a"]])
def test_token_ids_that_are_refused(small, ids):
    with pytest.raises(InvalidName):
        chunk_key(ROOT, ids, small().context)


def test_chunks_that_are_not_what_they_say_are_refused(store, small):
    cache = small()
    header = cache.header(ROOT, 0)
    with pytest.raises(InvalidName):
        store.put_chunk(header, cache.arrays(0), cache.ids(8))
    for layers in (cache.arrays(0)[:2], [*cache.arrays(0), cache.arrays(0)[0]], cache.arrays(0)[::-1]):
        with pytest.raises(UnencodableArray):
            store.put_chunk(header, layers, cache.ids(0))
    context = replace(header.context, codec={"id": "lossless"})
    short = ChunkHeader(**{**vars(header), "context": context, "key": chunk_key(ROOT, cache.ids(0), context)})
    with pytest.raises(InvalidName, match="full codec configuration"):
        store.put_chunk(short, cache.arrays(0), cache.ids(0))
    assert not store.has_chunk(header.key)


def test_commit_needs_every_part(store, small):
    manifest = small().put(store)
    store.backend.delete(chunk_path(manifest.chunks[1].key))
    with pytest.raises(EntryNotFound):
        store.commit("small", manifest)
    other = small(seed=1)
    with pytest.raises(CorruptEntry, match="blobs"):
        store.commit("small", other.put(store, blob_bytes=1))
    assert store.names() == []


@pytest.mark.parametrize(
    "name", ["", ".", "..", "-x", ".x", "a/b", "a b", "a\\b", "ü", "x" * 129, "a\n", "a\0", None, 5]
)
def test_names_that_are_refused(store, small, name):
    manifest = small().put(store)
    for call in (lambda: store.commit(name, manifest), lambda: store.resolve(name), lambda: store.remove(name)):
        with pytest.raises(InvalidName):
            call()


def test_names_pins_and_expiry(store, small):
    cache = small()
    cache.build(store, "a.b-C_1")
    cache.build(store, "x" * 128)
    assert store.names() == sorted(["a.b-C_1", "x" * 128])
    assert not store.resolve("a.b-C_1")[0].pinned
    store.set_ttl("a.b-C_1", -5)
    with pytest.raises(EntryNotFound, match="expired"):
        store.resolve("a.b-C_1")
    store.pin("a.b-C_1")
    assert store.resolve("a.b-C_1")[0].pinned
    store.unpin("a.b-C_1")
    with pytest.raises(EntryNotFound, match="expired"):
        store.resolve("a.b-C_1")
    store.set_ttl("a.b-C_1", None)
    assert store.resolve("a.b-C_1")[0].expires_at is None
    store.pin("a.b-C_1")
    cache.build(store, "a.b-C_1")
    assert store.ref("a.b-C_1").pinned
    with pytest.raises(EntryPinned, match="force"):
        store.remove("a.b-C_1")
    assert store.resolve("a.b-C_1")[0].pinned
    store.remove("a.b-C_1", force=True)
    with pytest.raises(EntryNotFound, match="xxxx"):
        store.resolve("a.b-C_1")
    with pytest.raises(EntryNotFound):
        store.remove("a.b-C_1")
    with pytest.raises(EntryNotFound):
        store.pin("a.b-C_1")


def test_blobs(store):
    for data in (b"", b"text", bytes(100_000)):
        sha = store.put_blob(data)
        assert store.put_blob(data) == sha
        assert store.get_blob(sha) == data
    with pytest.raises(EntryNotFound):
        store.get_blob("0" * 64)
    with pytest.raises(InvalidName):
        store.get_blob("../../etc/passwd")


def test_verify_reads_every_byte(store, small):
    manifest = small("int8").build(store)
    report = store.verify("small")
    assert report.ok
    assert report.num_chunks == 3
    assert report.num_blobs == 2
    refs_and_manifest = sum(info.size_bytes for folder in ("refs", "manifests") for info in store.backend.list(folder))
    assert report.bytes_read == manifest.stored_bytes + refs_and_manifest
    report.raise_first()
    with pytest.raises(EntryNotFound):
        store.verify("other")
    for name in ("..", "", "-x", None):
        with pytest.raises(InvalidName):
            store.verify(name)


def test_verify_holds_little_of_a_chunk_at_a_time(store, small, monkeypatch):
    small(chunk_tokens=20).build(store)
    lengths, read = [], store.backend.get_range

    def counted(path, offset, length):
        lengths.extend([length] if offset else [])  # of segments, not of the header
        return read(path, offset, length)

    monkeypatch.setattr(store.backend, "get_range", counted)
    assert store.verify("small").ok
    assert len(lengths) == 1
    monkeypatch.setattr("cag_store.chunk_files._RUN_BYTES", sum(lengths) // 2)
    whole = lengths.pop()
    assert store.verify("small").ok
    assert 1 < len(lengths) < 6
    assert sum(lengths) == whole
    assert max(lengths) <= whole // 2


def test_gc_removes_what_nothing_holds(store, small):
    old, new = small(seed=1).build(store), small(seed=2).build(store)
    assert store.gc().removed == ()
    preview = store.gc(grace_s=0, dry_run=True)
    assert preview.removed_bytes > old.stored_bytes - old.blob_bytes
    report = store.gc(grace_s=0)
    assert (report.removed, report.removed_bytes) == (preview.removed, preview.removed_bytes)
    assert not any(store.has_chunk(chunk.key) for chunk in old.chunks)
    assert store.verify("small").ok
    assert store.resolve("small")[1] == new
    store.remove("small")
    store.gc(grace_s=0)
    assert not [info for folder in ("chunks", "blobs", "manifests", "refs") for info in store.backend.list(folder)]


def test_gc_leaves_what_is_being_read_or_built(store, small):
    cache = small(seed=1)
    old = cache.build(store)
    reader = store.reader(old)
    small(seed=2).build(store)
    assert store.gc(grace_s=0).live_leases == 1
    buffers = cache.buffers()
    reader.load(buffers)
    cache.check(buffers)
    reader.close()
    reader.close()
    with store.build_lease():
        report = store.gc(grace_s=0)
        assert report.build_running
        assert report.removed == ()
        assert report.kept_unreferenced == 4
    assert len(store.gc(grace_s=0).removed) == 4


def test_gc_removes_expired_caches_but_not_pinned_ones(store, small):
    small(seed=1).build(store, "gone")
    small(seed=2).build(store, "kept")
    for name in ("gone", "kept"):
        store.set_ttl(name, -5)
    store.pin("kept")
    assert store.gc(dry_run=True).expired == ("gone",)
    assert store.gc(grace_s=0).expired == ("gone",)
    assert store.names() == ["kept"]
    assert store.verify("kept").ok


def test_reuse_makes_a_chunk_new_for_gc(store, small):
    entries = small().put_chunks(store)
    time.sleep(0.2)
    before = time.time()
    store.chunk_entry(entries[0].key)
    age = time.time() - before + 0.1
    report = store.gc(grace_s=age)
    assert chunk_path(entries[0].key) not in report.removed
    assert len(report.removed) == len(entries) - 1


def test_gc_stops_when_it_cannot_know_what_is_used(store, small):
    manifest = small().build(store)
    path = f"manifests/{manifest.digest[:2]}/{manifest.digest}.json"
    store.backend.replace(path, b"{}")
    with pytest.raises(CorruptEntry, match="removed nothing"):
        store.gc(grace_s=0)
    assert all(store.has_chunk(chunk.key) for chunk in manifest.chunks)
    store.remove("small")
    store.gc(grace_s=0)
    assert not store.has_chunk(manifest.chunks[0].key)


def test_the_page_cache_can_be_dropped(tmp_path, small):
    cache = small()
    store = Store.open(tmp_path / "store")
    manifest = cache.build(store)
    if store.drop_page_cache("small"):  # a file system in memory cannot drop anything
        for chunk in manifest.chunks:
            with (tmp_path / "store" / chunk_path(chunk.key)).open("rb") as file:
                assert resident_pages(file.fileno()) == 0
    with store.reader(manifest) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)
    memory = Store.in_memory()
    cache.build(memory)
    assert memory.drop_page_cache("small") is False


def test_chunks_are_safetensors(tmp_path, small):
    store = Store.open(tmp_path / "store")
    cache = small()
    entry = cache.build(store).chunks[0]
    with safe_open(tmp_path / "store" / chunk_path(entry.key), "np") as file:
        assert len(list(file.keys())) == 7
        assert np.array_equal(file.get_tensor("token_ids"), cache.ids(0))
        out = np.empty((2, 8, 8), "<u2")
        cache.codec.decode_into(file.get_tensor("layers.000.keys").tobytes(), out)
        assert np.array_equal(out, cache.arrays(0)[0][0])


def test_a_store_that_may_not_be_written_can_be_read(tmp_path, small, monkeypatch):
    cache = small()
    store = Store.open(tmp_path / "store")
    manifest = cache.build(store)

    def refuse(content):
        raise errors.StoreFull("read-only")

    monkeypatch.setattr(store.backend, "acquire_lease", refuse)
    with store.reader(manifest) as reader:
        buffers = cache.buffers()
        reader.load(buffers)
    cache.check(buffers)
    assert store.verify("small").ok


def test_the_tree_of_errors():
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, StoreError)]
    assert len(classes) == 14
    for cls in classes:
        assert cls.__name__ in errors.__doc__
        error = cls("what", where="here")
        assert str(error) == "what"
        assert error.facts == {"where": "here"}
        assert cls is StoreError or len(cls.__bases__) == 2
