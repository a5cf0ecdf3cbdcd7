"""Builders, readers, updates, gc, limits, pins and removals of several processes on one store, for seconds or minutes.

Every byte that is read is compared with what was built; an error must be one that the operation documents.
`CAG_TORTURE_S` sets how long the slow form runs.
"""

import os
import random
import signal
import sys
import time

import pytest

from cag_store import Store
from cag_store.codecs import warm_up
from cag_store.errors import EntryNotFound, StoreBusy
from torture import changed_from, check_collected, in_child, open_store, outcome, read_whole

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

SHORT_S = 1.5
LONG_S = float(os.environ.get("CAG_TORTURE_S", "150"))
KEPT = ("kept", "pinned")  # never removed, replaced all the time
FREE = ("a", "b", "c")  # anything may happen to them


@pytest.fixture(scope="module")
def caches(small_class):
    """Known contents: two families with common beginnings, and texts of their own."""
    found = []
    for seed in range(2):
        first = small_class(seed=seed, num_tokens=24)
        found += [first, changed_from(first, 9), changed_from(first, 17)]
    found.append(small_class("int8", num_tokens=16, seed=7))
    for number, cache in enumerate(found):
        cache.texts = [b"the first text", b"text %d" % number]
    return found[:6]  # int8 does not come back to the bit


class Worker:
    """What one process does until the end: `step` after `step`, with a store of its own."""

    allowed: tuple = (StoreBusy,)
    pause_s = 0.0

    def __init__(self, root, caches, seed):
        self.root, self.caches, self.chance = root, caches, random.Random(seed)

    def run(self, seconds):
        self.store = open_store(self.root)
        done, end = 0, time.monotonic() + seconds
        while time.monotonic() < end or not done:
            try:
                self.step()
                done += 1
            except self.allowed:
                pass
            time.sleep(self.pause_s)
        print(f"{type(self).__name__}: {done} steps", file=sys.stderr, flush=True)

    def step(self):
        raise NotImplementedError

    def any_name(self):
        return self.chance.choice(KEPT + FREE)


class Builder(Worker):
    """Two of them build the same names."""

    def step(self):
        self.chance.choice(self.caches).build(self.store, self.any_name())


class Updater(Worker):
    """Builds behind what a name means now, as `cag update` does: reads it, then reuses its chunks."""

    allowed = (StoreBusy, EntryNotFound)

    def step(self):
        name = self.any_name()
        current = read_whole(self.store, name, self.caches)
        family = self.caches.index(current) // 3 * 3
        self.caches[family + self.chance.randrange(3)].build(self.store, name)


class Reader(Worker):
    """Reads what is always there; a name that is missing is an error."""

    def step(self):
        name = self.chance.choice(KEPT)
        read_whole(self.store, name, self.caches)
        if self.chance.random() < 0.2:
            self.store.verify(name).raise_first()


class FreeReader(Worker):
    """Reads what may have gone."""

    allowed = (StoreBusy, EntryNotFound)

    def step(self):
        read_whole(self.store, self.chance.choice(FREE), self.caches)


class LongReader(Worker):
    """Holds a cache while it is replaced, removed and collected, and reads it only then."""

    allowed = (StoreBusy, EntryNotFound)

    def step(self):
        _, _, reader = self.store.open_reader(self.any_name())
        with reader:
            ids = reader.token_ids()
            (cache,) = [cache for cache in self.caches if (cache.token_ids == ids).all()]
            time.sleep(self.chance.uniform(0, 0.3))
            buffers = cache.buffers()
            try:
                reader.load(buffers)
            except EntryNotFound as error:
                raise AssertionError("what was open has gone") from error
            cache.check(buffers)


class Collector(Worker):
    pause_s = 0.01

    def step(self):
        self.store.gc(grace_s=0, dry_run=self.chance.random() < 0.2)


class Evictor(Worker):
    pause_s = 0.05

    def step(self):
        self.store.gc(max_bytes=self.chance.randrange(40_000), keep=["kept"])


