"""Many clients: slots, queue, hang-ups, swapped caches. Order is kept by gates and events, never by time."""

import asyncio
import gc
import json
import weakref

import pytest

from cag.errors import RequestTooLong
from cag.forward.pages import SLAB_PAGES
from cag.generation import scheduler
from cag.server import service as service_module
from cag.server.tenants import OPERATOR, CacheKey

pytestmark = pytest.mark.anyio
URL = "/v1/chat/completions"
LONG = 200  # tokens that nobody waits for


def body(question="When does the gate open?", **more):
    return {"model": "handbook", "messages": [{"role": "user", "content": question}], "max_tokens": LONG} | more


async def test_concurrent_requests_get_their_own_answers(serving, engine):
    asked = [
        (name, f"{word} {number}?", number)
        for name in ("handbook", "manual")
        for number, word in enumerate(["When", "Who is the owner of", "<|im_end|>", "Where", "Why not", "ä€"])
    ]
    alone = [
        engine.ask(name, q, max_tokens=8, temperature=float(number % 2), seed=number).text for name, q, number in asked
    ]
    assert len(set(alone)) > 1
    async with serving(num_slots=4) as served:
        calls = [
            served.client.post(URL, json=body(q, model=name, max_tokens=8, temperature=float(number % 2), seed=number))
            for name, q, number in asked
        ]
        answers = [response.json() for response in await asyncio.gather(*calls)]
    assert [answer["choices"][0]["message"]["content"] for answer in answers] == alone
    assert [answer["cag"]["cache"]["name"] for answer in answers] == [name for name, _, _ in asked]


async def test_a_full_queue_is_429_and_nobody_else_is_harmed(serving, gate):
    async with serving(num_slots=1, max_waiting=1) as served:
        first = asyncio.ensure_future(served.client.post(URL, json=body(max_tokens=3)))
        await gate.reached()
        second = asyncio.ensure_future(served.client.post(URL, json=body(max_tokens=3)))
        while served.service.slots.waiting < 1:
            await asyncio.sleep(0)
        refused = await served.client.post(URL, json=body())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert refused.json()["error"]["code"] == "queue_full"
        gate.open()
        assert [(await call).status_code for call in (first, second)] == [200, 200]
        await served.service.slots.acquire("")
        assert (served.service.slots.running, served.service.slots.waiting) == (1, 0)


async def test_what_cannot_be_answered_waits_for_no_slot(serving, gate):
    wrong = [({"model": "nobody"}, 404), ({"messages": [{"role": "user", "content": " "}]}, 400)]
    async with serving(num_slots=1) as served:
        first = asyncio.ensure_future(served.client.post(URL, json=body(max_tokens=1)))
        await gate.reached()
        async with asyncio.timeout(60):
            refused = [(await served.client.post(URL, json=body() | change)).status_code for change, _ in wrong]
        gate.open()
        assert (await first).status_code == 200
        assert refused == [status for _, status in wrong]
        counted = served.service.metrics.render()
    assert 'cag_answers_total{outcome="refused"} 2' in counted
    assert 'outcome="failed"' not in counted


@pytest.mark.parametrize("path", [URL, "/v1/caches/handbook/ask"])
async def test_who_hangs_up_a_stream_frees_the_slot_at_the_next_token(serving, gate, raw, path):
    request = body(stream=True) if path == URL else {"question": "When?", "max_tokens": LONG, "stream": True}
    async with serving(num_slots=1) as served:
        call = raw(served.app, path, request)
        gate.let(2)
        await call.until(b'"content":' if path == URL else b"event: token")
        for _ in range(3):
            await gate.reached()
        await call.hang_up()
        gate.let(1)
        await served.service.slots.acquire("")
        assert gate.num_forwards == 3
        assert 'cag_answers_total{outcome="cancelled"} 1' in served.service.metrics.render()
        assert not served.service.runs


async def test_who_hangs_up_before_the_first_token_frees_the_slot(serving, gate, raw):
    async with serving(num_slots=1) as served:
        call = raw(served.app, URL, body())
        await gate.reached()
        await call.hang_up()
        assert call.status == 499
        gate.let(1)
        await served.service.slots.acquire("")
        assert gate.num_forwards == 1


async def test_a_server_that_stops_tells_those_that_it_cannot_wait_for(serving, gate, raw):
    async with serving(num_slots=2) as served:
        streams = [raw(served.app, URL, body(stream=True, max_tokens=LONG))]
        streams.append(
            raw(served.app, "/v1/caches/handbook/ask", {"question": "When?", "max_tokens": LONG, "stream": True})
        )
        for call, sign in zip(streams, (b'"content":', b"event: token"), strict=True):
            seen = asyncio.ensure_future(call.until(sign))
            while not seen.done():  # however many forwards the other had before it joined
                gate.let(1)
                await asyncio.wait([seen], timeout=0.05)
            await seen
        waiting = asyncio.ensure_future(served.client.post(URL, json=body()))
        while served.service.slots.waiting < 1:
            await asyncio.sleep(0)
        served.service.interrupt()
        for call in streams:
            await call.until(b'"code":"server_stopping"')
            await call.task
        refused = [await waiting, await served.client.post(URL, json=body())]
        assert [(call.status_code, call.json()["error"]["code"]) for call in refused] == [(503, "server_stopping")] * 2
        gate.open()
        while served.service.slots.running:
            await asyncio.sleep(0.01)
        assert not served.service.runs


