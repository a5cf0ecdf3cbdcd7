"""`POST /v1/caches` and `/v1/jobs`: caches that clients let be built, beside answers."""

import asyncio
import threading

import pytest

from cag.server.jobs import read_documents

pytestmark = pytest.mark.anyio
DOCUMENTS = [
    {"text": "The gamma valve closes at nine.\n", "doc_id": "valves", "title": "Valves", "path": "docs/valves.md"},
    {"text": "The delta fan has six blades.\n"},
]
ORDER = {"name": "built", "documents": DOCUMENTS}


def new_order(text):
    """An order that no chunk of the store serves."""
    return {"name": "built", "documents": [{"text": f"Only here: {text}.\n"}]}


@pytest.fixture(autouse=True)
def forgotten(engine):
    yield
    for name in {"built", "other"} & set(engine.store.names()):
        engine.store.remove(name, force=True)


async def over(client, job):
    """The job when it is over."""
    while job["finished_at"] is None:
        await asyncio.sleep(0.01)
        job = (await client.get(f"/v1/jobs/{job['id']}")).json()
    return job


async def test_a_cache_is_built_and_asked(serving, engine):
    async with serving() as served:
        response = await served.client.post("/v1/caches", json=ORDER | {"pinned": True, "ttl_s": 1000})
        job = response.json()
        assert (response.status_code, job["object"], job["name"]) == (202, "cache.job", "built")
        assert response.headers["Location"] == f"/v1/jobs/{job['id']}"
        job = await over(served.client, job)
        assert (job["status"], job["error"]) == ("succeeded", None)
        assert job["progress"]["done_tokens"] == job["progress"]["total_tokens"] == job["cache"]["num_tokens"]
        cache = (await served.client.get("/v1/caches/built")).json()
        assert cache == job["cache"]
        assert cache["pinned"] and cache["expires_at"]
        shown = [(found["doc_id"], found["title"], found["path"]) for found in cache["documents"]]
        assert shown == [("valves", "Valves", "docs/valves.md"), ("2", "2", "2")]
        answer = await served.client.post("/v1/caches/built/ask", json={"question": "Which fan?", "max_tokens": 4})
        assert answer.json()["usage"]["cached_tokens"] == cache["num_tokens"]
        assert [row["id"] for row in (await served.client.get("/v1/jobs")).json()["data"]] == [job["id"]]


async def test_the_next_question_is_answered_by_the_new_version(serving):
    async with serving() as served:
        digests = []
        for documents in (DOCUMENTS[:1], DOCUMENTS):
            job = (await served.client.post("/v1/caches", json={"name": "built", "documents": documents})).json()
            await over(served.client, job)
            asked = await served.client.post("/v1/caches/built/ask", json={"question": "Who?", "max_tokens": 2})
            digests.append(asked.json()["cache"]["digest"])
        assert digests[0] != digests[1]


@pytest.mark.parametrize(
    "order",
    [
        {"name": "built", "documents": []},
        {"name": "../built", "documents": DOCUMENTS},
        {"name": "built", "documents": [{"text": "a", "doc_id": "b"}, {"text": "c", "doc_id": "b"}]},
        {"name": "built", "documents": DOCUMENTS, "paths": ["/etc"]},
        {"name": "built", "documents": [{"path": "/etc/hostname"}]},
        {"name": "built", "documents": DOCUMENTS, "ttl_s": -1},
    ],
)
async def test_a_bad_order_is_no_job(order, serving):
    async with serving() as served:
        assert (await served.client.post("/v1/caches", json=order)).status_code == 400
        assert (await served.client.get("/v1/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"codec": "nothing"}, "unknown_codec"),
        ({"documents": [{"text": "  \n"}]}, "empty_corpus"),
        ({"documents": [{"text": "many words " * 5000}]}, "corpus_too_large"),
    ],
)
async def test_a_build_that_fails_says_why(change, code, serving, engine):
    async with serving() as served:
        job = await over(served.client, (await served.client.post("/v1/caches", json=ORDER | change)).json())
        assert (job["status"], job["error"]["code"], job["cache"]) == ("failed", code, None)
        assert "built" not in engine.store.names()


async def test_jobs_that_wait_are_bounded_and_can_be_cancelled(serving, engine, gate):
    async with serving(max_waiting_builds=1) as served:
        first = (await served.client.post("/v1/caches", json=new_order("bounded"))).json()
        await gate.reached()
        second, third = [await served.client.post("/v1/caches", json=ORDER | {"name": "other"}) for _ in range(2)]
        assert (second.status_code, third.status_code) == (202, 429)
        assert third.headers["Retry-After"].isdecimal()
        cancelled = (await served.client.post(f"/v1/jobs/{second.json()['id']}/cancel")).json()
        assert cancelled["status"] == "cancelled"
        await served.client.post(f"/v1/jobs/{first['id']}/cancel")
        gate.open()
        assert (await over(served.client, first))["status"] == "cancelled"
        assert not {"built", "other"} & set(engine.store.names())
        assert (await served.client.get("/v1/jobs/job-0")).json()["error"]["code"] == "job_not_found"


async def test_a_shutdown_ends_a_build(serving, engine, gate):
    async with serving() as served:
        await served.client.post("/v1/caches", json=new_order("shutdown"))
        await gate.reached()
        served.service.builds.close()
        gate.open()
    assert "built" not in engine.store.names()
    assert not any(thread.name == "cag-build" for thread in threading.enumerate())


async def test_answers_go_on_between_the_layers_of_a_build(serving, engine, monkeypatch):
    """The build stands between two of its layers until an answer was given."""
    turns, asked, inside = engine.model.turns, threading.Event(), asyncio.Event()
    loop, give_way = asyncio.get_running_loop(), turns.give_way

    def patient():
        if turns._is_background:
            loop.call_soon_threadsafe(inside.set)
            while not asked.is_set():
                if give_way():
                    return True
        return give_way()

    monkeypatch.setattr(turns, "give_way", patient)
    async with serving() as served:
        job = (await served.client.post("/v1/caches", json=new_order("layers"))).json()
        await inside.wait()
        answer = await served.client.post("/v1/caches/handbook/ask", json={"question": "When?", "max_tokens": 4})
        asked.set()
        assert answer.status_code == 200
        assert (await served.client.get(f"/v1/jobs/{job['id']}")).json()["finished_at"] is None
        assert (await over(served.client, job))["status"] == "succeeded"


def test_documents_are_read_as_from_files():
    report = read_documents([{"doc_id": "a", "text": "# Title\nText\n", "path": "p"}])
    (document,) = report.documents
    assert (document.doc_id, document.title, document.path, document.text) == ("a", "A", "p", "# Title\nText")
