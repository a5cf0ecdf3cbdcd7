"""The object store's backend: the contract, conditions, locks, leases, and two writers of one ref."""

import os
import signal
import threading
import time
import uuid
from dataclasses import replace

import pytest
from obstore.store import MemoryStore

from cag_store import Store
from cag_store.backends import LocalBackend, is_url, open_backend
from cag_store.backends.object import ObjectBackend
from cag_store.backends.object_client import ObjectClient
from cag_store.backends.object_locks import Locks
from cag_store.errors import (
    BackendUnavailable,
    EntryChanged,
    EntryNotFound,
    StoreBusy,
    UnsupportedBackend,
    UnsupportedFormat,
)
from cag_store.paths import blob_path
from cag_store.testing import BackendConformance
from object_server import BUCKET, QUICK
from torture import in_child, outcome


class TestMemory(BackendConformance):
    def make_backend(self, folder):
        return open_backend("memory://")


class TestFileUrl(BackendConformance):
    def make_backend(self, folder):
        return open_backend(folder.as_uri())


@pytest.mark.usefixtures("s3_environment")
class TestS3(BackendConformance):
    def make_backend(self, folder):
        return open_backend(f"s3://{BUCKET}/{uuid.uuid4().hex}")


def test_urls_and_paths_are_told_apart(tmp_path):
    assert is_url("s3://bucket/prefix")
    assert not is_url(tmp_path)
    assert not is_url("s3:/bucket")
    opened = open_backend((tmp_path / "a b").as_uri())
    assert isinstance(opened, LocalBackend)
    assert opened.root == tmp_path / "a b"


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "s3:///x", "https://x/y", "file://host/x"])
def test_urls_that_nobody_serves_are_refused(url):
    with pytest.raises(UnsupportedBackend, match=r"s3://bucket|no host"):
        open_backend(url)


@pytest.mark.parametrize(
    "url", ["s3://key:geheim@bucket/x", "s3://bucket/x?X-Amz-Signature=geheim", "az://c/p?sig=geheim"]
)
def test_secrets_in_urls_are_refused_and_not_repeated(url):
    with pytest.raises(UnsupportedBackend) as caught:
        open_backend(url)
    assert "geheim" not in str(caught.value)


def test_foreign_prefixes_and_versions_are_refused(s3_url):
    client = ObjectClient(s3_url, QUICK)
    client.write("thesis.tex", [b"my life's work"])
    with pytest.raises(UnsupportedFormat, match=r"thesis\.tex"):
        open_backend(s3_url)
    client.write("format", [b"cag-store 2\n"])
    with pytest.raises(UnsupportedFormat, match="cag-store 2"):
        open_backend(s3_url)


@pytest.mark.parametrize("begin", [Store.build_lease, lambda store: store.backend.acquire_lease({"kind": "reader"})])
def test_a_new_store_is_open_to_others_before_its_first_chunk(begin, small):
    """Which may take minutes, and never comes when the process is killed: nothing is released then."""
    server = MemoryStore()
    held = begin(Store(ObjectBackend("memory://", store=server)))
    small().build(Store(ObjectBackend("memory://", store=server)))
    assert Store(ObjectBackend("memory://", store=server)).verify("small").ok
    held.release()


def test_a_store_that_is_made_while_it_is_opened_is_not_foreign(monkeypatch):
    server, listed = MemoryStore(), ObjectClient.list
    first = ObjectBackend("memory://", store=server)

    def made_meanwhile(client, prefix):
        first.put_if_absent("chunks/x", [b"1"])
        return listed(client, prefix)

    monkeypatch.setattr(ObjectClient, "list", made_meanwhile)
    assert ObjectBackend("memory://", store=server).get("chunks/x", 1) == b"1"


def test_what_others_put_below_the_prefix_stops_nothing_and_stays():
    server = MemoryStore()
    store = Store(ObjectBackend("memory://", replace(QUICK, expiry_s=-10), server))
    address = store.put_blob(b"a text")
    foreign = [
        "blobs/.DS_Store",
        "blobs/lost+found/x",
        "refs/._a.json",
        "manifests/ab/a.json.bak",
        "leases/.x",
        "tmp/.x",
    ]
    for path in foreign:
        server.put(path, b"1")
    assert (store.names(), list(store.backend.list("refs"))) == ([], [])
    assert store.gc(grace_s=-10).removed == (blob_path(address),)
    assert [server.head(path)["path"] for path in foreign] == foreign


