"""`/v1/caches`: list, get, ask, patch, delete."""

import asyncio
import json

import pytest

from cag.describe import describe_cache
from cag.errors import UsageError
from cag.server import service as service_module
from cag.server.errors import MAX_MESSAGE, error_facts
from cag_store.errors import CorruptEntry, EntryNotFound

FIDELITY = {"mean_kl", "mean_kl_se", "p95_kl", "top1", "num_probes", "nll_change", "probes", "method"}

pytestmark = pytest.mark.anyio

ROW = {
    "name",
    "digest",
    "created_at",
    "num_tokens",
    "num_documents",
    "model",
    "codec",
    "raw_bytes",
    "stored_bytes",
    "raw_over_stored",
    "state_bytes",
    "fidelity",
    "warnings",
    "pinned",
    "expires_at",
    "resident",
}
WHOLE = (ROW - {"resident"}) | {"codec_choice", "documents"}


async def test_the_list_has_one_row_a_cache(serving, engine):
    async with serving() as served:
        before = (await served.client.get("/v1/caches")).json()
        await served.client.post("/v1/caches/manual/ask", json={"question": "Who?", "max_tokens": 1})
        after = (await served.client.get("/v1/caches")).json()
    rows = {row["name"]: row for row in after["data"]}
    assert all(set(row) == ROW for row in before["data"] + after["data"])
    assert [row["resident"] for row in before["data"]] == [False, False]
    assert {name: row["resident"] for name, row in rows.items()} == {"handbook": False, "manual": True}
    manifest = engine.find("manual")[1]
    whole = describe_cache(*engine.find("manual"))
    assert {field: rows["manual"][field] for field in rows["manual"] if field != "resident"} == {
        field: json.loads(json.dumps(whole[field])) for field in ROW if field != "resident"
    }
    assert rows["manual"]["num_tokens"] == manifest.num_tokens
    assert rows["manual"]["fidelity"] == dict(manifest.fidelity)
    assert rows["manual"]["raw_over_stored"] == manifest.raw_bytes / manifest.stored_bytes
    assert after["damaged"] == []


async def test_a_damaged_cache_is_listed_apart(serving, engine, copy_of):
    copy_of("manual", "torn")
    next(engine.store.backend.root.rglob("torn.json")).write_bytes(b"{")
    async with serving() as served:
        listed = (await served.client.get("/v1/caches")).json()
        models = (await served.client.get("/v1/models")).json()
    assert [row["name"] for row in listed["data"]] == ["handbook", "manual"]
    assert [row["name"] for row in listed["damaged"]] == ["torn"]
    assert [model["id"] for model in models["data"]] == ["handbook", "manual"]


async def test_one_cache_is_described_in_full(serving, engine):
    async with serving() as served:
        whole = (await served.client.get("/v1/caches/handbook")).json()
        missing = await served.client.get("/v1/caches/nobody")
    assert set(whole) == WHOLE
    assert set(whole["model"]) == {"id", "fingerprint"}
    assert set(whole["documents"][0]) == {"doc_id", "title", "path", "sha256", "start", "end"}
    assert set(whole["fidelity"]) == FIDELITY
    assert whole == json.loads(json.dumps(describe_cache(*engine.find("handbook"))))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "cache_not_found")


async def test_a_codec_that_was_chosen_is_explained(serving, engine, tmp_path):
    (tmp_path / "gamma.txt").write_text("The gamma lamp burns for 900 hours and is changed by two people.\n")
    report = engine.build([tmp_path / "gamma.txt"], name="chosen", codec="auto")
    try:
        async with serving() as served:
            whole = (await served.client.get("/v1/caches/chosen")).json()
    finally:
        engine.store.remove("chosen")
    assert whole["codec_choice"] == report.codec_choice
    assert whole["codec"] == report.codec
    assert whole["fidelity"] == report.fidelity.to_json()


