"""`ResidentCaches`: what is shared, what is closed, and when."""

import threading
import weakref
from functools import partial

import pytest
import torch

from cag.errors import InsufficientResources, QueueFull, UsageError
from cag.residency import buffers
from cag.server.caches import ResidentCaches
from cag.server.tenants import OPERATOR, CacheKey, Tenants
from cag_store import CacheReader
from cag_store.errors import CorruptEntry

own = partial(CacheKey, OPERATOR)


@pytest.fixture
def within(engine):
    """`within(max_bytes)`: open caches of the engine within a limit."""
    made = []

    def make(max_bytes=None):
        made.append(ResidentCaches(Tenants(engine, frozenset(), None).find, max_bytes))
        return made[-1]

    yield make
    for caches in made:
        caches.close()


@pytest.fixture
def caches(within):
    return within()


@pytest.fixture
def sizes(within):
    """Bytes of each cache."""
    caches = within()
    found = {name: bytes_of(caches, name) for name in ("handbook", "manual")}
    caches.close()
    return found


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


class MadeOfMore(Exception):
    """An error that cannot be made anew from what it says of itself."""

    def __init__(self, what, when):
        super().__init__(f"{what} {when}")


def fail_once(monkeypatch, error):
    """The next load ends with `error`."""
    load, errors = CacheReader.load, [error]

    def failing(*arguments, **how):
        if errors:
            raise errors.pop()
        load(*arguments, **how)

    monkeypatch.setattr(CacheReader, "load", failing)


@pytest.mark.parametrize(
    ("error", "said_as"),
    [
        (MemoryError("a moment"), InsufficientResources),
        (torch.OutOfMemoryError("a moment"), InsufficientResources),
        (RuntimeError("a moment"), RuntimeError),
        (MadeOfMore("a", "moment"), RuntimeError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_cache_that_could_not_be_loaded_is_loaded_anew(caches, engine, monkeypatch, error, said_as):
    """By the next request, and beside it by others; each gets an error of its own, with its own frames."""
    fail_once(monkeypatch, error)
    with caches.use(own("handbook")) as failed:
        said = []
        for _ in range(2):
            with pytest.raises(said_as, match="a moment") as caught:
                failed.prefix.ask("Who?", max_tokens=2)
            said.append(caught.value)
        assert said[0] is not said[1]
        assert not caches.is_resident(own("handbook"), failed.prefix.digest)
        with engine.open("handbook") as beside:
            beside.ask("Who?", max_tokens=2)
        with caches.use(own("handbook")) as again:
            again.prefix.ask("Who?", max_tokens=2)
    assert is_closed(failed.prefix)
    assert not is_closed(again.prefix)
    assert caches.num_resident == 1


def test_a_load_that_has_failed_keeps_no_memory(engine, monkeypatch):
    """Not even until the next collection of garbage: memory may be what it lacked."""
    fail_once(monkeypatch, MemoryError("a moment"))
    with engine.open("handbook") as prefix:
        prefix.resident.wait_quietly()
        for thread in threading.enumerate():
            if thread.name == "cag-load":
                thread.join(60)
        memory = weakref.ref(prefix.resident.places(0)[0].keys)
    del prefix
    assert memory() is None


@pytest.mark.parametrize("limited", [False, True])
def test_threads_that_open_the_same_cache_share_it(within, sizes, engine, monkeypatch, limited):
    caches = within(sizes["handbook"] if limited else None)
    together, open_cache, opened, used = threading.Barrier(4), engine.open, [], []

    def meet(name, **how):
        together.wait(60)
        opened.append(open_cache(name, **how))
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


def test_within_a_limit_unused_caches_make_room(within, sizes, monkeypatch):
    caches, taken, allocate = within(max(sizes.values())), [], buffers._allocate
    monkeypatch.setattr(buffers, "_allocate", lambda *what: taken.append(caches.num_bytes) or allocate(*what))
    for name in ("handbook", "manual", "handbook"):
        assert bytes_of(caches, name) == sizes[name]
        assert caches.num_resident == 1
        assert caches.num_bytes <= max(sizes.values())
    assert caches.num_evicted == 2
    with caches.use(own("handbook")), pytest.raises(QueueFull, match="in use"), caches.use(own("manual")):
        pass
    assert taken == [0, 0, 0]  # others had gone before, and for who was refused there was nothing to do
    assert bytes_of(caches, "manual") == sizes["manual"]  # given back, so there is room


def test_where_the_machine_has_less_unused_caches_make_room(caches, sizes, monkeypatch):
    allocate = buffers._allocate

    def allocate_one(*what):
        if caches.num_bytes:
            raise InsufficientResources("not enough memory.")
        return allocate(*what)

    monkeypatch.setattr(buffers, "_allocate", allocate_one)
    for name in ("handbook", "manual"):
        assert bytes_of(caches, name) == sizes[name]
        assert caches.num_resident == 1
    with caches.use(own("manual")), pytest.raises(InsufficientResources), caches.use(own("handbook")):
        pass
    assert (caches.num_evicted, caches.num_resident) == (1, 1)


def test_memory_that_two_names_share_counts_once(within, sizes, copy_of):
    copy_of("handbook", "twin")
    caches = within(max(sizes.values()))
    with caches.use(own("handbook")) as use:
        with caches.use(own("twin")) as twin:
            assert twin.prefix.resident is use.prefix.resident
            assert caches.num_bytes == sizes["handbook"]
        with pytest.raises(QueueFull, match="in use"), caches.use(own("manual")):
            pass
    assert (caches.num_evicted, caches.num_resident) == (0, 2)  # the twin frees nothing while its memory is used
    bytes_of(caches, "manual")
    assert (caches.num_evicted, caches.num_bytes) == (2, sizes["manual"])


def test_the_version_of_a_session_that_is_there_takes_no_more(within, sizes, engine, copy_of):
    copy_of("handbook", "versions")
    caches, before = within(sum(sizes.values())), engine.find("versions")[1]
    with caches.use(own("versions")) as use:
        copy_of("manual", "versions")
        with caches.use(own("versions")), caches.use(own("versions"), before) as session:
            assert session.prefix.resident is use.prefix.resident


def test_a_cache_larger_than_the_limit_is_refused_and_harms_nobody(within, sizes):
    caches = within(min(sizes.values()))
    small, large = sorted(sizes, key=sizes.__getitem__)
    bytes_of(caches, small)
    with pytest.raises(InsufficientResources, match="max-resident-bytes"), caches.use(own(large)):
        pass
    assert (caches.num_resident, caches.num_bytes) == (1, sizes[small])


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
