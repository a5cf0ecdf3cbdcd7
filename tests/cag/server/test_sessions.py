"""Conversations over HTTP: turns, time, limits, hang-ups, versions of caches. The clock is a number; order is kept by
gates and events."""

import asyncio
import gc
import json
import weakref

import pytest

from cag.errors import QueueFull, SessionNotFound
from cag.generation.generate import SamplingOptions
from cag.server import ServerSettings
from cag.server import service as service_module
from cag.server.caches import ResidentCaches
from cag.server.service import AnswerService
from cag.server.tenants import OPERATOR, CacheKey, Tenants, store_location
from cag_store.paths import chunk_path

pytestmark = pytest.mark.anyio
TURNS = ["When does the gate open?", "Why?", "Who has the code <|im_end|> of it?"]
TOKENS = 7


async def opened(client, name="handbook", **body):
    response = await client.post(f"/v1/caches/{name}/sessions", json=body)
    assert response.status_code == 201, response.text
    return response.json()


def url(session):
    return f"/v1/sessions/{session['id']}"


async def asked(client, session, question, **more):
    return await client.post(f"{url(session)}/ask", json={"question": question, "max_tokens": TOKENS} | more)


def in_python(engine, name, questions, **sampling):
    """What a session gives without a server, as JSON."""
    with engine.open(name) as prefix:
        session = prefix.session()
        return [session.ask(q, SamplingOptions(max_tokens=TOKENS, **sampling)).to_json() for q in questions]


DRAFTS = ("drafted_tokens", "accepted_tokens")


def same(answer, expected):
    """Text and counts; times, the tier and drafts are of each run."""
    said = all(answer[key] == expected[key] for key in ("answer", "citations", "finish_reason", "model"))
    return said and all(answer["usage"][key] == count for key, count in expected["usage"].items() if key not in DRAFTS)


class Clock:
    def __init__(self):
        self.now = 1_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clocked(serving, monkeypatch):
    """`serving` whose sessions live by a clock that stands still, and that clock."""
    clock = Clock()

    class Clocked:
        def __init__(self, **settings):
            self.context = serving(**settings)

        async def __aenter__(self):
            served = await self.context.__aenter__()
            served.service.sessions.clock = clock
            return served, clock

        async def __aexit__(self, *error):
            return await self.context.__aexit__(*error)

    return Clocked


def num_used_pages(engine):
    gc.collect()
    pages = engine.model.pages
    return pages.num_pages - pages.num_free


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
async def test_turns_equal_those_of_a_session_in_python(serving, engine, sampling):
    expected = in_python(engine, "handbook", TURNS, **sampling)
    async with serving() as served:
        response = await served.client.post("/v1/caches/handbook/sessions")
        session = response.json()
        assert response.headers["location"] == url(session)
        assert (session["object"], session["num_turns"]) == ("session", 0)
        digest = engine.find("handbook")[1].digest
        assert session["cache"] == {"name": "handbook", "digest": digest}
        num_tokens = session["num_tokens"]
        assert num_tokens == engine.find("handbook")[1].num_tokens
        for number, (question, turn) in enumerate(zip(TURNS, expected, strict=True), start=1):
            answer = (await asked(served.client, session, question, **sampling)).json()
            assert same(answer, turn)
            assert answer["usage"]["cached_tokens"] == num_tokens
            now = (await served.client.get(url(session))).json()
            assert now["num_turns"] == number
            num_tokens = now["num_tokens"]
        assert (await served.client.get("/v1/sessions")).json() == {"object": "list", "data": [now]}
        assert "cag_sessions 1" in (await served.client.get("/metrics")).text.splitlines()


async def test_a_later_turn_is_streamed_as_events(serving, engine):
    expected = in_python(engine, "handbook", TURNS[:2])
    async with serving() as served:
        session = await opened(served.client)
        await asked(served.client, session, TURNS[0])
        stream = await asked(served.client, session, TURNS[1], stream=True)
    *tokens, last = (part.split("\n") for part in stream.text.strip().split("\n\n"))
    texts = [json.loads(data.removeprefix("data: "))["text"] for _, data in tokens]
    assert "".join(texts) == expected[1]["answer"]
    assert last[0] == "event: answer"
    assert same(json.loads(last[1].removeprefix("data: ")), expected[1])


