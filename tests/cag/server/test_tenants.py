"""Tenants: each key sees the caches of its own, and nothing of the others'."""

import asyncio
from functools import partial

import httpx
import pytest
from fastapi import FastAPI, Request
from pydantic import ValidationError

from cag.errors import UsageError
from cag.server import ServerSettings, create_app
from cag.server.tenants import read_tenant_keys, store_location, tenant_of
from cag_store import Store
from cag_store.errors import InvalidName

pytestmark = pytest.mark.anyio
KEYS = {"acme": ("key-a", "key-a2"), "beta": ("key-b",)}
ASK = {"question": "When does the gate open?", "max_tokens": 4}


def key(value):
    return {"Authorization": f"Bearer {value}"}


@pytest.fixture
def tenants(engine, serving, tmp_path):
    """A server over the operator's caches and those of two tenants: `acme` has a `handbook`, `beta` a `manual`."""
    for tenant, name in (("acme", "handbook"), ("beta", "manual")):
        engine.export_cache(name, store_location(str(tmp_path), tenant))
    return partial(serving, api_keys=("key-o",), tenant_keys=KEYS, tenant_stores=str(tmp_path))


async def names(client, value, path="/v1/caches"):
    rows = (await client.get(path, headers=key(value))).json()["data"]
    return sorted(row.get("name", row.get("id")) for row in rows)


async def test_a_key_sees_its_own_caches(tenants):
    async with tenants() as served:
        for path in ("/v1/caches", "/v1/models"):
            assert await names(served.client, "key-a", path) == await names(served.client, "key-a2", path)
            assert await names(served.client, "key-a", path) == ["handbook"]
            assert await names(served.client, "key-b", path) == ["manual"]
            assert await names(served.client, "key-o", path) == ["handbook", "manual"]
        assert (await served.client.get("/v1/caches", headers=key("key-c"))).status_code == 401
        assert (await served.client.get("/v1/caches")).status_code == 401


async def test_what_is_anothers_is_as_if_it_were_not_there(tenants):
    async with tenants() as served:
        client = served.client
        for name in ("manual", "nobody"):
            chat = {"model": name, "messages": [{"role": "user", "content": "Who?"}]}
            answers = [
                await client.get(f"/v1/caches/{name}", headers=key("key-a")),
                await client.get(f"/v1/models/{name}", headers=key("key-a")),
                await client.patch(f"/v1/caches/{name}", json={"pinned": True}, headers=key("key-a")),
                await client.delete(f"/v1/caches/{name}", headers=key("key-a")),
                await client.post(f"/v1/caches/{name}/ask", json=ASK, headers=key("key-a")),
                await client.post("/v1/chat/completions", json=chat, headers=key("key-a")),
            ]
            bodies = [(answer.status_code, answer.json()["error"]["message"]) for answer in answers]
            cache = (404, f"no cache is called '{name}'.")
            model = (404, f"the model '{name}' does not exist: no cache is called '{name}'.")
            assert bodies == [cache, model, cache, cache, cache, model]
        assert await names(client, "key-b") == ["manual"]


async def test_sessions_are_the_tenants(tenants):
    async with tenants() as served:
        client = served.client
        opened = (await client.post("/v1/caches/handbook/sessions", headers=key("key-a"))).json()
        path = f"/v1/sessions/{opened['id']}"
        for value, status in (("key-a", 200), ("key-a2", 200), ("key-b", 404), ("key-o", 404)):
            assert (await client.get(path, headers=key(value))).status_code == status
            assert (await client.post(f"{path}/ask", json=ASK, headers=key(value))).status_code == status
        assert (await client.get("/v1/sessions", headers=key("key-b"))).json()["data"] == []
        assert (await client.delete(path, headers=key("key-b"))).status_code == 404
        assert (await client.delete(path, headers=key("key-a"))).status_code == 200


async def test_jobs_are_the_tenants(tenants):
    async with tenants() as served:
        client, order = served.client, {"name": "new", "documents": [{"text": "The epsilon lamp is red.\n"}]}
        job = (await client.post("/v1/caches", json=order, headers=key("key-a"))).json()
        path = f"/v1/jobs/{job['id']}"
        while (found := (await client.get(path, headers=key("key-a"))).json())["finished_at"] is None:
            await asyncio.sleep(0.01)
        assert found["status"] == "succeeded"
        assert await names(client, "key-a") == ["handbook", "new"]
        assert await names(client, "key-b") == ["manual"]
        for value in ("key-b", "key-o"):
            assert (await client.get(path, headers=key(value))).status_code == 404
            assert (await client.post(f"{path}/cancel", headers=key(value))).status_code == 404
            assert (await client.get("/v1/jobs", headers=key(value))).json()["data"] == []


async def test_equal_names_are_different_caches(tenants, engine):
    async with tenants() as served:
        client = served.client
        answers = [
            (await client.post("/v1/caches/handbook/ask", json=ASK, headers=key(value))).json()
            for value in ("key-o", "key-a")
        ]
        assert answers[0]["answer"] == answers[1]["answer"]  # the same documents
        assert served.service.caches.num_resident == 2
        assert (await client.delete("/v1/caches/handbook", headers=key("key-a"))).status_code == 200
        assert served.service.caches.num_resident == 1
        assert await names(client, "key-a") == []
        assert "handbook" in engine.store.names()