class Tidier(Worker):
    """Pins, expiry, removal, listing. What is called `pinned` stays so."""

    allowed = (StoreBusy, EntryNotFound)
    pause_s = 0.005

    def step(self):
        name, store = self.chance.choice(FREE), self.store
        action = self.chance.randrange(6)
        if action == 0:
            store.pin(name)
        elif action == 1:
            store.unpin(name)
        elif action == 2:
            store.set_ttl(name, self.chance.choice([None, -1, 1]))
        elif action == 3:
            store.remove(name, force=True)
        elif action == 4:
            usage = store.usage()
            assert 0 < usage.held_bytes <= usage.total_bytes
        else:
            assert set(KEPT) <= {ref.name for ref in store.refs()}


WORKERS = (Builder, Builder, Updater, Reader, FreeReader, LongReader, Collector, Evictor, Tidier)


def run_all(root, caches, seconds):
    warm_up()  # here, and not in each child
    store = Store.open(root)
    for name in KEPT:
        caches[0].build(store, name)
    store.pin("pinned")
    workers = [kind(root, caches, seed) for seed, kind in enumerate(WORKERS)]
    children = [in_child(lambda worker=worker: worker.run(seconds)) for worker in workers]
    ended = [outcome(child) for child in children]
    assert ended == [0] * len(children), dict(zip([type(worker).__name__ for worker in workers], ended, strict=True))
    assert set(KEPT) <= set(store.names())
    store.gc(grace_s=0)
    check_collected(store)
    for name in store.names():
        read_whole(store, name, caches)


def test_everybody_at_once(tmp_path, caches):
    run_all(tmp_path / "store", caches, SHORT_S)


@pytest.mark.slow
@pytest.mark.timeout(3 * LONG_S + 900)
def test_everybody_at_once_for_minutes(tmp_path, caches):
    run_all(tmp_path / "store", caches, LONG_S)


def test_gc_gets_its_turn_among_readers_that_never_pause(tmp_path, caches):
    """Each of them shares the lock for a moment, and there always is one."""
    root = tmp_path / "store"
    backend = Store.open(root).backend
    backend.put_if_absent("chunks/x", [b""])

    def hold():
        while True:
            with backend.locked("gc", shared=True):
                time.sleep(0.05)

    children = [in_child(hold) for _ in range(8)]
    try:
        for _ in range(3):
            with backend.locked("gc", timeout_s=3600.0):
                pass
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
        assert {outcome(child) for child in children} == {-signal.SIGKILL}


def test_a_repaired_chunk_is_not_removed_by_whoever_saw_the_damage_too(tmp_path, caches, monkeypatch):
    """The second of two builders that found the same damaged chunk comes to delete it when the first has mended it."""
    from cag_store.errors import CorruptEntry
    from cag_store.paths import chunk_path

    root = tmp_path / "store"
    late, quick = Store.open(root), Store.open(root)
    manifest = caches[0].build(quick, "kept")
    path = root / chunk_path(manifest.chunks[1].key)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    lock = late.backend.locked

    def mended_meanwhile(name, *arguments, **options):
        if name == "repair":
            monkeypatch.undo()
            caches[0].build(quick, "kept")
        return lock(name, *arguments, **options)

    monkeypatch.setattr(late.backend, "locked", mended_meanwhile)
    assert late.chunk_entry(manifest.chunks[1].key) == manifest.chunks[1]
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptEntry):
        late.chunk_entry(manifest.chunks[1].key)
    assert not path.exists()


def test_a_name_that_is_replaced_while_it_is_looked_up_is_found(tmp_path, caches, monkeypatch):
    root = tmp_path / "store"
    store, other = Store.open(root), Store.open(root)
    caches[0].build(store, "name")
    read = store.manifest

    def replaced_meanwhile(digest):
        monkeypatch.undo()
        caches[3].build(other, "name")
        other.gc(grace_s=0)
        return read(digest)

    monkeypatch.setattr(store, "manifest", replaced_meanwhile)
    ref, manifest = store.resolve("name")
    assert ref.manifest == manifest.digest == other.ref("name").manifest
    other.backend.delete(f"manifests/{manifest.digest[:2]}/{manifest.digest}.json")
    with pytest.raises(EntryNotFound):
        store.resolve("name")
