"""`ls`, `show`, `verify`, `rm`, `gc`, `pin`, `unpin`, `expire`: fields, effects, damage that is said and not hidden."""

import os
import re
import shutil
import sys
from dataclasses import replace

import pytest

from cag.cli.output import print_table
from cag_store import Store

FIDELITY = {"mean_kl", "mean_kl_se", "p95_kl", "top1", "num_probes", "nll_change", "probes", "method"}

SHOWN = {
    "name", "digest", "created_at", "model", "num_tokens", "num_documents", "codec", "raw_bytes", "stored_bytes",
    "raw_over_stored", "state_bytes", "codec_choice", "fidelity", "warnings", "expires_at", "pinned", "documents",
}  # fmt: skip


def test_ls_lists_each_cache_with_its_facts(cag, book, tiny_model_dir):
    Store.open(book).commit("again", Store.open(book).resolve("book")[1])
    listed = cag("ls", "--store", book, "--json").json
    assert [cache["name"] for cache in listed["caches"]] == ["again", "book"]
    cache = listed["caches"][1]
    shown = cag("show", "book", "--store", book, "--json").json
    assert {field: cache[field] for field in SHOWN - {"documents", "codec_choice"}} == {
        field: shown[field] for field in SHOWN - {"documents", "codec_choice"}
    }
    assert cache["model"]["id"] == str(tiny_model_dir)
    assert (cache["num_documents"], cache["codec"]["id"]) == (2, "lossless")
    assert (cache["pinned"], cache["expires_at"], cache["expired"], cache["damaged"]) == (False, None, False, False)
    assert (cache["own_bytes"], cache["machine"]["device"]) == (0, "cpu")
    assert cache["shared_bytes"] > cache["stored_bytes"]
    assert cache["last_used_at"] >= cache["created_at"]
    totals = listed["totals"]
    assert totals == {"num_caches": 2, "held_bytes": cache["shared_bytes"], "total_bytes": cache["shared_bytes"]}


def test_ls_prints_a_row_a_cache(cag, book):
    header, row = cag("ls", "--store", book).stdout.splitlines()
    assert header.split() == [
        "name", "tokens", "documents", "model", "codec", "stored", "own", "ratio", "created", "machine", "used",
        "pinned", "expires",
    ]  # fmt: skip
    assert row.split()[0] == "book"


@pytest.mark.parametrize(("width", "left_out"), [("400", []), ("80", ["pinned", "expires", "machine"])])
def test_a_terminal_shows_the_columns_that_it_has_room_for(capsys, monkeypatch, width, left_out):
    columns = ("name", "model", "stored", "machine", "created", "pinned", "expires")
    row = ("handbook", "qwen2.5-coder-1.5b-instruct", "22.0 MB", "AMD EPYC " * 3, "2026-11-27T12:19:06Z", "", "")
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert print_table(columns, [row], spare=("machine", "created", "pinned", "expires")) == left_out
    header, line = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert header.split() == [column for column in columns if column not in left_out]
    assert line.split()[:2] == ["handbook", "qwen2.5-coder-1.5b-instruct"]


def test_ls_of_an_empty_store(cag, tmp_path):
    finished = cag("ls", "--store", tmp_path / "none")
    assert (finished.exit_code, finished.stdout) == (0, "")
    assert "cag build" in finished.stderr
    assert cag("ls", "--store", tmp_path / "none", "--json").json["caches"] == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("folder", ["refs", "manifests"])
def test_ls_lists_damaged_caches_as_damaged(cag, book, damage, folder):
    damage(folder)
    (cache,) = cag("ls", "--store", book, "--json").json["caches"]
    assert (cache["name"], cache["damaged"], cache["error"]["code"]) == ("book", True, "corrupt_entry")
    finished = cag("ls", "--store", book)
    assert "damaged" in finished.stdout
    assert "book: " in finished.stderr


def test_ls_says_what_has_expired(cag, book):
    Store.open(book).set_ttl("book", -1)
    assert cag("ls", "--store", book, "--json").json["caches"][0]["expired"] is True
    assert "(expired)" in cag("ls", "--store", book).stdout
    assert "`cag pin book`" in cag("show", "book", "--store", book, "--json").error["hint"]
    cag("pin", "book", "--store", book)
    assert cag("show", "book", "--store", book).exit_code == 0


