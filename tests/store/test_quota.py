"""Limits: the least worthy caches go, what others hold stays, and what nobody may touch is never touched."""

import os
import random
import time
from dataclasses import replace

import pytest

from cag_store import Store
from cag_store.backends import ObjectInfo
from cag_store.backends.object import ObjectBackend
from cag_store.paths import ref_path
from cag_store.quota import Tenant, plan_evictions, rebuild_seconds

HOUR = 3600.0


class AgedObjects(ObjectBackend):
    """Objects in memory, whose times can be set."""

    def __init__(self):
        super().__init__("memory://")
        self.times, listed, written = {}, self._client.list, self._client.write

        def aged(prefix):
            for path, facts in listed(prefix):
                yield path, replace(facts, modified_s=self.times.get(path, facts.modified_s))

        def write(path, *arguments):
            self.times.pop(path, None)
            return written(path, *arguments)

        self._client.list, self._client.write = aged, write

    def age(self, path, then):
        self._uses.clear()
        self.times |= {path: then, f"touched/{path}": then}


@pytest.fixture(params=["local", "memory", "object store"])
def store(request, tmp_path):
    if request.param == "object store":
        return Store(AgedObjects())
    return Store.open(tmp_path / "store") if request.param == "local" else Store.in_memory()


def age(store, name, seconds):
    """Let the last use of a cache be `seconds` ago."""
    then, path = time.time() - seconds, ref_path(name)
    if isinstance(store.backend, AgedObjects):
        store.backend.age(path, then)
    elif store.backend.url == "memory:":
        store.backend._objects[path] = (store.backend._objects[path][0], then)
    else:
        os.utime(store.backend.root / path, (then, then))


def built(store, small, name, seed, **build):
    cache = small(seed=seed)
    cache.texts = [f"text {seed} of {name}".encode(), b"another"]
    return cache.build(store, name, build={"computed_tokens": 20, "prefill_s": 10.0, "encode_s": 0.0, **build})


def total(store):
    return store.usage().total_bytes


def test_nothing_goes_below_the_limit(store, small):
    built(store, small, "a", 1)
    report = store.gc(max_bytes=total(store))
    assert (report.evicted, report.over_bytes, report.kept_bytes) == ((), 0, total(store))


def test_the_longest_unused_goes_first(store, small):
    for seed, name in enumerate("abc"):
        built(store, small, name, seed)
    for name, hours in {"a": 2, "b": 50, "c": 9}.items():
        age(store, name, hours * HOUR)
    report = store.gc(max_bytes=total(store) - 1)
    assert [eviction.name for eviction in report.evicted] == ["b"]
    assert report.kept_bytes == total(store) == store.gc(max_bytes=total(store)).kept_bytes
    assert store.names() == ["a", "c"]
    assert all(store.verify(name).ok for name in "ac")
    assert not report.kept_unreferenced


def test_what_is_dear_to_rebuild_stays(store, small):
    built(store, small, "cheap", 1, prefill_s=1.0)
    built(store, small, "dear", 2, prefill_s=1000.0)
    age(store, "cheap", 2 * HOUR)
    age(store, "dear", 100 * HOUR)
    (eviction,) = store.gc(max_bytes=total(store) - 1).evicted
    assert (eviction.name, eviction.rebuild_s) == ("cheap", 1.0)
    assert eviction.worth == pytest.approx(1.0 / eviction.total_bytes / eviction.idle_s)


def test_using_a_cache_saves_it(store, small):
    manifests = [built(store, small, name, seed) for seed, name in enumerate("ab")]
    for name, hours in {"a": 50, "b": 40}.items():
        age(store, name, hours * HOUR)
    before = store.usage().caches["a"].last_used_s
    store.open_reader("a")[2].close()
    assert store.usage().caches["a"].last_used_s > before + HOUR
    assert [eviction.name for eviction in store.gc(max_bytes=total(store) - 1).evicted] == ["b"]
    assert store.resolve("a")[1] == manifests[0]


