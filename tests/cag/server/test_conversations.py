"""Chat completions find what was read of their conversation for the last answer, and say so in their counts."""

import asyncio
import gc
import json

import pytest
from chats import QUESTIONS, URL, asked, conversation, counts, messages_of, said

from cag.errors import InsufficientResources
from cag.server.tenants import store_location

pytestmark = pytest.mark.anyio


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def num_used_pages(engine):
    gc.collect()
    return engine.model.pages.num_pages - engine.model.pages.num_free


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"stop": ["e"]}])
async def test_later_questions_find_earlier_turns_and_get_the_same_answers(serving, engine, sampling):
    async with serving(conversation_bytes=0) as served:
        expected, _ = await conversation(served.client, QUESTIONS, **sampling)
        assert len(served.service.left) == 0
    num_prefix = engine.find("handbook")[1].num_tokens
    assert {counts(completion)[0] for completion in expected} == {num_prefix}
    async with serving() as served:
        found, _ = await conversation(served.client, QUESTIONS, **sampling)
        assert "cag_left_conversations 1" in (await served.client.get("/metrics")).text.splitlines()
    assert [said(completion) for completion in found] == [said(completion) for completion in expected]
    cached = [counts(completion)[0] for completion in found]
    assert cached[0] == num_prefix
    for later, earlier in zip(found[1:], found, strict=False):
        assert counts(later)[0] > counts(earlier)[1] - 20  # what the template has behind the question aside
    assert num_used_pages(engine) == 0  # behind the server's end


