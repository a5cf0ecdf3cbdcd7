"""The pool of pages: who owns what, what it costs, and that nothing is lost when it grows."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cag.errors import InsufficientResources
from cag.forward.pages import PAGE_TOKENS, SLAB_PAGES, PagedTail, PagePool
from cag.forward.state import KvShape, Tail
from cag.generation.generate import SamplingOptions

SHAPES = [KvShape(2, 4), KvShape(1, 8)]


def make_pool():
    return PagePool(SHAPES, torch.bfloat16, torch.device("cpu"))


def test_pages_are_taken_given_back_and_taken_again():
    pool = make_pool()
    tails = [PagedTail(pool) for _ in range(3)]
    for tail, tokens in zip(tails, (1, PAGE_TOKENS, PAGE_TOKENS + 1), strict=True):
        tail.reserve(tokens, used=0)
    assert [len(tail.pages) for tail in tails] == [1, 1, 2]
    pool.check_integrity([tail.pages for tail in tails])
    pages = set(tails[2].pages)
    tails[2].close()
    tails[2].close()
    again = PagedTail(pool)
    again.reserve(2 * PAGE_TOKENS, used=0)
    assert set(again.pages) == pages
    pool.check_integrity([tail.pages for tail in (*tails, again)])
    assert pool.num_pages == SLAB_PAGES


def test_a_tail_that_nobody_holds_gives_its_pages_back():
    pool = make_pool()
    tail = PagedTail(pool)
    tail.reserve(5 * PAGE_TOKENS, used=0)
    assert pool.num_free == SLAB_PAGES - 5
    del tail
    gc.collect()
    assert pool.num_free == SLAB_PAGES
    pool.check_integrity([])


def test_what_owns_a_page_twice_is_found():
    pool = make_pool()
    tail = PagedTail(pool)
    tail.reserve(1, used=0)
    with pytest.raises(AssertionError):
        pool.check_integrity([tail.pages, tail.pages])
    with pytest.raises(AssertionError):
        pool.check_integrity([])


def test_memory_goes_back_when_nobody_has_a_page():
    pool = make_pool()
    tail = PagedTail(pool)
    tail.reserve(5 * SLAB_PAGES * PAGE_TOKENS, used=0)
    large = pool.num_bytes
    pool.settle()
    assert pool.num_bytes == large == 5 * SLAB_PAGES * pool.page_bytes
    tail.close()
    pool.settle()
    assert pool.num_bytes == SLAB_PAGES * pool.page_bytes
    pool.check_integrity([])


@pytest.mark.parametrize("refused", range(4))
def test_memory_that_is_not_there_to_grow_costs_nobody_else_anything(refused, monkeypatch):
    """The device refuses one of the pieces, and no longer than a test; fresh memory holds old numbers."""
    pool, calls = make_pool(), itertools.count()
    tail = PagedTail(pool)
    tail.reserve(40, used=0)
    for layer, shape in enumerate(SHAPES):
        tail.store(layer, 0, *torch.full((2, shape.num_kv_heads, 40, shape.head_dim), layer + 1.0))
    new_empty = torch.Tensor.new_empty

    def fresh(self, *size):
        if next(calls) == refused:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB")
        return new_empty(self, *size).fill_(99.0)

    monkeypatch.setattr(torch.Tensor, "new_empty", fresh)
    other, version = PagedTail(pool), pool.version
    with pytest.raises(InsufficientResources, match="2 GiB"):
        other.reserve(900, used=0)
    assert (pool.version, pool.num_pages) != (version, SLAB_PAGES)  # what was recorded has moved
    for _ in range(2):
        pool.check_integrity([tail.pages, other.pages])
        assert len({len(side) for side in (*pool.keys, *pool.values)}) == 1
        for layer in range(len(SHAPES)):
            assert all((side == layer + 1.0).all() for side in tail.gathered(layer, 40))
        other.reserve(900, used=0)


def test_where_nothing_can_be_copied_either_all_stay_where_they_are(monkeypatch):
    pool, calls = make_pool(), itertools.count()
    tail = PagedTail(pool)
    tail.reserve(40, used=0)
    new_empty = torch.Tensor.new_empty

    def full(self, *size):
        if next(calls) > 1:
            raise torch.OutOfMemoryError("full")
        return new_empty(self, *size)

    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    with pytest.raises(InsufficientResources):
        tail.reserve(900, used=40)
    pool.check_integrity([tail.pages])
    assert {len(side) for side in (*pool.keys, *pool.values)} == {SLAB_PAGES}
    monkeypatch.undo()
    tail.reserve(900, used=40)
    tail.close()
    monkeypatch.setattr(torch.Tensor, "new_empty", full)
    pool.settle()
    pool.check_integrity([])


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 90)), min_size=1, max_size=30), st.integers(0, 99))
def test_paged_tails_hold_what_plain_ones_hold(steps, seed):
    """Tokens that come in any order of sessions, against a tail in one piece for each."""
    torch.manual_seed(seed)
    pool = make_pool()
    paged = [PagedTail(pool) for _ in range(4)]
    plain = [Tail(SHAPES, torch.bfloat16, torch.device("cpu"), 0) for _ in range(4)]
    used = [0] * 4
    for session, count in steps:
        for layer, shape in enumerate(SHAPES):
            new = torch.randn(2, shape.num_kv_heads, count, shape.head_dim)
            for tail in (paged[session], plain[session]):
                tail.reserve(used[session] + count, used=used[session])
                tail.store(layer, used[session], *new)
        used[session] += count
    pool.check_integrity([tail.pages for tail in paged])
    for mine, expected, count in zip(paged, plain, used, strict=True):
        for layer in range(len(SHAPES)):
            for found, side in zip(mine.gathered(layer, count), expected.gathered(layer, count), strict=True):
                assert torch.equal(found, side)


def test_a_hundred_idle_sessions_cost_their_own_tails_only(tiny_engine, corpus_dir):
    tiny_engine.build([corpus_dir], name="handbook")
    pool = tiny_engine.model.pages
    with tiny_engine.open("handbook") as prefix:
        before = prefix.resident.num_bytes
        sessions = [prefix.session() for _ in range(100)]
        for index, session in enumerate(sessions):
            session.ask("Who? " * (index % 7 + 1), SamplingOptions(max_tokens=3))
        tokens = [session.num_cached_tokens - prefix.resident.num_tokens for session in sessions]
        pages = sum(-(-count // PAGE_TOKENS) for count in tokens)
        tails = [session._state.tail for session in sessions]
        pool.check_integrity([tail.pages for tail in tails])
        assert sum(tail.num_bytes for tail in tails) == pages * pool.page_bytes
        assert pool.num_bytes <= 1.5 * pages * pool.page_bytes + 2 * SLAB_PAGES * pool.page_bytes  # room to grow
        assert prefix.resident.num_bytes == before
        del tails, session, sessions
        gc.collect()
        tiny_engine.model.settle_pages()
        assert pool.num_bytes == SLAB_PAGES * pool.page_bytes


def test_an_answer_by_itself_leaves_no_page_taken(tiny_engine, corpus_dir):
    tiny_engine.build([corpus_dir], name="handbook")
    with tiny_engine.open("handbook") as prefix:
        prefix.ask("Who?", max_tokens=3)
        gc.collect()
        tiny_engine.model.pages.check_integrity([])