def test_show_has_the_fields_of_the_contract(cag, book, corpus, tiny_model_dir):
    shown = cag("show", "book", "--store", book, "--json").json
    assert set(shown) == SHOWN
    assert set(shown["model"]) == {"id", "fingerprint"}
    assert set(shown["fidelity"]) == FIDELITY
    assert shown["codec"]["id"] == "lossless"
    assert [set(document) for document in shown["documents"]] == [
        {"doc_id", "title", "path", "sha256", "start", "end"}
    ] * 2
    assert shown["raw_over_stored"] == shown["raw_bytes"] / shown["stored_bytes"]


def test_show_says_when_a_loss_was_measured_at_too_few_positions(cag, tmp_path, tiny_model_dir):
    (tmp_path / "short.txt").write_text("Yes.")
    store = ("--store", tmp_path / "store")
    built = cag(
        "build", tmp_path / "short.txt", "--name", "short", "--codec", "int8", "--model", tiny_model_dir, *store
    )
    (warning,) = cag("show", "short", *store, "--json").json["warnings"]
    assert f"warning: {warning}" in built.stderr
    assert warning in cag("show", "short", *store).stdout


def test_show_prints_facts_and_documents(cag, book):
    printed = cag("show", "book", "--store", book).stdout
    assert "Alpha gate" in printed
    assert "alpha.md" in printed
    assert "lossless" in printed


def test_verify_says_what_was_read(cag, book):
    verified = cag("verify", "book", "--store", book, "--json")
    assert verified.exit_code == 0
    assert verified.json["ok"] is True
    assert verified.json["problems"] == []
    assert verified.json["num_blobs"] == 2
    size = sum(
        path.stat().st_size for folder in ("chunks", "blobs") for path in (book / folder).rglob("*") if path.is_file()
    )
    assert verified.json["bytes_read"] > size
    assert "whole" in cag("verify", "book", "--store", book).stdout


@pytest.mark.parametrize("folder", ["chunks", "blobs", "manifests", "refs"])
def test_verify_finds_damage_in_each_kind_of_file(cag, book, damage, folder):
    damage(folder)
    finished = cag("verify", "book", "--store", book, "--json")
    assert finished.exit_code == 52
    assert finished.json["ok"] is False
    assert finished.json["error"]["code"] == "corrupt_entry"
    assert len(finished.json["problems"]) >= 1
    printed = cag("verify", "book", "--store", book)
    assert printed.exit_code == 52
    assert printed.stderr.count("damage: ") == len(finished.json["problems"])


def test_rm_says_what_gc_will_free_and_gc_frees_it(cag, book):
    stored = Store.open(book).resolve("book")[1].stored_bytes
    removed = cag("rm", "book", "--store", book, "--json").json
    assert removed == {"name": "book", "removed": True, "freeable_bytes": stored}
    kept = cag("gc", "--store", book, "--json").json
    assert (kept["removed"], kept["kept_unreferenced"] > 0) == ([], True)
    planned = cag("gc", "--dry-run", "--grace-seconds", 0, "--store", book, "--json").json
    freed = cag("gc", "--grace-seconds", 0, "--store", book, "--json").json
    assert planned | {"dry_run": False} == freed
    assert freed["removed_bytes"] >= stored
    assert not [path for path in (book / "chunks").rglob("*") if path.is_file()]


def test_rm_counts_what_the_codec_needs(cag, book):
    store = Store.open(book)
    manifest, basis = store.resolve("book")[1], store.put_blob(os.urandom(5000))
    codec = {"id": "transform", "basis": basis, "joint_layers": 1, "step": 0, "exact_tokens": 4}
    blobs = [*manifest.blob_digests, basis]
    store.commit("book", replace(manifest, codec=codec, blob_bytes=store.blob_bytes(blobs)))
    removed = cag("rm", "book", "--store", book, "--json").json
    assert removed["freeable_bytes"] == store.blob_bytes(blobs) + sum(manifest.chunk_sizes.values())


