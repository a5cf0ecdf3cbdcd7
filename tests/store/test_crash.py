"""kill -9 in the middle of a commit, and builders, readers and gc of several processes on one store."""

import os
import signal
import sys
import time
import traceback

import numpy as np
import pytest

from cag_store import Store

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

FILE_EVENTS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "fcntl.flock"}


def in_child(work):
    """Run `work()` in a forked process; returns its id. The child ends with 0, or with 1 and a traceback."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def die_at(count, events):
    """Let this process be killed just before its `count`-th file operation, or count them when `count` is 0."""

    def hook(event, arguments):
        if event in FILE_EVENTS:
            events.append(event)
            if len(events) == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def count_operations(root, cache):
    reading, writing = os.pipe()

    def work():
        events = []
        die_at(0, events)
        cache.build(Store.open(root, workers=1))
        os.write(writing, str(len(events)).encode())

    child = in_child(work)
    os.close(writing)
    counted = int(os.read(reading, 100))
    os.close(reading)
    os.waitpid(child, 0)
    return counted


def test_a_killed_build_leaves_the_store_as_it_was(tmp_path, small):
    old, new = small(seed=1, num_tokens=16), small(seed=2, num_tokens=16)
    small(seed=1, num_tokens=16).build(Store.open(tmp_path / "counting"))
    total = count_operations(tmp_path / "counting", new)
    assert total > 20
    outcomes = set()
    for point in range(1, total + 1, max(1, total // 14)):
        root = tmp_path / str(point)
        before = old.build(Store.open(root))
        child = in_child(lambda root=root, point=point: (die_at(point, []), new.build(Store.open(root, workers=1))))
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        store = Store.open(root)
        assert store.verify("small").ok
        _, manifest = store.resolve("small")
        outcomes.add(manifest == before)
        assert all(path.startswith("tmp/") for path in store.gc(grace_s=3600).removed)
        after = new.build(store)
        assert store.verify("small").ok
        store.gc(grace_s=0)
        assert store.resolve("small")[1] == after
        assert not list((root / "tmp").iterdir())
        assert sum(1 for _ in store.backend.list("chunks")) == len(after.chunks)
    assert True in outcomes


def test_a_killed_build_resumes_from_whole_chunks(tmp_path, small):
    cache = small(num_tokens=40)
    entries = cache.put_chunks(Store.in_memory())
    parents = ["", *(entry.key for entry in entries)]
    headers = {start: cache.header(parents[start // 8], start) for start in range(0, 40, 8)}

    def work():
        store = Store.open(tmp_path / "store")
        lease = store.build_lease()
        for start in (0, 8, 16):
            store.put_chunk(headers[start], cache.arrays(start), cache.ids(start))
        assert lease
        os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(in_child(work), 0)
    store = Store.open(tmp_path / "store")
    assert not store.gc().build_running
    assert [store.has_chunk(entry.key) for entry in entries] == [True, True, True, False, False]
    assert [store.chunk_entry(entry.key) for entry in entries[:3]] == entries[:3]
    assert cache.put_chunks(store) == entries


def test_builders_readers_and_gc_on_one_store(tmp_path, small):
    root, seconds = tmp_path / "store", 2.0
    caches = [small(seed=seed, num_tokens=24) for seed in range(3)]
    caches[0].build(Store.open(root))

    def repeat(step):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            step()

    def builder(offset):
        store, turn = Store.open(root, workers=1), [offset]

        def step():
            turn[0] += 1
            caches[turn[0] % 3].build(store)

        repeat(step)

    def reader():
        store = Store.open(root, workers=1)

        def step():
            _, _, opened = store.open_reader("small")
            with opened:
                ids = opened.token_ids()
                cache = next(cache for cache in caches if np.array_equal(cache.token_ids, ids))
                buffers = cache.buffers()
                opened.load(buffers)
                cache.check(buffers)

        repeat(step)

    def collector():
        store = Store.open(root)
        repeat(lambda: (store.gc(grace_s=0), time.sleep(0.01)))

    children = [in_child(work) for work in (lambda: builder(0), lambda: builder(1), reader, collector)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    store = Store.open(root)
    assert store.verify("small").ok
    store.gc(grace_s=0)
    assert sum(1 for _ in store.backend.list("chunks")) == 3
