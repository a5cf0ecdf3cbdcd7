"""kill -9 at any point of any operation: no ref is broken, nothing is lost, the next operation works, gc cleans up."""

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, field
from unittest import mock

import pytest

from cag_store import Store, copy_cache, transfer
from cag_store.codecs import warm_up
from cag_store.errors import EntryNotFound
from torture import (
    Countdown,
    CountedBackend,
    changed_from,
    check_collected,
    count_file_events,
    in_child,
    open_store,
    outcome,
    read_whole,
    value_of_child,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@dataclass
class Scene:
    """A store to be damaged: `template` is copied for each point. `pinned` and `other` must survive everything."""

    template: object
    caches: dict
    copies: int = 0
    killed: int = 0
    outcomes: set = field(default_factory=set)

    def new(self):
        self.copies += 1
        root = self.template.parent / f"copy-{self.copies}"
        shutil.copytree(self.template, root)
        return root


def build(store, caches):
    caches["new"].build(store, "name")


def update(store, caches):
    caches["updated"].build(store, "name")


def gc(store, caches):
    store.gc(grace_s=0)


def evict(store, caches):
    store.gc(max_bytes=0, keep=["other"])


def rename(store, caches):
    """Names, pins and expiry: a ref is swapped each time."""
    store.pin("name")
    store.unpin("name")
    store.set_ttl("name", 1000)


def import_(store, caches):
    """One chunk or text at a time, so that the order of operations is always the same."""
    source = open_store(store.backend.root.parent / "source")
    with mock.patch.object(transfer, "_PARALLEL_COPIES", 1):
        copy_cache(source, store, "there", "name")


# operation: what `name` may mean when it was killed, None: nothing; and what it means once it was run to its end
OPERATIONS = {
    build: ({"old", "new"}, "new"),
    update: ({"old", "updated"}, "updated"),
    gc: ({"old"}, "old"),
    evict: ({"old", None}, None),
    rename: ({"old"}, "old"),
    import_: ({"old", "new"}, "new"),
}


@pytest.fixture(scope="module")
def scene(small_class, tmp_path_factory):
    """Caches that share chunks, an expired one, and chunks of a build that was interrupted."""
    caches = {name: small_class(seed=seed, num_tokens=24) for seed, name in enumerate(("old", "new", "other", "loose"))}
    caches["updated"] = changed_from(caches["old"], 13)
    caches["pinned"] = changed_from(caches["old"], 20)
    for cache in (caches["new"], caches["updated"]):
        cache.texts = [b"the first text", b"a text of its own " + str(cache.token_ids[-1]).encode()]
    warm_up()  # here, and not in each child
    template = tmp_path_factory.mktemp("crash") / "template"
    store = Store.open(template)
    for name in ("other", "pinned"):
        caches[name].build(store, name)
    caches["old"].build(store, "name")
    caches["new"].build(open_store(template.parent / "source"), "there")
    caches["loose"].build(store, "expired")
    store.set_ttl("expired", -5)
    caches["loose"].build(store, "gone")
    changed_from(caches["loose"], 9).put_chunks(store)
    store.remove("gone")
    store.pin("pinned")
    return Scene(template, caches)


def meaning(store, caches):
    """Which of `caches` the name means, all of it read; None when there is no such name."""
    try:
        found = read_whole(store, "name", caches.values())
    except EntryNotFound:
        assert "name" not in store.names()
        return None
    return next(name for name, cache in caches.items() if cache is found)


def survive(scene, operation, killed_child):
    """Kill one run of `operation` by `killed_child(root)`, and check all that must hold."""
    root = scene.new()
    ended = killed_child(root)
    assert ended in (0, -signal.SIGKILL)
    scene.killed += ended != 0
    store = open_store(root)
    allowed, final = OPERATIONS[operation]
    for name in store.names():
        store.verify(name).raise_first()
    found = meaning(store, scene.caches)
    assert found in allowed
    scene.outcomes.add((operation.__name__, found))
    read_whole(store, "other", [scene.caches["other"]])
    read_whole(store, "pinned", [scene.caches["pinned"]])
    assert not store.gc(dry_run=True).build_running
    operation(store, scene.caches)
    assert meaning(store, scene.caches) == final
    store.gc(grace_s=0)
    check_collected(store)
    assert "expired" not in store.names()
    shutil.rmtree(root)


def killed_at_backend_call(scene, operation, last):
    def killed(root):
        return outcome(
            in_child(lambda: operation(Store(CountedBackend(root, Countdown(last)), workers=1), scene.caches))
        )

    return killed


def killed_at_file_event(scene, operation, last):
    def work(root):
        store = open_store(root)
        count_file_events(Countdown(last))
        operation(store, scene.caches)

    return lambda root: outcome(in_child(lambda: work(root)))


def killed_after(scene, operation, seconds):
    def killed(root):
        child = in_child(lambda: operation(open_store(root), scene.caches))
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return outcome(child)

    return killed


def backend_calls(scene, operation):
    countdown, root = Countdown(), scene.new()

    def work():
        operation(Store(CountedBackend(root, countdown), workers=1), scene.caches)
        return countdown.count

    return value_of_child(work)


def file_events(scene, operation):
    countdown, root = Countdown(), scene.new()

    def work():
        store = open_store(root)
        count_file_events(countdown)
        operation(store, scene.caches)
        return countdown.count

    return value_of_child(work)


def duration_s(scene, operation):
    root, started = scene.new(), time.perf_counter()
    assert outcome(in_child(lambda: operation(open_store(root), scene.caches))) == 0
    return time.perf_counter() - started


def spread(total, count):
    """`count` points from 1 to `total`, or all, evenly."""
    return sorted({1 + int((index + 0.5) * total / count) for index in range(count)})


def torture(scene, operation, num_calls, num_events, num_delays):
    """Returns the number of points that were tried."""
    calls = spread(backend_calls(scene, operation), num_calls)
    events = spread(file_events(scene, operation), num_events)
    for last in calls:
        survive(scene, operation, killed_at_backend_call(scene, operation, last))
    for last in events:
        survive(scene, operation, killed_at_file_event(scene, operation, last))
    assert scene.killed >= len(calls) + len(events)
    whole = duration_s(scene, operation)
    delays = [random.Random(index).uniform(0, whole) for index in range(num_delays)]
    for seconds in delays:
        survive(scene, operation, killed_after(scene, operation, seconds))
    return len(calls) + len(events) + len(delays)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_killed_operation_leaves_the_store_whole(scene, operation):
    scene.killed = 0
    assert torture(scene, operation, num_calls=2, num_events=2, num_delays=1) == 5
    assert any(name == operation.__name__ for name, _ in scene.outcomes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_operations_killed_at_hundreds_of_points_leave_the_store_whole(scene):
    points = {}
    for operation in OPERATIONS:
        scene.killed = 0
        points[operation.__name__] = torture(scene, operation, num_calls=30, num_events=30, num_delays=20)
    assert sum(points.values()) >= 200, points
    seen = {name: {found for operation, found in scene.outcomes if operation == name} for name in points}
    assert seen["build"] == {"old", "new"}
    assert seen["import_"] == {"old", "new"}
    assert seen["update"] == {"old", "updated"}
    assert seen["evict"] == {"old", None}


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

    assert outcome(in_child(work)) == -signal.SIGKILL
    store = Store.open(tmp_path / "store")
    assert not store.gc().build_running
    assert [store.has_chunk(entry.key) for entry in entries] == [True, True, True, False, False]
    assert [store.chunk_entry(entry.key) for entry in entries[:3]] == entries[:3]
    assert cache.put_chunks(store) == entries