def test_rm_counts_only_what_no_other_cache_holds(cag, book):
    Store.open(book).commit("again", Store.open(book).resolve("book")[1])
    assert cag("rm", "book", "--store", book, "--json").json["freeable_bytes"] == 0
    assert cag("verify", "again", "--store", book).exit_code == 0


def test_a_pinned_cache_is_removed_by_force_only(cag, book):
    assert cag("pin", "book", "--store", book, "--json").json["pinned"] is True
    refused = cag("rm", "book", "--store", book, "--json")
    assert (refused.exit_code, refused.error["code"]) == (2, "entry_pinned")
    assert "force" in refused.error["message"]
    assert cag("ls", "--store", book, "--json").json["caches"][0]["pinned"] is True
    assert cag("rm", "book", "--force", "--store", book).exit_code == 0


def test_expire_sets_when_a_cache_goes_and_takes_it_back(cag, book):
    before = cag("show", "book", "--store", book, "--json").json["created_at"]
    set_to = cag("expire", "book", "2w", "--store", book, "--json").json["expires_at"]
    assert before < set_to == cag("show", "book", "--store", book, "--json").json["expires_at"]
    assert f"expires at {set_to}, once it is unpinned" in cag("pin", "book", "--store", book).stdout
    cag("unpin", "book", "--store", book)
    Store.open(book).set_ttl("book", -1)
    finished = cag("expire", "book", "never", "--store", book)
    assert "not pinned and never expires" in finished.stdout
    assert cag("show", "book", "--store", book, "--json").json["expires_at"] is None


def test_unpin_lets_a_cache_go(cag, book):
    cag("pin", "book", "--store", book)
    assert cag("unpin", "book", "--store", book, "--json").json["pinned"] is False
    assert "not pinned" in cag("unpin", "book", "--store", book).stdout
    assert cag("rm", "book", "--store", book).exit_code == 0


@pytest.mark.parametrize("folder", ["refs", "manifests"])
def test_a_damaged_cache_can_be_removed(cag, book, damage, folder):
    damage(folder)
    removed = cag("rm", "book", "--store", book, "--json")
    assert (removed.exit_code, removed.json["freeable_bytes"]) == (0, None)
    assert cag("ls", "--store", book, "--json").json["caches"] == []


@pytest.mark.parametrize("folder", ["refs", "manifests"])
def test_a_flipped_bit_of_a_ref_or_manifest_is_refused_and_says_what_to_do(cag, book, folder):
    (path,) = (file for file in (book / folder).rglob("*") if file.is_file())
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 150)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        refused = cag("show", "book", "--store", book, "--json")
        assert refused.exit_code in (52, 53), position
        assert "build" in refused.error["message"]


def test_gc_removes_expired_caches_and_says_so(cag, book):
    Store.open(book).set_ttl("book", -1)
    printed = cag("gc", "--grace-seconds", 0, "--store", book).stdout
    assert "expired book" in printed
    assert "freed" in printed


def test_gc_evicts_down_to_a_size_and_explains_itself(cag, book):
    store = Store.open(book)
    store.commit("again", store.resolve("book")[1])
    store.pin("book")
    kept = cag("gc", "--max-bytes", "1kB", "--store", book, "--json").json
    assert (kept["evicted"], kept["over_bytes"] > 0) == ([], True)
    assert "pinned" in cag("gc", "--max-bytes", "1kB", "--store", book).stderr
    store.unpin("book")
    planned = cag("gc", "--max-bytes", "1kB", "--dry-run", "--store", book, "--json").json
    assert [eviction["name"] for eviction in planned["evicted"]] == ["again", "book"]
    assert planned["kept_bytes"] == 0
    assert set(planned["evicted"][0]) == {"name", "freed_bytes", "total_bytes", "idle_s", "rebuild_s", "worth"}
    assert store.names() == ["again", "book"]
    printed = cag("gc", "--max-bytes", "1kB", "--store", book).stdout
    assert printed.count("evicted ") == 2
    assert "to rebuild" in printed
    assert store.names() == []


def test_the_store_of_the_cache_home_is_the_default(cag, book, cag_home):
    shutil.copytree(book, cag_home / "store")
    try:
        assert cag("show", "book", "--json").json["name"] == "book"
    finally:
        shutil.rmtree(cag_home / "store")