async def test_sessions_share_steps(serving, engine, gate):
    gate.open()
    expected = [in_python(engine, name, TURNS[:1])[0] for name in ("handbook", "manual")]
    async with serving() as served:
        sessions = [await opened(served.client, name) for name in ("handbook", "manual")]
        for session in sessions:
            await asked(served.client, session, "x", max_tokens=1)
            await served.client.delete(url(session))
        sessions = [await opened(served.client, name) for name in ("handbook", "manual")]
        calls = [asked(served.client, session, TURNS[0]) for session in sessions]
        answers = [response.json() for response in await asyncio.gather(*calls)]
        assert served.service.loop.scheduler.largest_batch == 2
    assert all(map(same, answers, expected))


@pytest.mark.parametrize(
    "body", [{"ttl_s": 0}, {"ttl_s": 61}, {"ttl_s": "soon"}, {"ttl": 5}, {"ttl_s": 1e400}, []], ids=str
)
async def test_bodies_are_strict(serving, body):
    async with serving(session_ttl_s=60) as served:
        path = "/v1/caches/handbook/sessions"
        response = await served.client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")
        session = await opened(served.client)
        for question in ({"question": "Who?", "tokens": 1}, {}, {"question": " "}):
            assert (await served.client.post(f"{url(session)}/ask", json=question)).status_code == 400
        assert (await served.client.post("/v1/caches/nobody/sessions")).status_code == 404
        assert len(served.service.sessions) == 1


async def test_a_session_lives_from_its_last_question_on(clocked):
    async with clocked(session_ttl_s=60) as (served, clock):
        session, short = await opened(served.client), await opened(served.client, ttl_s=20)
        assert (session["created_at"], session["expires_at"]) == ("1970-01-12T13:46:40Z", "1970-01-12T13:47:40Z")
        assert short["expires_at"] == "1970-01-12T13:47:00Z"
        clock.now += 50
        for path in (url(session), "/v1/sessions"):  # looking renews nothing
            assert (await served.client.get(path)).status_code == 200
        assert (await asked(served.client, session, TURNS[0])).status_code == 200
        clock.now += 59
        assert (await served.client.get(url(session))).json()["expires_at"] == "1970-01-12T13:48:30Z"
        clock.now += 1
        paths = [url(session), url(short), "/v1/sessions/session-0"]
        gone = [await served.client.get(path) for path in paths]
        gone += [await asked(served.client, session, TURNS[1]), await served.client.delete(url(session))]
        assert [(r.status_code, r.json()["error"]["code"]) for r in gone] == [(404, "session_not_found")] * 5
        assert len({r.json()["error"]["message"] for r in gone}) == 1
        assert (await served.client.get("/v1/sessions")).json()["data"] == []


async def test_pages_and_leases_of_expired_sessions_go_back_by_themselves(clocked, engine, monkeypatch):
    monkeypatch.setattr(service_module, "SWEEP_S", 0.01)
    used, leases = num_used_pages(engine), len(engine.store.backend.live_leases())
    async with clocked() as (served, clock):
        sessions = [await opened(served.client) for _ in range(3)]
        for session in sessions:
            assert (await asked(served.client, session, TURNS[0])).status_code == 200
        assert num_used_pages(engine) >= used + 3
        served.service.caches.close()
        assert len(engine.store.backend.live_leases()) == leases + 1  # one for the version
        clock.now += 10_000
        while len(served.service.sessions) or num_used_pages(engine) > used:
            await asyncio.sleep(0.01)
        assert len(engine.store.backend.live_leases()) == leases


async def test_an_answer_that_runs_keeps_its_session(clocked, gate):
    async with clocked(session_ttl_s=60) as (served, clock):
        session = await opened(served.client)
        running = asyncio.ensure_future(asked(served.client, session, TURNS[0]))
        await gate.reached()
        clock.now += 1000
        served.service.sessions.close_expired()
        assert (await served.client.get(url(session))).status_code == 200
        gate.open()
        assert (await running).status_code == 200
        assert (await served.client.get(url(session))).json()["num_turns"] == 1


