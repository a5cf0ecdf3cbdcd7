"""Probes, metrics, API keys, limits and the shape of every error."""

import asyncio

import anyio
import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from cag.errors import QueueFull
from cag.server import ServerSettings
from cag.server.running import EdgeTrimmer
from cag.server.slots import Slots

pytestmark = pytest.mark.anyio
PAGE = "https://chat.example.org"


async def test_ready_once_the_preloaded_caches_are_resident(serving, engine, monkeypatch):
    may_open, open_cache = asyncio.Event(), engine.open
    loop = asyncio.get_running_loop()

    def held_back(name, **how):
        asyncio.run_coroutine_threadsafe(may_open.wait(), loop).result()
        return open_cache(name, **how)

    monkeypatch.setattr(engine, "open", held_back)
    async with serving(preload=("handbook", "manual")) as served:
        assert (await served.client.get("/healthz")).json() == {"status": "ok"}
        early = await served.client.get("/readyz")
        assert (early.status_code, early.json()) == (503, {"status": "loading", "caches": ["handbook", "manual"]})
        may_open.set()
        while served.service.preloading:
            await asyncio.sleep(0)
        late = await served.client.get("/readyz")
        assert (late.status_code, late.json()["status"]) == (200, "ready")
        listed = (await served.client.get("/v1/caches")).json()["data"]
        assert [row["resident"] for row in listed] == [True, True]
        answer = await served.client.post("/v1/caches/manual/ask", json={"question": "Who?", "max_tokens": 1})
        assert answer.json()["cache"]["tier"] == "device"


async def test_a_preload_that_fails_is_not_ready_and_says_why(serving):
    async with serving(preload=("nobody", "manual")) as served:
        while served.service.preloading:
            await asyncio.sleep(0)
        ready = await served.client.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "failed")
        assert "nobody" in ready.json()["errors"]["nobody"]


async def test_tidying_up_goes_on_after_an_error_that_is_logged(serving, monkeypatch, caplog):
    monkeypatch.setattr("cag.server.service.SWEEP_S", 0.001)
    monkeypatch.setattr("cag.server.service.CHECK_CACHES_S", 0.0)
    tried = []

    def failing():
        tried.append(1)
        raise OSError("a disk that is gone")

    async with serving() as served:
        monkeypatch.setattr(served.service.caches, "drop_outdated", failing)
        with anyio.fail_after(60):
            while len(tried) < 3:
                await asyncio.sleep(0.001)
    assert "a disk that is gone" in caplog.text
    assert "Traceback" in caplog.text


async def test_a_preload_that_failed_is_tried_again_until_it_loads(serving, engine, copy_of, monkeypatch):
    monkeypatch.setattr("cag.server.service.RETRY_PRELOAD_S", 0.001)
    open_cache, broken = engine.open, True

    def fails_first(name, **how):
        if broken:
            raise RuntimeError("secret path")
        return open_cache(name, **how)

    monkeypatch.setattr(engine, "open", fails_first)
    async with serving(preload=("manual", "later")) as served:
        while set(served.service.preload_errors) != {"manual", "later"}:
            await asyncio.sleep(0)
        failed = await served.client.get("/readyz")
        assert (failed.status_code, failed.json()["status"]) == (503, "failed")
        assert "secret" not in failed.text
        broken = False
        copy_of("manual", "later")
        while served.service.preload_errors:
            await asyncio.sleep(0)
        assert (await served.client.get("/readyz")).json()["status"] == "ready"
        assert served.service.caches.num_resident == 2


async def test_probes_answer_those_who_want_no_body(serving):
    async with serving() as served:
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await served.client.head(path)).status_code == 200


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic one", "Bearer öne"])
async def test_without_a_key_nothing_under_v1_is_told(serving, header):
    headers = {"Authorization": header.encode()} if header else {}
    async with serving(api_keys=("one", "two")) as served:
        for method, path in [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/v1/nothing")]:
            response = await served.client.request(method, path, headers=headers, content=b"{")
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        assert (await served.client.get("/healthz", headers=headers)).status_code == 200


@pytest.mark.parametrize("key", ["one", "two"])
async def test_each_key_opens(serving, key):
    async with serving(api_keys=("one", "two")) as served:
        response = await served.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/caches", "GET, POST"),
        ("/v1/caches/handbook", "DELETE, GET, PATCH"),
        ("/v1/sessions/none", "DELETE, GET"),
        ("/v1/chat/completions", "POST"),
        ("/healthz", "GET, HEAD"),
    ],
)
async def test_a_method_that_is_not_allowed_is_told_those_that_are(serving, path, allowed):
    async with serving() as served:
        response = await served.client.put(path)
    assert (response.status_code, response.headers["allow"]) == (405, allowed)


