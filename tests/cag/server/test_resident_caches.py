"""`ResidentCaches`: what is shared, what is closed, and when."""

import threading
from functools import partial

import pytest

from cag.errors import InsufficientResources, QueueFull, UsageError
from cag.server.caches import ResidentCaches
from cag.server.tenants import OPERATOR, CacheKey, Tenants
from cag_store.errors import CorruptEntry

own = partial(CacheKey, OPERATOR)


@pytest.fixture
def caches(engine):
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find)
    yield caches
    caches.close()


def is_closed(prefix):
    try:
        prefix.check_open()
    except UsageError:
        return True
    return False


def test_the_second_request_finds_the_cache_open(caches):
    with caches.use(own("handbook")) as first:
        pass
    with caches.use(own("handbook")) as second:
        assert (first.opened_at is not None, second.opened_at) == (True, None)
        assert first.prefix is second.prefix
    assert not is_closed(second.prefix)
    caches.close()
    assert is_closed(second.prefix)


def test_an_old_version_is_closed_with_its_last_request(caches, copy_of):
    copy_of("handbook", "versions")
    with caches.use(own("versions")) as first, caches.use(own("versions")) as also_first:
        copy_of("manual", "versions")
        with caches.use(own("versions")) as second:
            assert second.prefix is not first.prefix
            assert not is_closed(first.prefix)
    assert is_closed(also_first.prefix)
    assert not is_closed(second.prefix)
    assert caches.num_resident == 1


def test_a_dropped_cache_stays_open_for_who_uses_it(caches):
    with caches.use(own("handbook")) as use:
        caches.drop(own("handbook"))
        assert (caches.num_resident, is_closed(use.prefix)) == (0, False)
    assert is_closed(use.prefix)
    caches.drop(own("handbook"))


def test_a_cache_that_fails_is_opened_again(caches):
    with pytest.raises(CorruptEntry), caches.use(own("handbook")) as failed:
        raise CorruptEntry("a segment is damaged")
    assert is_closed(failed.prefix)
    with caches.use(own("handbook")) as use:
        assert use.prefix is not failed.prefix


def test_threads_that_open_the_same_cache_share_it(caches, engine, monkeypatch):
    together, open_cache, opened, used = threading.Barrier(4), engine.open, [], []

    def meet(name):
        together.wait(60)
        opened.append(open_cache(name))
        return opened[-1]

    def request():
        with caches.use(own("handbook")) as use:
            used.append(use.prefix)

    monkeypatch.setattr(engine, "open", meet)
    threads = [threading.Thread(target=request) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(opened) == 4
    assert len(set(map(id, used))) == 1
    assert sum(is_closed(prefix) for prefix in opened) == 3
    assert not is_closed(used[0])


def bytes_of(caches, name):
    with caches.use(own(name)) as use:
        use.prefix.resident.wait()
        return use.prefix.resident.num_bytes


def test_within_a_limit_unused_caches_make_room(engine, copy_of):
    sizes = {}
    free = ResidentCaches(Tenants(engine, frozenset(), None).find)
    for name in ("handbook", "manual"):
        sizes[name] = bytes_of(free, name)
    free.close()
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find, max_bytes=max(sizes.values()))
    for name in ("handbook", "manual", "handbook"):
        assert bytes_of(caches, name) == sizes[name]
        assert caches.num_resident == 1
        assert caches.num_bytes <= max(sizes.values())
    assert caches.num_evicted == 2
    with caches.use(own("handbook")), pytest.raises(QueueFull, match="in use"), caches.use(own("manual")):
        pass
    assert bytes_of(caches, "manual") == sizes["manual"]  # given back, so there is room
    caches.close()


def test_a_cache_larger_than_the_limit_is_refused_and_harms_nobody(engine):
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find, max_bytes=10)
    with pytest.raises(InsufficientResources, match="max-resident-bytes"), caches.use(own("handbook")):
        pass
    assert (caches.num_resident, caches.num_bytes) == (0, 0)


def test_the_cheapest_to_load_again_goes_first_and_old_ones_do_not_stay_for_ever(engine, copy_of):
    """What is dear to load outlives several cheap ones that were used later, and goes in the end."""
    names = ["handbook", "manual"]
    free = ResidentCaches(Tenants(engine, frozenset(), None).find)
    sizes = [bytes_of(free, name) for name in names]
    free.close()
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find, max_bytes=sum(sizes))
    for name, seconds in zip(names, (5.0, 0.5), strict=True):
        with caches.use(own(name)) as use:
            use.prefix.resident.wait()
            use.prefix.resident.load_s = seconds
    third = engine.find("manual")[1]
    engine.build([engine.store.backend.root.parent / "handbook.txt"], name="third", system_text="Other words.")
    try:
        assert engine.find("third")[1].digest != third.digest
        caches._max_bytes = sum(sizes) + sizes[0]
        bytes_of(caches, "third")
        caches._max_bytes = caches.num_bytes
        engine.build([engine.store.backend.root.parent / "manual.txt"], name="fourth", system_text="Yet other words.")
        bytes_of(caches, "fourth")
        held = set(caches._held)
        assert own("handbook") in held
        assert own("fourth") in held
        assert own("manual") not in held or own("third") not in held
    finally:
        caches.close()
        for name in ("third", "fourth"):
            engine.store.remove(name)


def test_a_version_that_is_being_used_up_still_counts(engine, copy_of):
    copy_of("handbook", "counted")
    caches = ResidentCaches(Tenants(engine, frozenset(), None).find)
    with caches.use(own("counted")) as use:
        use.prefix.resident.wait()
        before = caches.num_bytes
        caches.drop(own("counted"))
        assert (caches.num_resident, caches.num_bytes) == (0, before)
    assert caches.num_bytes == 0
    caches.close()