@pytest.mark.parametrize("content", [b"[" * 100_000, b" " * (2 << 20) + b"{}", b"\xff", b"[]", b"{}"])
def test_a_lease_that_nobody_writes_holds_everything(content):
    server = MemoryStore()
    store = Store(ObjectBackend("memory://", QUICK, server))
    address = store.put_blob(b"a text")
    server.put(f"leases/{uuid.uuid4().hex}.json", content)
    report = store.gc(grace_s=-10)
    assert (report.build_running, report.removed) == (True, ())
    assert store.get_blob(address) == b"a text"


def test_the_collector_removes_many_objects_in_few_requests(proxy, s3_url):
    store = Store.open(s3_url)
    addresses = [store.put_blob(b"text %d" % number) for number in range(30)]
    store.backend.touch(blob_path(addresses[0]))
    proxy.requests.clear()
    removed = store.gc(grace_s=-100).removed
    assert sorted(removed) == sorted(map(blob_path, addresses))
    assert len(list(store.backend.list("blobs"))) == len(list(store.backend.list("touched"))) == 0
    assert len([request for request in proxy.requests if any(a in request.path for a in addresses)]) == 0
    assert len([request for request in proxy.requests if addresses[1].encode() in request.body]) == 1


def test_objects_that_have_gone_meanwhile_are_gone():
    server = MemoryStore()
    backend = ObjectBackend("memory://", QUICK, server)
    for name in ("a", "b", "c"):
        backend.replace(f"blobs/{name}", b"1")
    backend.touch("blobs/c")
    backend.delete_all(["blobs/a", "blobs/x", "blobs/b", "blobs/c"])
    assert [list(backend.list(folder)) for folder in ("blobs", "touched")] == [[], []]


def test_of_an_endless_marker_only_the_beginning_is_read(monkeypatch):
    server, read, sizes = MemoryStore(), ObjectClient.read, []

    def measured(*arguments, **options):
        data, facts = read(*arguments, **options)
        sizes.append(len(data))
        return data, facts

    server.put("format", b"x" * (1 << 20))
    monkeypatch.setattr(ObjectClient, "read", measured)
    with pytest.raises(UnsupportedFormat):
        ObjectBackend("memory://", QUICK, server)
    assert max(sizes) <= 64


def test_a_cache_on_a_server_is_read_as_it_was_written(s3_url, small):
    cache = small(num_tokens=60)
    manifest = cache.build(Store.open(s3_url))
    store = Store.open(s3_url)
    assert store.resolve("small")[1] == manifest
    with store.open_reader("small")[2] as reader:
        assert len(store.backend.live_leases()) == 1
        buffers = cache.buffers()
        reader.load(buffers)
        cache.check(buffers)
        assert reader.tier == "object-store"
        assert reader.timings.bytes_by_tier == {"object-store": reader.timings.bytes_read}
    assert list(store.backend.live_leases()) == []
    assert store.verify("small").ok
    assert store.pin("small").pinned
    assert store.gc(grace_s=0).removed == ()
    store.remove("small", force=True)
    assert len(store.gc(grace_s=3600, dry_run=True).removed) == 0
    assert len(store.gc(grace_s=-10).removed) == len(manifest.chunks) + 3
    assert list(store.backend.list("chunks")) == []


def test_requests_are_counted_by_objects_and_not_by_segments(proxy, s3_url, small):
    cache, store = small(), Store.open(s3_url)
    manifest = cache.build(store)
    assert len(manifest.chunks) == 3  # of 6 segments each

    def requests(work, method, below):
        proxy.requests.clear()
        work()
        return sum(request.method == method and f"/{below}/" in request.path for request in proxy.requests)

    assert requests(lambda: store.verify("small"), "GET", "chunks") == 2 * 3
    assert requests(lambda: cache.put_chunks(store), "GET", "chunks") == 5 * 3
    assert requests(lambda: store.put_blob(cache.texts[0]), "GET", "blobs") == 1
    assert requests(lambda: store.put_blob(cache.texts[0]), "PUT", f"{s3_url.rpartition('/')[2]}/blobs") == 0