async def test_who_hangs_up_in_the_queue_leaves_it(serving, gate, raw):
    async with serving(num_slots=1) as served:
        first = asyncio.ensure_future(served.client.post(URL, json=body(max_tokens=2)))
        await gate.reached()
        call = raw(served.app, URL, body(stream=True))
        while served.service.slots.waiting < 1:
            await asyncio.sleep(0)
        await call.hang_up()
        assert served.service.slots.waiting == 0
        gate.open()
        assert (await first).json()["usage"]["completion_tokens"] == 2
        assert gate.num_forwards == 2


async def test_a_swapped_cache_serves_new_requests_while_old_ones_end(serving, gate, engine, copy_of):
    old = copy_of("handbook", "swapped")
    with engine.open("swapped") as prefix:
        gate.let(100)
        expected = prefix.ask("Who?", max_tokens=3).text
    for _ in range(3):
        await gate.reached()
    while gate._permits.acquire(blocking=False):
        pass
    async with serving() as served:
        url, question = "/v1/caches/swapped/ask", {"question": "Who?", "max_tokens": 3}
        running = asyncio.ensure_future(served.client.post(url, json=question))
        await gate.reached()
        new = copy_of("manual", "swapped")
        later = asyncio.ensure_future(served.client.post(url, json=question))
        while served.service.loop.scheduler.num_requests < 2:  # it joins at the next step
            await asyncio.sleep(0)
        gate.open()
        first, second = (await running).json(), (await later).json()
        assert (first["cache"]["digest"], first["answer"]) == (old, expected)
        assert second["cache"]["digest"] == new
        assert served.service.caches.num_resident == 1
        assert served.service.caches.is_resident(CacheKey(OPERATOR, "swapped"), new)


async def test_a_damaged_cache_is_an_error_and_works_again_once_repaired(serving, engine, copy_of):
    copy_of("manual", "damaged")
    chunk = engine.find("damaged")[1].chunks[0]
    path = next(p for p in engine.store.backend.root.rglob(f"*{chunk.key[2:]}*"))
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-20] + bytes(20))
    async with serving() as served:
        url, question = "/v1/caches/damaged/ask", {"question": "Who?", "max_tokens": 3}
        broken = await served.client.post(url, json=question)
        path.write_bytes(content)
        repaired = await served.client.post(url, json=question)
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "corrupt_entry")
    assert repaired.status_code == 200


async def test_shutdown_stops_running_answers(serving, gate, raw):
    async with serving(num_slots=1) as served:
        call = raw(served.app, URL, body(stream=True))
        gate.let(1)
        await call.until(b'"content":')
        closing = asyncio.ensure_future(served.service.close())
        await asyncio.sleep(0)
        gate.open()
        await closing
        assert gate.num_forwards < 10
        await call.hang_up()


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event(serving, engine, monkeypatch):
    forward, seen = engine.model.choose_together, []

    def failing(*arguments, **options):
        seen.append(1)
        if len(seen) > 3:
            raise MemoryError("no more memory")
        return forward(*arguments, **options)

    monkeypatch.setattr(engine.model, "choose_together", failing)
    async with serving() as served:
        response = await served.client.post(URL, json=body(stream=True))
        metrics = served.service.metrics.render()
    last = json.loads(response.text.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["type"] == "server_error"
    assert "no more memory" not in response.text
    assert 'cag_answers_total{outcome="failed"} 1' in metrics


@pytest.mark.parametrize("ending", ["answered", "streamed", "cut off", "failed", "failed at once", "stopped"])
async def test_what_an_answer_took_goes_with_it(serving, gate, raw, engine, monkeypatch, copy_of, ending):
    """Pages of its tail, and the memory of its cache once that is closed, wait for no collection."""
    copy_of("manual", "brief")
    cache, pool, has_begun = CacheKey(OPERATOR, "brief"), engine.model.pages, b"event: token"
    gc.collect()
    gc.disable()
    try:
        async with serving(speculate=True) as served:
            if ending == "failed at once":
                monkeypatch.setattr(scheduler, "choices", failing)
            question = {"question": "When?", "max_tokens": 5, "stream": ending != "answered"}
            call = raw(served.app, "/v1/caches/brief/ask", question)
            if ending in ("cut off", "failed", "stopped"):
                gate.let(1)
                await call.until(has_begun)
            if ending == "cut off":
                await call.hang_up()
            elif ending == "failed":
                monkeypatch.setattr(scheduler, "choices", failing)
            elif ending == "stopped":
                served.service.interrupt()
            gate.open()
            await call.task
            while served.service.slots.running:
                await asyncio.sleep(0.01)
            assert pool.num_free + pool._num_scratch == pool.num_pages
            memory = weakref.ref(served.service.caches._held[cache].prefix.resident)
            served.service.caches.drop(cache)
            async with asyncio.timeout(60):
                while memory() is not None:  # threads may be about to leave their last frames
                    await asyncio.sleep(0.01)
    finally:
        gc.enable()


async def test_an_idle_server_keeps_few_pages(serving, engine, monkeypatch):
    monkeypatch.setattr(service_module, "SWEEP_S", 0.01)
    async with serving() as served:
        question = {"question": "gate " * 700, "max_tokens": 1}
        assert (await served.client.post("/v1/caches/handbook/ask", json=question)).status_code == 200
        assert engine.model.pages.num_pages > SLAB_PAGES
        monkeypatch.setattr(service_module, "CHECK_CACHES_S", 0.01)
        async with asyncio.timeout(60):
            while engine.model.pages.num_pages > SLAB_PAGES:
                await asyncio.sleep(0.01)


def failing(_generations):
    raise RequestTooLong("it is")  # no error that is logged: records would hold it
