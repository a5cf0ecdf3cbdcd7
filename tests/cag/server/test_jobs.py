"""`POST /v1/caches` and `/v1/jobs`: caches that clients let be built, beside answers."""

import asyncio
import threading
import time

import pytest

from cag.building.options import BuildProgress
from cag.errors import JobNotFound, QueueFull
from cag.server import ServerSettings
from cag.server.job_progress import JobProgress
from cag.server.jobs import KEPT_JOBS, BuildOrder, read_documents
from cag.server.service import AnswerService
from cag_store import Store

pytestmark = pytest.mark.anyio
DOCUMENTS = [
    {"text": "The gamma valve closes at nine.\n", "doc_id": "valves", "title": "Valves", "path": "docs/valves.md"},
    {"text": "The delta fan has six blades.\n"},
]
BAD = {(400, "invalid_request_error"), (409, "invalid_request_error")}
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
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["cached_tokens"] == cache["num_tokens"]
        assert (job["report"]["digest"], job["report"]["warnings"]) == (cache["digest"], [])
        listed = {field: job[field] for field in job if field not in ("report", "cache")}
        assert (await served.client.get("/v1/jobs")).json()["data"] == [listed]
        await served.client.delete("/v1/caches/built?force=true")
        assert (await served.client.get(f"/v1/jobs/{job['id']}")).json() == job | {"cache": None}


async def test_a_job_says_what_it_left_out_and_what_its_figures_are_worth(serving):
    texts = {"fan": "Fan.", "again": "Fan.\n", "blank": " \n"}
    order = {"name": "built", "codec": "int8", "documents": [{"text": texts[key], "doc_id": key} for key in texts]}
    async with serving() as served:
        job = await over(served.client, (await served.client.post("/v1/caches", json=order)).json())
    assert job["error"] is None
    report = job["report"]
    assert (report["duplicates"], report["empty"], report["skipped"]) == ([["again", "fan"]], ["blank"], [])
    assert ["positions" in warning for warning in report["warnings"]] == [True]
    assert job["cache"]["warnings"] == report["warnings"]


async def test_a_job_that_ends_while_it_is_told_is_told_whole(serving, engine, gate, monkeypatch):
    """Its success is not told without its report."""
    async with serving() as served:
        job = (await served.client.post("/v1/caches", json=new_order("told"))).json()
        await gate.reached()
        find, over = engine.find, []

        def find_when_it_is_over(name):
            gate.open()
            while not (ended := served.service.builds.of("")[0].is_over):
                time.sleep(0.01)
            over.append(ended)
            return find(name)

        monkeypatch.setattr(engine, "find", find_when_it_is_over)
        job = (await served.client.get(f"/v1/jobs/{job['id']}")).json()
    assert over == [True]
    assert (job["status"], job["finished_at"], job["report"]) == ("running", None, None)


async def test_ids_that_differ_by_white_space_alone_are_one(serving):
    async with serving() as served:
        documents = [{"text": "a", "doc_id": "fan"}, {"text": "b", "doc_id": " fan "}]
        response = await served.client.post("/v1/caches", json={"name": "built", "documents": documents})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "documents")


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
        {"name": "built", "documents": [{"text": "a", "path": "plain\x1b[2J"}]},
        {"name": "built", "documents": [{"text": "a", "title": "two\nlines"}]},
        {"name": "built", "documents": DOCUMENTS, "codec": "nothing" * 1000},
    ],
)
async def test_a_bad_order_is_no_job(order, serving):
    async with serving() as served:
        response = await served.client.post("/v1/caches", json=order)
        assert (response.status_code, response.json()["error"]["type"]) in BAD
        assert len(response.text) < 1000
        assert (await served.client.get("/v1/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"documents": [{"text": "  \n"}]}, "empty_corpus"),
        ({"documents": [{"text": "many words " * 5000}]}, "corpus_too_large"),
    ],
)
async def test_a_build_that_fails_says_why(change, code, serving, engine):
    async with serving() as served:
        job = await over(served.client, (await served.client.post("/v1/caches", json=ORDER | change)).json())
        assert (job["status"], job["error"]["code"], job["cache"]) == ("failed", code, None)
        assert "built" not in engine.store.names()
        assert "files" not in job["error"]["message"]  # a client sends none


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