def test_closing_a_reader_is_a_use(store, small):
    built(store, small, "a", 1)
    reader = store.open_reader("a")[2]
    age(store, "a", HOUR)
    reader.close()
    assert time.time() - store.usage().caches["a"].last_used_s < HOUR / 2


def test_pinned_read_and_kept_caches_stay(store, small):
    for seed, name in enumerate(("pinned", "read", "kept", "other")):
        built(store, small, name, seed)
        age(store, name, (9 - seed) * HOUR)
    store.pin("pinned")
    age(store, "pinned", 99 * HOUR)
    with store.open_reader("read")[2]:
        report = store.gc(max_bytes=0, keep=["kept"])
    assert [eviction.name for eviction in report.evicted] == ["other"]
    assert report.over_bytes == report.kept_bytes == total(store) > 0
    assert store.names() == ["kept", "pinned", "read"]
    assert all(store.verify(name).ok for name in store.names())


def test_what_a_kept_cache_shares_is_not_freed_and_not_evicted_in_vain(store, small):
    manifest = built(store, small, "old", 1)
    store.commit("pinned", manifest)
    store.pin("pinned")
    age(store, "old", 99 * HOUR)
    built(store, small, "young", 2)
    usage = store.usage().caches
    assert usage["old"].own_bytes == 0
    assert usage["young"].own_bytes > usage["young"].shared_bytes > 0  # one text is common
    report = store.gc(max_bytes=total(store) - 1)
    assert [eviction.name for eviction in report.evicted] == ["young"]
    assert report.evicted[0].freed_bytes == usage["young"].own_bytes
    assert store.verify("old").ok


def test_two_names_of_one_cache_go_together(store, small):
    store.commit("b", built(store, small, "a", 1))
    report = store.gc(max_bytes=0)
    assert sorted(eviction.name for eviction in report.evicted) == ["a", "b"]
    assert sorted(eviction.freed_bytes > 0 for eviction in report.evicted) == [False, True]
    assert total(store) == 0


def test_what_nothing_holds_goes_before_any_cache(store, small):
    built(store, small, "a", 1)
    alone = total(store)
    small(seed=2).put_chunks(store)
    assert store.gc().removed == ()
    report = store.gc(max_bytes=alone)
    assert (report.evicted, report.kept_bytes) == ((), alone)
    assert store.verify("a").ok


def test_nothing_is_evicted_while_a_build_runs(store, small):
    built(store, small, "a", 1)
    with store.build_lease():
        report = store.gc(max_bytes=0)
    assert (report.evicted, report.removed, report.build_running) == ((), (), True)
    assert report.over_bytes == total(store)


def test_a_dry_run_says_the_same_and_changes_nothing(store, small):
    for seed, name in enumerate("abc"):
        built(store, small, name, seed)
        age(store, name, (9 - seed) * HOUR)
    store.set_ttl("c", -1)
    limit = total(store) // 3
    planned = store.gc(max_bytes=limit, dry_run=True)
    assert store.names() == ["a", "b", "c"]
    done = store.gc(max_bytes=limit)
    assert done.expired == ("c",)
    assert [item.name for item in planned.evicted] == [item.name for item in done.evicted]
    assert (planned.removed, planned.kept_bytes) == (done.removed, done.kept_bytes)


def test_a_store_that_may_not_be_written_is_read_without_a_record(tmp_path, small, monkeypatch):
    from cag_store.errors import StoreFull

    store = Store.open(tmp_path / "store")
    built(store, small, "a", 1)

    def refuse(path):
        raise StoreFull("read-only")

    monkeypatch.setattr(store.backend, "record_use", refuse)
    store.open_reader("a")[2].close()


def test_usage_counts_what_is_shared_once(store, small):
    first = small(num_tokens=24)
    one = first.build(store, "one")
    second = small(num_tokens=24)
    second.token_ids[10] += 1
    two = second.build(store, "two")
    usage = store.usage()
    shared = one.chunks[0].stored_bytes + one.blob_bytes
    assert [usage.caches[name].shared_bytes for name in ("one", "two")] == [shared, shared]
    manifests = len(one.to_bytes()) + len(two.to_bytes())
    assert usage.held_bytes == usage.total_bytes == one.stored_bytes + two.stored_bytes - shared + manifests
    store.backend.replace(ref_path("two"), b"damaged")
    assert set(store.usage().caches) == {"one"}
    assert store.usage().held_bytes == len(one.to_bytes()) + one.stored_bytes