async def test_errors_are_described_as_they_are_sent(serving):
    async with serving() as served:
        described = (await served.client.get("/openapi.json")).json()
    for path in described["paths"].values():
        for operation in path.values():
            assert not {"422"} & operation["responses"].keys()
            schema = operation["responses"]["4XX"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}
    fields = described["components"]["schemas"]["ErrorFields"]["properties"]
    assert fields.keys() == {"message", "type", "code", "param"}


async def test_errors_of_routing_and_parsing_have_the_same_shape(serving):
    async with serving(max_body_bytes=1000) as served:
        client = served.client
        json_type = {"content-type": "application/json"}

        async def endless():
            for _ in range(3):
                yield b" " * 500

        responses = [
            await client.get("/v1/nothing"),
            await client.put("/v1/models"),
            await client.post("/v1/chat/completions", content=b"{", headers=json_type),
            await client.post("/v1/chat/completions", content=b'{"model": "\xff"}', headers=json_type),
            await client.post("/v1/chat/completions", content=b" " * 2000, headers=json_type),
            await client.post("/v1/chat/completions", content=endless(), headers=json_type),
        ]
    told = [(response.status_code, response.json()["error"]["code"]) for response in responses]
    invalid, too_large = (400, "invalid_request"), (413, "request_entity_too_large")
    assert told == [(404, "not_found"), (405, "method_not_allowed"), invalid, invalid, too_large, too_large]
    for response in responses:
        assert set(response.json()) == {"error"}
        assert set(response.json()["error"]) == {"message", "type", "code", "param"}


@pytest.mark.parametrize(
    ("content", "content_type", "said"),
    [
        (b'{"model": ', "application/json", "no JSON: Expecting value at "),
        (b"", "application/json", "the body must be a JSON object"),
        (b"[]", "application/json", "the body must be a JSON object"),
        (b"{}", "text/plain", "`Content-Type: application/json`"),
    ],
)
async def test_a_body_that_is_no_object_is_told_what_it_should_be(serving, content, content_type, said):
    async with serving() as served:
        response = await served.client.post(
            "/v1/chat/completions", content=content, headers={"content-type": content_type}
        )
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


async def test_of_many_mistakes_a_few_are_told(serving):
    async with serving() as served:
        body = {"question": "Who?"} | {f"field_{number}": 1 for number in range(20)}
        response = await served.client.post("/v1/caches/manual/ask", json=body)
    message = response.json()["error"]["message"]
    assert message.startswith("field_0: ")
    assert message.endswith("; and 12 more")


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("chat/completions", {"model": "manual", "messages": [{}] * 1000}, {"messages[0].role", "messages[0].content"}),
        ("chat/completions", {"model": "manual", "messages": [{"role": "user", "content": ""}] * 10_001}, {"messages"}),
        ("caches", {"name": "new", "documents": [{}] * 1000}, {"documents[0].text"}),
        ("caches/manual/ask", {"question": "Who?"} | {f"field_{number}": 1 for number in range(1000)}, {None}),
    ],
)
async def test_a_body_of_mistakes_is_not_read_to_its_end(serving, path, body, told):
    """Each would be noted before the first is told, on the thread that serves everybody."""
    async with serving() as served:
        response = await served.client.post(f"/v1/{path}", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_request")
    places = {mistake.partition(": ")[0] for mistake in error["message"].split("; ")} if error["param"] else {None}
    assert places == told


async def test_an_unexpected_error_tells_nothing_of_itself(serving, engine, monkeypatch):
    """And it is counted, and a page may read it, as any other answer."""

    def broken():
        raise RuntimeError("secret path")

    monkeypatch.setattr(engine.store, "names", broken)
    async with serving(cors_origins=(PAGE,)) as served:
        response = await served.client.get("/v1/models", headers={"Origin": PAGE})
        metrics = await served.client.get("/metrics")
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert 'cag_http_requests_total{method="GET",route="/v1/models",status="500"} 1' in metrics.text.splitlines()


async def test_metrics_count_what_happened(serving):
    async with serving() as served:
        request = {"question": "Who?", "max_tokens": 2}
        usage = (await served.client.post("/v1/caches/manual/ask", json=request)).json()["usage"]
        await served.client.post("/v1/caches/nobody/ask", json=request)
        await served.client.get("/wp-admin")
        response = await served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert f'cag_prompt_tokens_total{{source="cached"}} {usage["cached_tokens"]}' in lines
    assert f'cag_prompt_tokens_total{{source="computed"}} {usage["computed_tokens"]}' in lines
    assert "cag_completion_tokens_total 2" in lines
    assert 'cag_answers_total{outcome="answered"} 1' in lines
    assert 'cag_answers_total{outcome="refused"} 1' in lines
    route = "/v1/caches/{name}/ask"
    assert f'cag_http_requests_total{{method="POST",route="{route}",status="200"}} 1' in lines
    assert 'cag_http_requests_total{method="GET",route="unmatched",status="404"} 1' in lines
    assert "cag_time_to_first_token_seconds_count 1" in lines
    assert 'cag_time_to_first_token_seconds_bucket{le="+Inf"} 1' in lines
    assert "cag_resident_caches 1" in lines
    grown = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE")}
    assert all((kind == "counter") is name.endswith("_total") for name, kind in grown.items())
    assert {"cag_step_rows_total", "cag_evicted_caches_total"} <= set(grown)


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError):
        ServerSettings(slots=3)
    assert "sk-hidden" not in repr(ServerSettings(api_keys=("sk-hidden",)))