@pytest.mark.slow
def test_what_was_touched_is_young(s3_url):
    backend = open_backend(s3_url)
    backend.put_if_absent("chunks/ab/x", [b"1"])
    written = next(iter(backend.list("chunks"))).modified_s
    while backend.now_s() <= written:  # times of servers are whole seconds
        time.sleep(0.1)
    backend.touch("chunks/ab/x")
    assert next(iter(backend.list("chunks"))).modified_s > written
    assert backend.delete("chunks/ab/x")
    assert list(backend.list("touched")) == []


def test_an_object_that_is_replaced_between_two_ranges_is_noticed(s3_url):
    backend, other = open_backend(s3_url), open_backend(s3_url)
    backend.put_if_absent("chunks/x", [b"0123456789"])
    assert backend.get_start("chunks/x", 3) == (b"012", 10)
    other.replace("chunks/x", b"abcdefghij")
    with pytest.raises(EntryChanged, match="open the cache again"):
        backend.get_range("chunks/x", 3, 3)
    assert backend.get_start("chunks/x", 3) == (b"abc", 10)
    assert backend.get_range("chunks/x", 3, 3) == b"def"


def test_a_ref_that_changed_under_a_lock_that_was_lost_is_not_overwritten(s3_url):
    backend = open_backend(s3_url)
    backend.replace("refs/a.json", b"first")
    with backend.locked("refs"):
        backend.get("refs/a.json", 100)
        open_backend(s3_url).replace("refs/a.json", b"from elsewhere")
        with pytest.raises(StoreBusy, match="changed by somebody else"):
            backend.replace("refs/a.json", b"second")
        with pytest.raises(EntryNotFound):
            backend.get("refs/b.json", 100)
        open_backend(s3_url).replace("refs/b.json", b"from elsewhere")
        with pytest.raises(StoreBusy):
            backend.replace("refs/b.json", b"mine")
    assert backend.get("refs/a.json", 100) == b"from elsewhere"


