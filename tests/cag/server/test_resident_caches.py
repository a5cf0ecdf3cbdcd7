"""`ResidentCaches`: what is shared, what is closed, and when."""

import threading

import pytest

from cag.errors import UsageError
from cag.server.caches import ResidentCaches
from cag_store.errors import CorruptEntry


@pytest.fixture
def caches(engine):
    caches = ResidentCaches(engine)
    yield caches
    caches.close()


def is_closed(prefix):
    try:
        prefix.check_open()
    except UsageError:
        return True
    return False


def test_the_second_request_finds_the_cache_open(caches):
    with caches.use("handbook") as first:
        pass
    with caches.use("handbook") as second:
        assert (first.opened_at is not None, second.opened_at) == (True, None)
        assert first.prefix is second.prefix
    assert not is_closed(second.prefix)
    caches.close()
    assert is_closed(second.prefix)


def test_an_old_version_is_closed_with_its_last_request(caches, copy_of):
    copy_of("handbook", "versions")
    with caches.use("versions") as first, caches.use("versions") as also_first:
        copy_of("manual", "versions")
        with caches.use("versions") as second:
            assert second.prefix is not first.prefix
            assert not is_closed(first.prefix)
    assert is_closed(also_first.prefix)
    assert not is_closed(second.prefix)
    assert caches.num_resident == 1


def test_a_dropped_cache_stays_open_for_who_uses_it(caches):
    with caches.use("handbook") as use:
        caches.drop("handbook")
        assert (caches.num_resident, is_closed(use.prefix)) == (0, False)
    assert is_closed(use.prefix)
    caches.drop("handbook")


def test_a_cache_that_fails_is_opened_again(caches):
    with pytest.raises(CorruptEntry), caches.use("handbook") as failed:
        raise CorruptEntry("a segment is damaged")
    assert is_closed(failed.prefix)
    with caches.use("handbook") as use:
        assert use.prefix is not failed.prefix


def test_threads_that_open_the_same_cache_share_it(caches, engine, monkeypatch):
    together, open_cache, opened, used = threading.Barrier(4), engine.open, [], []

    def meet(name):
        together.wait(60)
        opened.append(open_cache(name))
        return opened[-1]

    def request():
        with caches.use("handbook") as use:
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