async def test_retry_after_follows_how_long_answers_take():
    slots = Slots(2, 8)
    assert slots.retry_after_s == 1
    for _ in range(40):
        await slots.acquire("")
        slots.release(10.0)
    assert slots.retry_after_s == 5
    for _ in range(40):
        await slots.acquire("")
        slots.release(1000.0)
    assert slots.retry_after_s == 60


async def until_waiting(slots, number):
    while slots.waiting < number:
        await asyncio.sleep(0)


async def test_tenants_have_slots_in_turn_and_queues_of_their_own():
    slots, order = Slots(1, 3), []
    await slots.acquire("a")

    async def wait(tenant, number):
        await slots.acquire(tenant)
        order.append((tenant, number))
        slots.release(1.0)

    waits = [asyncio.create_task(wait("a", number)) for number in range(3)]
    await until_waiting(slots, 3)
    with pytest.raises(QueueFull, match="queue of 3"):
        await slots.acquire("a")
    waits += [asyncio.create_task(wait("b", number)) for number in range(2)]
    await until_waiting(slots, 5)
    slots.release(1.0)
    await asyncio.gather(*waits)
    assert order == [("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 2)]
    assert (slots.running, slots.waiting) == (0, 0)


async def test_who_gives_up_as_the_slot_comes_passes_it_on():
    slots = Slots(1, 3)
    await slots.acquire("a")
    first, second = [asyncio.create_task(slots.acquire("a")) for _ in range(2)]
    await until_waiting(slots, 2)
    slots.release(1.0)  # it is the first one's, which has not run yet
    first.cancel()
    await asyncio.wait_for(second, 60)
    assert first.cancelled() and (slots.running, slots.waiting) == (1, 0)
    slots.release(1.0)
    assert slots.running == 0


@pytest.mark.parametrize("whole", ["", "  ", " a ", "a b", "\n a  b \n\n c\t", "ab"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_trimmed_pieces_join_to_the_stripped_text(whole, size):
    trim = EdgeTrimmer()
    pieces = [trim(whole[start : start + size]) for start in range(0, len(whole), size)]
    assert "".join(pieces) == whole.strip()


PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


@pytest.mark.parametrize("mounted", [False, True])
async def test_pages_of_the_chosen_origins_may_ask_from_a_browser(serving, mounted):
    """Preflights carry no key; a refusal for want of one can be read by the page, too."""
    async with serving(api_keys=("sk-one",), cors_origins=(PAGE,), max_body_bytes=100) as served:
        outer = FastAPI()
        outer.mount("/behind", served.app)
        prefix, app = ("/behind", outer) if mounted else ("", served.app)
        url, key = f"{prefix}/v1/chat/completions", {"Authorization": "Bearer sk-one"}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
            before = await client.options(url, headers=PREFLIGHT)
            listed = await client.get(f"{prefix}/v1/models", headers=key | {"Origin": PAGE})
            keyless = await client.get(f"{prefix}/v1/models", headers={"Origin": PAGE})
            too_long = await client.post(url, headers=key | {"Origin": PAGE}, content=b" " * 200)
            stranger = await client.get(f"{prefix}/v1/models", headers=key | {"Origin": "https://else.example.org"})
            asks = await client.options(url, headers=PREFLIGHT | {"Origin": "https://else.example.org"})
    answers = [before, listed, keyless, too_long, stranger, asks]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 413, 200, 400]
    allowed = [answer.headers.get("Access-Control-Allow-Origin") for answer in answers]
    assert allowed == [PAGE, PAGE, PAGE, PAGE, None, None]
    assert "x-stainless-lang" in before.headers["Access-Control-Allow-Headers"]
    assert "Retry-After" in listed.headers["Access-Control-Expose-Headers"]


async def test_no_page_may_ask_when_no_origin_is_chosen(serving):
    async with serving() as served:
        before = await served.client.options("/v1/chat/completions", headers=PREFLIGHT)
        listed = await served.client.get("/v1/models", headers={"Origin": PAGE})
    assert before.status_code == 405
    assert not [name for answer in (before, listed) for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "origin", ["https://a.example/", "https://A.example", "a.example", "https://u@a", "", "https://"]
)
def test_what_no_browser_sends_as_an_origin_is_refused(origin):
    with pytest.raises(ValidationError, match="is no origin"):
        ServerSettings(cors_origins=(PAGE, origin))


def test_origins_as_browsers_send_them():
    origins = ("*", "http://localhost:3000", "http://[::1]:5173", "chrome-extension://abc")
    assert ServerSettings(cors_origins=origins).cors_origins == origins