async def test_ask_gives_the_object_of_the_command_line(serving, engine):
    alone = engine.ask("handbook", "When?", max_tokens=8).to_json()
    request = {"question": "When?", "max_tokens": 8}
    async with serving() as served:
        answer = (await served.client.post("/v1/caches/handbook/ask", json=request)).json()
        stream = await served.client.post("/v1/caches/handbook/ask", json=request | {"stream": True})
    timings = {"timings": None, "cache": None}
    assert answer | timings == alone | timings
    assert set(answer["timings"]) == set(alone["timings"])
    *tokens, last = (part.split("\n") for part in stream.text.strip().split("\n\n"))
    assert {name for name, _ in tokens} == {"event: token"}
    assert "".join(json.loads(data.removeprefix("data: "))["text"] for _, data in tokens) == alone["answer"]
    assert last[0] == "event: answer"
    assert json.loads(last[1].removeprefix("data: ")) | timings == alone | timings


@pytest.mark.parametrize("body", [{}, {"question": 1}, {"question": "a", "tokens": 1}, {"question": "  "}])
async def test_ask_is_strict(serving, body):
    async with serving() as served:
        response = await served.client.post("/v1/caches/handbook/ask", json=body)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


async def test_patch_pins_and_lets_expire(serving, engine, copy_of):
    copy_of("manual", "patched")
    url = "/v1/caches/patched"
    async with serving() as served:
        pinned = (await served.client.patch(url, json={"pinned": True})).json()
        timed = (await served.client.patch(url, json={"ttl_s": 3600, "pinned": False})).json()
        engine.store.set_ttl("patched", -1)
        expired = await served.client.get(url)
        revived = (await served.client.patch(url, json={"ttl_s": None})).json()
        refused = [
            (await served.client.patch(url, json=body)).status_code
            for body in ({}, {"ttl_s": 0}, {"ttl_s": 1e300}, {"pinned": "maybe"}, {"pin": True})
        ]
        missing = await served.client.patch("/v1/caches/nobody", json={"pinned": True})
    assert (pinned["pinned"], pinned["expires_at"]) == (True, None)
    assert timed["pinned"] is False
    assert timed["expires_at"] is not None
    assert expired.status_code == 404
    assert revived["expires_at"] is None
    assert refused == [400] * 5
    assert missing.status_code == 404


async def test_delete_forgets_the_name_and_closes_the_cache(serving, copy_of):
    copy_of("manual", "doomed")
    async with serving(preload=("doomed",)) as served:
        await served.client.post("/v1/caches/doomed/ask", json={"question": "Who?", "max_tokens": 1})
        assert served.service.caches.num_resident == 1
        deleted = await served.client.delete("/v1/caches/doomed")
        assert served.service.caches.num_resident == 0
        again = await served.client.delete("/v1/caches/doomed")
        ask = await served.client.post("/v1/caches/doomed/ask", json={"question": "Who?"})
    assert deleted.json() == {"name": "doomed", "deleted": True}
    assert (again.status_code, ask.status_code) == (404, 404)


async def test_delete_takes_pinned_caches_by_force_only(serving, engine, copy_of):
    copy_of("manual", "kept")
    engine.store.pin("kept")
    async with serving() as served:
        await served.client.post("/v1/caches/kept/ask", json={"question": "Who?", "max_tokens": 1})
        refused = [await served.client.delete(f"/v1/caches/kept{query}") for query in ("", "?force=false")]
        assert served.service.caches.num_resident == 1
        assert engine.store.ref("kept").pinned
        strange = await served.client.delete("/v1/caches/kept?force=perhaps")
        deleted = await served.client.delete("/v1/caches/kept?force=true")
        assert served.service.caches.num_resident == 0
    assert [(reply.status_code, reply.json()["error"]["code"]) for reply in refused] == [(409, "entry_pinned")] * 2
    assert strange.status_code == 400
    assert deleted.json() == {"name": "kept", "deleted": True}
    with pytest.raises(EntryNotFound):
        engine.store.ref("kept")


async def test_a_cache_that_was_removed_elsewhere_is_closed_by_the_next_request(serving, engine, copy_of):
    copy_of("manual", "removed")
    async with serving() as served:
        request = {"question": "Who?", "max_tokens": 1}
        await served.client.post("/v1/caches/removed/ask", json=request)
        engine.store.remove("removed")
        response = await served.client.post("/v1/caches/removed/ask", json=request)
        assert (response.status_code, served.service.caches.num_resident) == (404, 0)