async def test_nobody_sees_a_session_expired_between_its_answer_and_its_new_time(clocked):
    async with clocked(session_ttl_s=60) as (served, clock):
        session = await opened(served.client)
        kept, seen = served.service.sessions.find(OPERATOR, session["id"]), []

        def looking():
            if not seen or seen[-1] is not None:  # not for the time that is asked for to tell
                seen.append(None)
                seen[-1] = kept.is_over
            return clock.now

        kept.claim()
        clock.now += 1000
        kept._clock = looking
        kept.release()
        assert seen == [False]


async def test_there_are_only_so_many(clocked):
    async with clocked(max_sessions=2, session_ttl_s=60) as (served, clock):
        path = "/v1/caches/handbook/sessions"
        first, _ = await opened(served.client), await opened(served.client, ttl_s=30)
        refused = await served.client.post(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.headers["retry-after"] == "30"
        assert (await served.client.post("/v1/caches/nobody/sessions")).status_code == 429
        await served.client.delete(url(first))
        assert (await served.client.post(path)).status_code == 201
        assert (await served.client.post(path)).status_code == 429
        clock.now += 30
        assert (await served.client.post(path)).status_code == 201
        assert (await served.client.post(path)).status_code == 429
        assert (await served.client.post("/v1/caches/nobody/sessions")).status_code == 429
        clock.now += 60
        assert (await served.client.post("/v1/caches/nobody/sessions")).status_code == 404
        assert [(await served.client.post(path)).status_code for _ in range(3)] == [201, 201, 429]


async def test_each_tenant_may_have_so_many(engine, tmp_path):
    for tenant in ("acme", "beta"):
        engine.export_cache("handbook", store_location(str(tmp_path), tenant))
    settings = ServerSettings(
        tenant_keys={"acme": ("key-a",), "beta": ("key-b",)}, tenant_stores=str(tmp_path), max_sessions=1
    )
    table = AnswerService(engine, settings).sessions
    keys = [CacheKey(tenant, "handbook") for tenant in ("acme", "beta")]
    for key in keys:
        table.open(key)
        with pytest.raises(QueueFull):
            table.open(key)
    table.close()
    table.open(keys[0])
    table.close()


async def test_one_question_at_a_time(serving, engine, gate):
    async with serving(num_slots=1) as served:
        session, other = await opened(served.client), await opened(served.client)
        running = asyncio.ensure_future(asked(served.client, session, TURNS[0]))
        await gate.reached()
        waiting = asyncio.ensure_future(asked(served.client, other, TURNS[0]))
        while served.service.slots.waiting < 1:
            await asyncio.sleep(0)
        for taken in (session, other):  # that one waits for a slot
            for stream in (False, True):
                response = await asked(served.client, taken, "Who?", stream=stream)
                assert (response.status_code, response.json()["error"]["code"]) == (409, "session_busy")
        gate.open()
        answers = [(await call).json() for call in (running, waiting)]
        answers.append((await asked(served.client, session, TURNS[1])).json())
    expected = in_python(engine, "handbook", TURNS[:2])
    assert all(map(same, answers, [expected[0], *expected]))


async def test_the_next_question_can_follow_the_answer_at_once(serving):
    """Who has read the answer finds the session free."""
    async with serving() as served:
        session = await opened(served.client)
        for _ in range(20):
            assert (await asked(served.client, session, "x", max_tokens=1)).status_code == 200


async def hang_up(served, gate, raw, session, num_forwards):
    """Ask, and be gone after so many forwards; returns when the answer has left."""
    call = raw(served.app, f"{url(session)}/ask", {"question": "Where to?", "max_tokens": 200, "stream": True})
    for _ in range(num_forwards):
        await gate.reached()
        gate.let(1)
    await gate.reached()
    await call.hang_up()
    gate.let(1)
    while served.service.runs:
        await asyncio.sleep(0)


@pytest.mark.parametrize("num_forwards", [0, 1, 4], ids=["reading", "first token", "later"])
@pytest.mark.parametrize("num_turns", [0, 1])
async def test_a_turn_that_was_cut_off_was_never_asked(serving, engine, gate, raw, num_turns, num_forwards):
    async with serving() as served:
        session = await opened(served.client)
        answers = []
        for number, question in enumerate(TURNS):
            if number == num_turns:
                before = (await served.client.get(url(session))).json()
                await hang_up(served, gate, raw, session, num_forwards)
                after = (await served.client.get(url(session))).json()
                assert (after["num_turns"], after["num_tokens"]) == (before["num_turns"], before["num_tokens"])
            call = asyncio.ensure_future(asked(served.client, session, question))
            while not call.done():
                gate.let(1)
                await asyncio.sleep(0)
            while gate._permits.acquire(blocking=False):
                pass
            while gate._reached.acquire(blocking=False):
                pass
            answers.append(call.result().json())
    gate.open()
    assert all(map(same, answers, in_python(engine, "handbook", TURNS)))


async def test_who_hangs_up_in_the_queue_leaves_the_session_free(serving, gate, raw):
    async with serving(num_slots=1) as served:
        session, other = await opened(served.client), await opened(served.client)
        running = asyncio.ensure_future(asked(served.client, other, TURNS[0]))
        await gate.reached()
        call = raw(served.app, f"{url(session)}/ask", {"question": "Where to?"})
        while served.service.slots.waiting < 1:
            await asyncio.sleep(0)
        await call.hang_up()
        gate.open()
        assert (await running).status_code == 200
        assert (await asked(served.client, session, TURNS[0])).json()["usage"]["completion_tokens"] == TOKENS


async def test_an_answer_that_fails_was_never_asked(serving, engine, monkeypatch):
    forward, seen = engine.model.choose_together, []

    def failing(*arguments, **options):
        seen.append(1)
        if 3 <= len(seen) - turn <= 3:
            raise MemoryError("no more memory")
        return forward(*arguments, **options)

    expected = in_python(engine, "handbook", TURNS[:2])
    monkeypatch.setattr(engine.model, "choose_together", failing)
    turn = 1000
    async with serving() as served:
        session = await opened(served.client)
        first = (await asked(served.client, session, TURNS[0])).json()
        turn = len(seen)
        failed = await asked(served.client, session, "Where to?")
        second = (await asked(served.client, session, TURNS[1])).json()
    assert (failed.status_code, failed.json()["error"]["code"]) == (500, "internal_error")
    assert same(first, expected[0])
    assert same(second, expected[1])


async def test_what_is_longer_than_the_window_is_refused_and_forgotten(serving, engine):
    async with serving() as served:
        session = await opened(served.client)
        first = (await asked(served.client, session, TURNS[0])).json()
        refused = await asked(served.client, session, "x" * 9000)
        second = (await asked(served.client, session, TURNS[1])).json()
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert all(map(same, [first, second], in_python(engine, "handbook", TURNS[:2])))


async def test_a_session_keeps_the_version_that_it_was_opened_with(serving, engine, copy_of):
    old = copy_of("handbook", "rebuilt")
    expected = in_python(engine, "handbook", TURNS)
    async with serving() as served:
        caches = served.service.caches
        session = await opened(served.client, "rebuilt")
        answers = [(await asked(served.client, session, TURNS[0])).json()]
        new = copy_of("manual", "rebuilt")
        for question in TURNS[1:]:
            other = await served.client.post("/v1/caches/rebuilt/ask", json={"question": "Who?", "max_tokens": 1})
            assert other.json()["cache"]["digest"] == new
            answers.append((await asked(served.client, session, question)).json())
        assert {answer["cache"]["digest"] for answer in answers} == {old}
        assert {answer["cache"]["name"] for answer in answers} == {"rebuilt"}
        assert all(map(same, answers, expected))
        assert (caches.num_resident, caches.is_resident(CacheKey(OPERATOR, "rebuilt"), new)) == (2, True)
        await served.client.delete(url(session))
        assert (caches.num_resident, caches.is_resident(CacheKey(OPERATOR, "rebuilt"), new)) == (1, True)


async def test_a_session_outlives_its_cache_and_holds_its_files(serving, engine, tmp_path):
    (tmp_path / "gamma.txt").write_text("The gamma lamp burns for 900 hours.\n")
    engine.build([tmp_path / "gamma.txt"], name="doomed")
    expected = in_python(engine, "doomed", TURNS[:2])
    chunks = {chunk_path(chunk.key) for chunk in engine.find("doomed")[1].chunks}
    async with serving() as served:
        session = await opened(served.client, "doomed")
        answers = [(await asked(served.client, session, TURNS[0])).json()]
        assert (await served.client.delete("/v1/caches/doomed")).status_code == 200
        assert served.service.caches.num_resident == 0
        assert not chunks & set(engine.store.gc(grace_s=0).removed)
        answers.append((await asked(served.client, session, TURNS[1])).json())
        await served.client.delete(url(session))
        assert served.service.caches.num_resident == 0
    assert all(map(same, answers, expected))
    assert chunks <= set(engine.store.gc(grace_s=0).removed)


async def test_idle_sessions_hold_no_cache_in_memory(serving, engine, gate):
    gate.open()
    names = ("handbook", "manual")
    free = ResidentCaches(Tenants(engine, frozenset(), None).find)
    sizes = []
    for name in names:
        with free.use(CacheKey(OPERATOR, name)) as use:
            use.prefix.resident.wait()
            sizes.append(use.prefix.resident.num_bytes)
    free.close()
    expected = [in_python(engine, name, TURNS[:2]) for name in names]
    async with serving(max_resident_bytes=max(sizes)) as served:
        sessions = [await opened(served.client, name) for name in names]
        answers = {name: [] for name in names}
        residents = []
        for question in TURNS[:2]:
            for name, session in zip(names, sessions, strict=True):
                answers[name].append((await asked(served.client, session, question)).json())
                assert served.service.caches.num_resident == 1
                residents.append(weakref.ref(next(iter(served.service.caches._held.values())).prefix.resident))
        assert served.service.caches.num_evicted >= 3
        gc.collect()
        assert [ref() is not None for ref in residents] == [False, False, False, True]
    for name, turns in zip(names, expected, strict=True):
        assert all(map(same, answers[name], turns))


async def test_a_cache_that_a_session_is_asked_behind_is_not_evicted(serving, engine, gate):
    size = max(engine.find(name)[1].raw_bytes for name in ("handbook", "manual"))
    async with serving(max_resident_bytes=int(size * 1.1)) as served:
        session = await opened(served.client)
        running = asyncio.ensure_future(asked(served.client, session, TURNS[0]))
        await gate.reached()
        refused = await served.client.post("/v1/caches/manual/sessions")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        gate.open()
        assert (await running).status_code == 200
        assert (await served.client.post("/v1/caches/manual/sessions")).status_code == 201


async def test_deleting_a_session_lets_its_answer_end(serving, engine, gate):
    used = num_used_pages(engine)
    async with serving() as served:
        session = await opened(served.client)
        running = asyncio.ensure_future(asked(served.client, session, TURNS[0]))
        await gate.reached()
        deleted = await served.client.delete(url(session))
        assert (deleted.status_code, deleted.json()) == (200, {"id": session["id"], "deleted": True})
        assert (await served.client.get(url(session))).status_code == 404
        gate.open()
        assert same((await running).json(), in_python(engine, "handbook", TURNS[:1])[0])
        assert (await asked(served.client, session, TURNS[1])).status_code == 404
        assert num_used_pages(engine) == used


async def test_a_session_belongs_to_the_tenant_who_opened_it(serving):
    async with serving() as served:
        session, sessions = await opened(served.client), served.service.sessions
        assert sessions.of("acme") == []
        for look in (sessions.find, sessions.delete):
            with pytest.raises(SessionNotFound):
                look("acme", session["id"])
        assert sessions.find(OPERATOR, session["id"]).id == session["id"]


async def test_shutdown_closes_sessions(serving, engine, gate, raw):
    used, leases = num_used_pages(engine), len(engine.store.backend.live_leases())
    async with serving() as served:
        sessions = [await opened(served.client) for _ in range(2)]
        call = raw(served.app, f"{url(sessions[0])}/ask", {"question": "Where?", "max_tokens": 200, "stream": True})
        gate.let(2)
        await call.until(b"event: token")
        closing = asyncio.ensure_future(served.service.close())
        await asyncio.sleep(0)
        gate.open()
        await closing
        assert gate.num_forwards < 10
        assert len(served.service.sessions) == 0
        await call.hang_up()
    del call
    assert num_used_pages(engine) == used
    assert len(engine.store.backend.live_leases()) == leases