async def test_one_limit_holds_for_all_tenants(tenants):
    async with tenants() as free:
        for value, name in (("key-a", "handbook"), ("key-b", "manual")):
            await free.client.post(f"/v1/caches/{name}/ask", json=ASK, headers=key(value))
        limit = free.service.caches.num_bytes - 1
    async with tenants(max_resident_bytes=limit) as served:
        for value, name in (("key-a", "handbook"), ("key-b", "manual")):
            answer = await served.client.post(f"/v1/caches/{name}/ask", json=ASK, headers=key(value))
            assert answer.status_code == 200
            assert served.service.caches.num_resident == 1


async def test_a_tenants_cache_can_be_preloaded(tenants):
    async with tenants(preload=("acme/handbook",)) as served:
        while (await served.client.get("/readyz")).status_code != 200:
            assert not served.service.preload_errors
            await asyncio.sleep(0.01)
        assert served.service.caches.num_resident == 1


async def test_probes_name_no_cache_of_a_tenant(tenants):
    async with tenants() as served:
        await served.client.post("/v1/caches/handbook/ask", json=ASK, headers=key("key-a"))
        for path in ("/healthz", "/readyz", "/metrics"):
            text = (await served.client.get(path)).text
            assert "acme" not in text and "handbook" not in text


@pytest.mark.parametrize("names", [("acme/plans",), ("acme/plans", "plans")])
async def test_ready_counts_the_missing_caches_of_tenants_and_names_none(names, tenants, monkeypatch):
    monkeypatch.setattr("cag.server.service.RETRY_PRELOAD_S", 60.0)
    async with tenants(preload=names) as served:
        while served.service.preloading:
            assert "acme" not in (await served.client.get("/readyz")).text
            await asyncio.sleep(0.01)
        ready = await served.client.get("/readyz")
        assert ready.status_code == 503 and "acme" not in ready.text
        assert ready.json()["tenant_caches"] == 1
        assert list(ready.json()["errors"]) == [name for name in names if name == "plans"]


@pytest.mark.parametrize("root_path", ["", "/behind"])
async def test_a_mounted_server_asks_for_keys_too(tenants, root_path):
    """A proxy's prefix, or an application around it, changes paths and opens nothing."""
    async with tenants() as served:
        outer = FastAPI()
        outer.mount("/behind", served.app)
        mounted = httpx.ASGITransport(outer) if not root_path else httpx.ASGITransport(served.app, root_path=root_path)
        async with httpx.AsyncClient(transport=mounted, base_url="http://t") as client:
            assert (await client.get("/behind/v1/caches")).status_code == 401
            assert await names(client, "key-a", "/behind/v1/caches") == ["handbook"]


def test_a_request_that_no_key_was_asked_of_is_nobodys():
    with pytest.raises(KeyError):
        tenant_of(Request({"type": "http"}))


async def test_tenants_alone_leave_no_door_open(engine, tmp_path):
    settings = ServerSettings(tenant_keys=KEYS, tenant_stores=str(tmp_path))
    assert not settings.is_open
    app = create_app(engine, settings=settings)
    transport = httpx.ASGITransport(app)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://t") as client:
        assert (await client.get("/v1/caches")).status_code == 401
        assert await names(client, "key-a") == []
    assert Store.open(store_location(str(tmp_path), "acme")).names() == []


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tenant_keys": {"a": ("x",), "b": ("x",)}, "tenant_stores": "/s"}, "given twice"),
        ({"tenant_keys": {"a": ("x",)}, "api_keys": ("x",), "tenant_stores": "/s"}, "given twice"),
        ({"tenant_keys": {"a": ("",)}, "tenant_stores": "/s"}, "is empty"),
        ({"tenant_keys": {"a": ("x",)}}, "need a place"),
        ({"tenant_keys": {"a": ("x",), "A": ("y",)}, "tenant_stores": "/s"}, "differ by case"),
        ({"tenant_keys": {"a": ("x",)}, "tenant_stores": "/s", "preload": ("b/plans",)}, "no such tenant"),
    ],
)
def test_keys_that_would_open_the_wrong_door_are_refused(settings, text):
    with pytest.raises(ValidationError, match=text):
        ServerSettings(**settings)


def test_keys_are_read_from_a_file(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text('# ours\nacme = "key-a"\n"beta.2" = ["key-b", "key-c"]\n')
    found = {tenant: [value.get_secret_value() for value in keys] for tenant, keys in read_tenant_keys(path).items()}
    assert found == {"acme": ["key-a"], "beta.2": ["key-b", "key-c"]}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("acme = ", UsageError),
        ("acme = 5", UsageError),
        ("acme = []", UsageError),
        ('acme = ["key-secret", 5]', UsageError),
        ('[acme]\nkey = "key-secret"', UsageError),
        ('"../acme" = "key-secret"', InvalidName),
        ('acme = "key-secret"\nacme = "key-secret"', UsageError),
    ],
)
def test_a_damaged_file_of_keys_is_refused_without_showing_one(content, error, tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text(content)
    with pytest.raises(error) as raised:
        read_tenant_keys(path)
    assert "key-secret" not in str(raised.value)
    with pytest.raises(UsageError, match="cannot read"):
        read_tenant_keys(tmp_path / "absent.toml")