@pytest.mark.parametrize(
    "build",
    [
        {},
        {"computed_tokens": 0, "prefill_s": 0.0},
        {"computed_tokens": "5"},
        {"computed_tokens": 5, "prefill_s": None},
        {"computed_tokens": 5, "prefill_s": 10**400},
        {"computed_tokens": 10**400, "prefill_s": 1.0},
        {"computed_tokens": 1, "prefill_s": 1e308, "encode_s": 1e308},
        {"computed_tokens": 1, "prefill_s": -1.0},
    ],
)
def test_rebuilding_is_estimated_where_no_clock_ran(small, build):
    store = Store.in_memory()
    known = small(seed=1).put(store, build={"computed_tokens": 10, "prefill_s": 3.0, "encode_s": 2.0})
    unknown = small(seed=2).put(store, build=build)
    assert rebuild_seconds([known, unknown]) == {known.digest: 10.0, unknown.digest: 10.0}
    assert rebuild_seconds([unknown]) == {unknown.digest: 20.0}


def test_plans_free_enough_and_nothing_in_vain():
    """Against the definition, over random stores: enough is freed if it can be, and no eviction could be spared."""
    chance = random.Random(5)
    for _ in range(300):
        infos = {str(i): ObjectInfo(str(i), chance.randrange(1, 50), 0.0) for i in range(12)}
        tenants = [
            Tenant(str(n), frozenset(chance.sample(sorted(infos), chance.randrange(1, 6))), 100, chance.random(), 1.0)
            for n in range(chance.randrange(1, 7))
        ]
        tenants = [replace(tenant, idle_s=chance.choice([1.0, 5.0, 60.0])) for tenant in tenants]
        fixed = frozenset(chance.sample(sorted(infos), chance.randrange(0, 4)))
        excess = chance.randrange(1, 250)
        plan = plan_evictions(tenants, infos, fixed, excess)
        gone = {eviction.name for eviction in plan}

        def freed(names, tenants=tenants, fixed=fixed, infos=infos):
            kept = fixed.union(*(tenant.paths for tenant in tenants if tenant.name not in names))
            return sum(infos[path].size_bytes for path in set().union(*(t.paths for t in tenants)) - kept)

        possible = freed({tenant.name for tenant in tenants})
        assert freed(gone) >= min(excess, possible)
        assert freed(gone) == sum(eviction.freed_bytes for eviction in plan)
        for name in gone:
            assert freed(gone - {name}) < min(excess, possible)
        assert [e.worth for e in plan] == sorted(e.worth for e in plan)


def test_a_use_is_recorded_beside_the_ref_once_a_minute():
    backend = AgedObjects()
    backend.replace("refs/a.json", b"{}")
    backend.age("refs/a.json", 5.0)
    backend.record_use("refs/a.json")
    (first,) = [info.modified_s for info in backend.list("refs")]
    assert abs(first - backend.now_s()) < HOUR
    backend.times["touched/refs/a.json"] = 7.0
    backend.record_use("refs/a.json")
    assert [info.modified_s for info in backend.list("refs")] == [7.0]
    assert backend.get("refs/a.json", 10) == b"{}"
    assert backend.delete("refs/a.json")
    assert list(backend.list("touched")) == []


def test_what_expires_and_is_unused_is_told_by_the_clock_of_the_store(small, monkeypatch):
    store = Store(AgedObjects())
    built(store, small, "a", 1)
    built(store, small, "b", 2)
    store.set_ttl("a", 600)
    later = store.backend.now_s() + HOUR
    monkeypatch.setattr(store.backend, "now_s", lambda: later)
    report = store.gc(max_bytes=0, dry_run=True)
    assert report.expired == ("a",)
    assert [eviction.name for eviction in report.evicted] == ["b"]
    assert report.evicted[0].idle_s == pytest.approx(HOUR, abs=60)