async def test_a_job_of_an_earlier_server_is_not_found_and_its_cache_is(serving):
    async with serving() as served:
        job = await over(served.client, (await served.client.post("/v1/caches", json=ORDER)).json())
    async with serving() as served:
        response = await served.client.get(f"/v1/jobs/{job['id']}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "job_not_found")
        assert "jobs do not outlive the server" in response.json()["error"]["message"]
        assert "/v1/caches/NAME" in response.json()["error"]["message"]
        assert (await served.client.get("/v1/caches/built")).json() == job["cache"]
        assert (await served.client.get("/v1/jobs")).json()["data"] == []


async def test_a_shutdown_ends_a_build(serving, engine, gate):
    async with serving() as served:
        await served.client.post("/v1/caches", json=new_order("shutdown"))
        await gate.reached()
        served.service.builds.close()
        gate.open()
    assert "built" not in engine.store.names()
    assert not any(thread.name == "cag-build" for thread in threading.enumerate())


async def test_answers_go_on_between_the_layers_of_a_build(serving, engine, monkeypatch, tmp_path):
    """The build stands between two of its layers until an answer was given, and its keys and values are the same."""
    turns, asked, inside = engine.model.turns, threading.Event(), asyncio.Event()
    loop, pause, building, order = asyncio.get_running_loop(), turns.pause, [], new_order("layers")

    def patient(num_tokens):
        pause(num_tokens)
        if threading.current_thread().name == "cag-build" and not asked.is_set():
            building.append(num_tokens)
            loop.call_soon_threadsafe(inside.set)
            while not asked.is_set():
                pause(num_tokens)

    monkeypatch.setattr(turns, "pause", patient)
    async with serving() as served:
        job = (await served.client.post("/v1/caches", json=order)).json()
        await inside.wait()
        answer = await served.client.post("/v1/caches/handbook/ask", json={"question": "When?", "max_tokens": 4})
        asked.set()
        assert answer.status_code == 200
        assert (await served.client.get(f"/v1/jobs/{job['id']}")).json()["finished_at"] is None
        job = await over(served.client, job)
        assert job["status"] == "succeeded"
    beside = engine.beside(Store.open(tmp_path))
    beside.build(read_documents([{"doc_id": "1", **document} for document in order["documents"]]), name="alone")
    built, alone = engine.find("built")[1], beside.find("alone")[1]
    assert built.chunks == alone.chunks
    assert building == [job["cache"]["num_tokens"]]


async def test_a_build_that_waits_for_answers_can_be_cancelled(serving, engine, gate):
    """It is asked before each of its forwards and layers, and when it waits."""
    async with serving() as served:
        job = (await served.client.post("/v1/caches", json=new_order("cancelled while it waits"))).json()
        await gate.reached()
        with engine.model.turns.answering():
            gate.open()
            cancelled = (await served.client.post(f"/v1/jobs/{job['id']}/cancel")).json()
            assert cancelled["status"] in ("running", "cancelled")
            assert (await over(served.client, job))["status"] == "cancelled"
    assert "built" not in engine.store.names()


async def test_tenants_are_built_for_in_turn_and_have_queues_of_their_own(engine, gate, tmp_path, caplog):
    caplog.set_level("INFO", "cag.server.jobs")
    settings = ServerSettings(
        tenant_keys={"acme": ("key-a",), "beta": ("key-b",)}, tenant_stores=str(tmp_path), max_waiting_builds=2
    )
    service = AnswerService(engine, settings)
    orders = {tenant: BuildOrder("built", [{"text": f"Only {tenant} has this."}]) for tenant in ("acme", "beta")}
    service.builds.start()
    try:
        running = service.builds.submit("acme", orders["acme"])
        await gate.reached()
        waiting = [service.builds.submit("acme", orders["acme"]) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 caches wait"):
            service.builds.submit("acme", orders["acme"])
        others = service.builds.submit("beta", orders["beta"])
        gate.open()
        while any(not job.is_over for job in (running, *waiting, others)):
            await asyncio.sleep(0.01)
        ended = [running, others, *waiting]
        assert {job.status for job in ended} == {"succeeded"}
        assert {job.order for job in ended} == {None}
    finally:
        service.builds.close()
        service.builds.join()
    told = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert told == [job.id for job in ended]


async def test_old_jobs_of_a_tenant_are_forgotten_and_nobody_elses(engine, tmp_path):
    settings = ServerSettings(tenant_keys={"acme": ("key-a",)}, tenant_stores=str(tmp_path), max_waiting_builds=100)
    builds = AnswerService(engine, settings).builds  # which does not build
    kept = builds.submit("", BuildOrder("built", []))
    builds.cancel(kept)
    jobs = [builds.submit("acme", BuildOrder("built", [])) for _ in range(KEPT_JOBS + 5)]
    for job in jobs:
        builds.cancel(job)
    last = builds.submit("acme", BuildOrder("built", []))
    assert builds.of("") == [kept]
    assert builds.of("acme") == [last, *reversed(jobs[5:])]
    with pytest.raises(JobNotFound):
        builds.get("acme", jobs[0].id)


def test_progress_only_grows_and_tells_speed_and_rest():
    progress = JobProgress()
    assert progress.to_json() is None
    progress.tell(BuildProgress("prefill", 100, 1000, 5.0))
    assert progress.to_json()["tokens_per_s"] is progress.to_json()["eta_s"] is None
    progress.tell(BuildProgress("prefill", 300, 1000, 7.0))
    assert (progress.to_json()["tokens_per_s"], progress.to_json()["eta_s"]) == (100.0, 7.0)
    progress.tell(BuildProgress("basis", 5000, 90_000, 15.0))  # tokens of other texts
    found = progress.to_json()
    assert (found["stage"], found["done_tokens"], found["total_tokens"]) == ("basis", 300, 1000)
    progress.tell(BuildProgress("encode", 0, 1000, 20.0))
    assert progress.to_json() == {
        "stage": "encode",
        "done_tokens": 300,
        "total_tokens": 1000,
        "tokens_per_s": 100.0,
        "eta_s": None,
    }


def test_documents_are_read_as_from_files():
    report = read_documents([{"doc_id": "a", "text": "# Gate\nText\n", "path": "p"}])
    (document,) = report.documents
    assert (document.doc_id, document.title, document.path, document.text) == ("a", "Gate", "p", "# Gate\nText")