async def test_a_cache_without_one_of_its_files_is_damaged_not_unknown(serving, engine, tmp_path, caplog):
    (tmp_path / "delta.txt").write_text("The delta valve opens at 3 bar.\n")
    engine.build([tmp_path / "delta.txt"], name="holed")
    root, request = engine.store.backend.root, {"question": "When?", "max_tokens": 1}
    try:
        chunk = root / "chunks" / (key := engine.find("holed")[1].chunks[0].key)[:2] / key
        content = chunk.read_bytes()
        chunk.unlink()
        async with serving() as served:
            asked = await served.client.post("/v1/caches/holed/ask", json=request)
            chunk.write_bytes(content)
            healed = await served.client.post("/v1/caches/holed/ask", json=request)
    finally:
        engine.store.remove("holed")
    assert (asked.status_code, asked.json()["error"]["code"]) == (500, "corrupt_entry")
    assert str(root) not in asked.text
    assert key in caplog.text
    assert healed.status_code == 200


async def test_a_damaged_cache_is_not_changed_and_can_be_deleted(serving, engine, copy_of):
    digest = copy_of("manual", "torn")
    root = engine.store.backend.root
    manifest = root / "manifests" / digest[:2] / f"{digest}.json"
    content = manifest.read_bytes()
    manifest.rename(root / "aside")
    async with serving() as served:
        patched = await served.client.patch("/v1/caches/torn", json={"pinned": True})
        (root / "aside").rename(manifest)
        pinned = engine.store.ref("torn").pinned
        (root / "refs" / "torn.json").write_bytes(b"{")
        deleted = await served.client.delete("/v1/caches/torn")
    assert manifest.read_bytes() == content
    assert (patched.status_code, patched.json()["error"]["code"], pinned) == (500, "corrupt_entry", False)
    assert deleted.json() == {"name": "torn", "deleted": True}


async def test_errors_do_not_tell_where_the_store_lies(serving, engine, copy_of):
    copy_of("handbook", "broken")
    root = engine.store.backend.root
    (root / "refs" / "broken.json").write_text("{}")
    async with serving() as served:
        missing = (await served.client.get("/v1/caches/nix")).json()["error"]
        asked = (await served.client.post("/v1/caches/nix/ask", json={"question": "Who?"})).json()["error"]
        damaged = (await served.client.get("/v1/caches")).json()["damaged"]
    assert missing["message"] == asked["message"] == "no cache is called 'nix'."
    assert [row["name"] for row in damaged] == ["broken"]
    assert str(root) not in json.dumps([missing, damaged])


@pytest.mark.parametrize("text", ["/" * 2_000_000, "a/" * 1_000_000, "/chunks" * 300_000])
def test_a_message_is_looked_through_once_and_cut(text):
    assert len(error_facts(UsageError(text)).message) <= MAX_MESSAGE


def test_each_place_in_a_message_is_left_out():
    error = CorruptEntry("no /srv/a b/chunks/ab, s3://bucket/x/blobs/cd: see docs/format.md and gs://b/refs/n.json")
    assert error_facts(error).message == "no chunks/ab, blobs/cd: see docs/format.md and refs/n.json"


@pytest.mark.parametrize("place", ["/srv/my caches/store", "s3://bucket/a/b", "/s"])
def test_places_are_left_out_of_messages(place):
    error = CorruptEntry(f"{place}/chunks/ab/abc: the header is damaged; build the cache again")
    assert error_facts(error).message == "chunks/ab/abc: the header is damaged; build the cache again"


@pytest.mark.parametrize("how", ["expired", "removed", "built again"])
async def test_what_a_name_does_not_mean_any_more_leaves_the_memory_unasked(how, serving, engine, copy_of, monkeypatch):
    monkeypatch.setattr(service_module, "SWEEP_S", 0.01)
    monkeypatch.setattr(service_module, "CHECK_CACHES_S", 0.01)
    copy_of("manual", "outdated")
    leases = len(engine.store.backend.live_leases())
    async with serving(preload=("outdated", "handbook")) as served:
        while served.service.preloading:
            await asyncio.sleep(0)
        if how == "expired":
            engine.store.set_ttl("outdated", -1)
        elif how == "removed":
            engine.store.remove("outdated")
        else:
            copy_of("handbook", "outdated")
        async with asyncio.timeout(60):
            while served.service.caches.num_resident > 1:
                await asyncio.sleep(0.01)
        assert len(engine.store.backend.live_leases()) == leases + 1
        rows = {row["name"]: row for row in (await served.client.get("/v1/caches")).json()["data"]}
        assert rows["handbook"]["resident"]