def test_two_writers_of_one_ref_lose_nothing(s3_url, small):
    stores = [Store.open(s3_url) for _ in range(2)]
    small().build(stores[0])
    together = threading.Barrier(2)

    def change(store, what):
        together.wait()
        what(store)

    for _ in range(3):
        stores[0].unpin("small")
        stores[0].set_ttl("small", None)
        changes = (lambda store: store.pin("small"), lambda store: store.set_ttl("small", 1e6))
        threads = [threading.Thread(target=change, args=pair) for pair in zip(stores, changes, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ref = stores[0].ref("small")
        assert ref.pinned
        assert ref.expires_at is not None


def test_the_collector_waits_for_those_who_commit_and_they_for_it(s3_url):
    first, second = open_backend(s3_url), open_backend(s3_url)
    with first.locked("gc", shared=True):
        with second.locked("gc", shared=True, timeout_s=0.2):
            pass
        with pytest.raises(StoreBusy), second.locked("gc", timeout_s=0.2):
            pass
    with first.locked("gc"), pytest.raises(StoreBusy), second.locked("gc", shared=True, timeout_s=0.2):
        pass
    with second.locked("gc", timeout_s=5):
        pass
    assert list(first.list("locks")) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_neither_ends_a_lease_nor_a_lock(s3_url):
    backend, other = open_backend(s3_url), open_backend(s3_url)
    lease, lock = backend.acquire_lease({"kind": "build"}), backend.locked("gc")
    lock.__enter__()

    def work():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # a child that waits for threads that it does not have would not end
        lease.release()
        lock.__exit__(None, None, None)

    assert outcome(in_child(work)) == 0
    assert list(other.live_leases()) == [{"kind": "build"}]
    assert [info.path for info in other.list("locks")] == ["locks/gc"]
    lock.__exit__(None, None, None)
    lease.release()
    assert not [info for folder in ("locks", "leases") for info in other.list(folder)]


def dead_holder(url):
    """Locks whose heartbeat never beats: what a killed process leaves."""
    return Locks(ObjectClient(url, QUICK), replace(QUICK, heartbeat_s=1e6))


@pytest.mark.slow
def test_what_the_dead_held_expires_by_the_servers_clock(s3_url, monkeypatch):
    backend, dead = open_backend(s3_url), dead_holder(s3_url)
    backend.put_if_absent("chunks/x", [b"1"])
    dead.lease({"kind": "build"})
    dead.locked("refs", False, 1, True).__enter__()
    dead.locked("gc", True, 1, True).__enter__()
    assert list(backend.live_leases()) == [{"kind": "build"}]
    died_at = backend.now_s()
    while backend.now_s() < died_at + 2:  # times of servers are whole seconds
        time.sleep(0.1)
    lease = backend.acquire_lease({"kind": "reader"})
    monkeypatch.setattr(backend._locks, "now_s", lambda: died_at + 1 + QUICK.expiry_s)
    assert list(backend.live_leases()) == [{"kind": "reader"}]
    with backend.locked("refs", timeout_s=0), backend.locked("gc", timeout_s=0):
        backend.replace("refs/x.json", b"1")
    lease.release()
    assert not [info for folder in ("locks", "leases") for info in backend.list(folder)]


def test_what_is_held_is_renewed_and_a_lock_that_somebody_took_is_lost(s3_url):
    locks = dead_holder(s3_url)
    with locks.locked("refs", False, 1, True) as held:
        before = held.version
        locks.renew(held)
        assert held.version != before
        held.version = before  # as if the answer to a renewal had been lost
        locks.renew(held)
        locks.check_fresh(held)
        ObjectClient(s3_url, QUICK).write("locks/refs", [b'{"owner": "somebody else"}'])
        locks.renew(held)
        with pytest.raises(StoreBusy, match="lost"):
            locks.check_fresh(held)
    assert [path for path, _ in ObjectClient(s3_url, QUICK).list("locks")] == ["locks/refs"]


def test_nothing_is_changed_under_a_lock_that_could_not_be_renewed(s3_url):
    backend = ObjectBackend(s3_url, replace(QUICK, fence_s=0.2, heartbeat_s=1e6))
    backend.put_if_absent("chunks/x", [b"1"])
    with backend.locked("gc"):
        time.sleep(0.3)
        with pytest.raises(StoreBusy, match="lost"):
            backend.delete("chunks/x")
        with pytest.raises(StoreBusy, match="lost"):
            backend.replace("refs/x.json", b"1")
    assert backend.get("chunks/x", 1) == b"1"


def without_conditions(request, ask):
    request.headers = {
        name: value for name, value in request.headers.items() if name.lower() not in ("if-match", "if-none-match")
    }
    return ask(request)


@pytest.mark.slow
def test_a_server_that_ignores_conditions_is_only_written_to_on_demand(proxy, s3_url, small):
    proxy.plan = without_conditions
    backend = ObjectBackend(s3_url, QUICK)
    with pytest.raises(UnsupportedBackend, match="CAG_ALLOW_UNCONDITIONAL_WRITES"):
        backend.put_if_absent("chunks/x", [b"1"])
    with pytest.raises(UnsupportedBackend), backend.locked("gc"):
        pass
    store = Store(ObjectBackend(s3_url, replace(QUICK, allow_unconditional=True)))
    manifest = small().build(store)
    assert not store.backend.put_if_absent(f"chunks/{manifest.chunks[0].key[:2]}/{manifest.chunks[0].key}", [b"2"])
    assert store.verify("small").ok
    store.gc(grace_s=0)
    with Store(ObjectBackend(s3_url, QUICK)).open_reader("small")[2] as reader:
        buffers = small().buffers()
        reader.load(buffers)
        small().check(buffers)


def test_a_missing_bucket_and_a_missing_server_are_said(s3_environment, monkeypatch):
    with pytest.raises(BackendUnavailable) as caught:
        ObjectBackend("s3://nobodys/x", QUICK).put_if_absent("chunks/x", [b"1"])
    assert "404" in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(BackendUnavailable, match="no connection") as caught:
        ObjectBackend("s3://shelf/x", QUICK)
    assert "a-very-secret-word" not in str(caught.value)


def test_one_store_object_serves_both_directions_in_memory():
    store = MemoryStore()
    assert ObjectBackend("memory://", store=store).put_if_absent("chunks/x", [b"1"])
    assert ObjectBackend("memory://", store=store).get("chunks/x", 1) == b"1"