async def test_a_stream_finds_them_too(serving):
    async with serving() as served:
        found, turns = await conversation(served.client, QUESTIONS[:2])
        again = {"model": "handbook", "messages": messages_of(turns, QUESTIONS[2]), "max_tokens": 9, "stream": True}
        response = await served.client.post(URL, json=again | {"stream_options": {"include_usage": True}})
        usage = json.loads(response.text.split("\n\n")[-3].removeprefix("data: "))["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > counts(found[1])[0]


async def test_a_first_question_is_read_whenever_it_is_asked(serving, engine):
    async with serving() as served:
        first, again = [await asked(served.client, [], QUESTIONS[0]) for _ in range(2)]
    assert counts(first) == counts(again)
    assert said(first) == said(again)


async def test_an_answer_is_asked_for_again_and_another_way_is_taken(serving, engine):
    """The last question once more, then another one in its place, then another answer in the history."""
    async with serving(conversation_bytes=0) as served:
        expected, turns = await conversation(served.client, QUESTIONS)
        other = await asked(served.client, turns[:1], "Where is the pump?")
        edited = await asked(served.client, [(QUESTIONS[0], "At eight."), turns[1]], QUESTIONS[2])
    async with serving() as served:
        found, same_turns = await conversation(served.client, QUESTIONS)
        assert same_turns == turns
        again = await asked(served.client, turns[:2], QUESTIONS[2])
        assert said(again) == said(found[2]) == said(expected[2])
        assert counts(again)[0] > counts(found[2])[0]  # the question, too
        assert said(await asked(served.client, turns[:1], "Where is the pump?")) == said(other)
        other_history = await asked(served.client, [(QUESTIONS[0], "At eight."), turns[1]], QUESTIONS[2])
    assert said(other_history) == said(edited)
    assert counts(other_history)[0] == engine.find("handbook")[1].num_tokens


async def test_two_questions_at_once_behind_the_same_turns(serving):
    async with serving(conversation_bytes=0) as served:
        _, turns = await conversation(served.client, QUESTIONS[:2])
        expected = [await asked(served.client, turns, question) for question in (QUESTIONS[2], "How much?")]
    async with serving() as served:
        await conversation(served.client, QUESTIONS[:2])
        both = await asyncio.gather(*(asked(served.client, turns, q) for q in (QUESTIONS[2], "How much?")))
        assert len(served.service.left) == 2
    assert [said(one) for one in both] == [said(one) for one in expected]
    assert len({counts(one)[0] for one in both}) == 2  # one of them found the turns, the other read them


async def test_who_hangs_up_leaves_the_turns_before(serving, engine, gate, raw, monkeypatch):
    gate.open()
    monkeypatch.setattr(engine.model, "stop_ids", frozenset())
    async with serving() as served:
        found, turns = await conversation(served.client, QUESTIONS[:2])
        body = {"model": "handbook", "messages": messages_of(turns, QUESTIONS[2]), "max_tokens": 500, "stream": True}
        cut = raw(served.app, URL, body)
        await cut.until(b"content")
        await cut.hang_up()
        while served.service.slots.running:
            await asyncio.sleep(0.01)
        again = await asked(served.client, turns, QUESTIONS[2])
        assert counts(again)[0] > counts(found[1])[1]
    async with serving(conversation_bytes=0) as served:
        assert said(await asked(served.client, turns, QUESTIONS[2])) == said(again)


async def test_nobody_finds_what_belongs_to_others(serving, engine, tmp_path):
    """Not even behind the same cache."""
    keys = {"acme": ("key-a", "key-a2"), "beta": ("key-b",)}
    for tenant in keys:
        engine.export_cache("handbook", store_location(str(tmp_path), tenant))
    num_prefix = engine.find("handbook")[1].num_tokens
    async with serving(api_keys=("key-o",), tenant_keys=keys, tenant_stores=str(tmp_path)) as served:
        cached = {}
        for key in ("key-a", "key-b", "key-o", "key-a2"):
            served.client.headers["Authorization"] = f"Bearer {key}"
            body = messages_of([(QUESTIONS[0], "At seven.")], QUESTIONS[1])
            response = await served.client.post(URL, json={"model": "handbook", "messages": body, "max_tokens": 4})
            cached[key] = counts(response.json())[0]
    assert cached["key-a"] == cached["key-b"] == cached["key-o"] == num_prefix < cached["key-a2"]


async def test_another_version_of_the_cache_finds_nothing(serving, engine, copy_of):
    copy_of("handbook", "changing")
    async with serving() as served:
        _, turns = await conversation(served.client, QUESTIONS[:2], model="changing")
        copy_of("manual", "changing")
        behind = await asked(served.client, turns, QUESTIONS[2], model="changing")
    assert counts(behind)[0] == engine.find("manual")[1].num_tokens


async def test_those_left_first_go_for_room(serving, engine):
    questions = ["Why?", "How?", "Who?"]
    async with serving() as served:
        await conversation(served.client, questions[:1])
        size = engine.model.pages.page_bytes * num_used_pages(engine)
    async with serving(conversation_bytes=2 * size) as served:
        turns = [(await conversation(served.client, [question]))[1] for question in questions]
        assert len(served.service.left) == 2
        found = [counts(await asked(served.client, turn, "And?"))[0] for turn in reversed(turns)]
    assert found[0] > found[2] == engine.find("handbook")[1].num_tokens


async def test_nobody_comes_back_in_time(serving, engine):
    clock = Clock()
    async with serving(session_ttl_s=60) as served:
        left = served.service.left
        left.clock = clock
        await conversation(served.client, QUESTIONS[:1])
        clock.now += 59
        assert not left.any_over
        clock.now += 1
        while len(left):  # the service looks once a second
            await asyncio.sleep(0.05)
        assert num_used_pages(engine) == 0


async def test_who_needs_pages_gets_those_of_conversations(serving, engine, monkeypatch):
    """Where there is no memory for more pages."""
    async with serving() as served:
        _, turns = await conversation(served.client, QUESTIONS[:2])
        pages = engine.model.pages
        assert num_used_pages(engine) > 0

        def no_memory(count):
            raise InsufficientResources(f"no memory for {count} more pages")

        monkeypatch.setattr(pages, "_grow", no_memory)
        held = [pages.take(pages.num_free)]
        assert len(served.service.left) == 1
        held.append(pages.take(1))
        assert len(served.service.left) == 0
        with pytest.raises(InsufficientResources):
            pages.take(pages.num_pages)
        for taken in held:
            pages.give_back(taken)
        assert counts(await asked(served.client, turns, QUESTIONS[2]))[0] == engine.find("handbook")[1].num_tokens
