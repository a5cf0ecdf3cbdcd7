"""`build` and `update`: what they print, what they keep, what they refuse before a model is loaded."""

import json

import pytest

from cag_store import Store

BUILT = {
    "name", "digest", "num_documents", "num_tokens", "reused_tokens", "computed_tokens", "raw_bytes", "stored_bytes",
    "raw_over_stored", "fidelity", "prefill_s", "encode_s", "measure_s", "search_s", "total_s", "prefill_tokens_per_s",
    "duplicates", "empty", "skipped", "recomputed_tokens", "codec", "codec_choice", "max_kl",
    "added", "changed", "removed", "warnings",
}  # fmt: skip


@pytest.fixture
def build(cag, corpus, tiny_model_dir, tmp_path):
    def run(*options):
        return cag("build", corpus, "--name", "book", "--model", tiny_model_dir, "--store", tmp_path / "s", *options)

    return run


def test_build_reports_what_it_did(build, corpus):
    (corpus / "twin.txt").write_text((corpus / "relay.txt").read_text())
    (corpus / "void.txt").write_text("\n")
    (corpus / "picture.png").write_bytes(b"\x89PNG")
    built = build("--json")
    assert built.exit_code == 0
    assert set(built.json) >= BUILT
    assert (built.json["num_documents"], built.json["reused_tokens"]) == (2, 0)
    assert built.json["computed_tokens"] == built.json["num_tokens"]
    assert built.json["fidelity"]["mean_kl"] == 0
    for kind, name in {"duplicate": "twin.txt", "empty": "void.txt", "skipped": "picture.png"}.items():
        (line,) = [line for line in built.stderr.splitlines() if line.startswith(f"{kind}: ")]
        assert name in line


def test_build_prints_figures_and_progress(build):
    built = build()
    assert "reused, " in built.stdout
    assert "mean KL" in built.stdout
    assert "reading: " in built.stderr
    assert "tokens/s" in built.stderr


def test_a_second_build_reuses_everything(build):
    first, second = build("--json").json, build("--json").json
    assert second["reused_tokens"] == first["num_tokens"]
    assert second["computed_tokens"] == 0
    assert "0 computed" in build().stdout


def test_options_reach_the_cache(build, tmp_path):
    built = build("--codec", "int8", "--system", "Answer in French.", "--dtype", "float32", "--json").json
    manifest = Store.open(tmp_path / "s").resolve("book")[1]
    assert manifest.digest == built["digest"]
    assert manifest.codec["id"] == "int8"
    assert manifest.layout["system_text"] == "Answer in French."
    assert manifest.kv.compute_dtype == "float32"


def test_a_codec_can_be_named_with_its_parameters(build, cag, corpus, tmp_path):
    built = build("--codec", '{"id": "int4", "wide_key_layers": [1], "group_tokens": 32}', "--json").json
    codec = built["codec"]
    assert (codec["id"], codec["wide_key_layers"], codec["group_tokens"]) == ("int4", [1], 32)
    assert cag("update", "book", corpus, "--store", tmp_path / "s", "--json").json["codec"] == built["codec"]
    refused = build("--codec", '{"id": "int4", "wide_key_layers": [1, 2]}', "--json")
    assert (refused.exit_code, refused.error["code"]) == (2, "invalid_request")
    assert "layer 2" in refused.error["message"]


def test_int4_from_documents_to_an_answer(build, cag, corpus, tmp_path):
    (corpus / "log.txt").write_text(
        "".join(f"Entry {number}: the gauge reads {number * 37 % 101}.\n" for number in range(80))
    )
    at = ("--store", tmp_path / "s", "--json")
    built = build("--codec", "int4", "--json").json
    shown = cag("show", "book", *at).json
    assert (shown["codec"]["id"], shown["codec"]["recent_tokens"]) == ("int4", 32)
    assert shown["num_tokens"] > 100
    assert 0 < shown["fidelity"]["mean_kl"] == built["fidelity"]["mean_kl"]
    assert cag("verify", "book", *at).exit_code == 0
    answered = cag("ask", "book", "What does the gauge read?", "--max-tokens", 2, *at).json
    assert answered["usage"]["cached_tokens"] == shown["num_tokens"]
    lossless = build("--codec", "lossless", "--json").json
    assert shown["stored_bytes"] < lossless["stored_bytes"]


def test_the_model_is_kept_with_its_whole_path(cag, corpus, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_model_dir.parent)
    name = tiny_model_dir.name
    assert cag("build", corpus, "--name", "book", "--model", name, "--store", tmp_path / "s").exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert cag("ask", "book", "What?", "--max-tokens", 1, "--store", "s", "--json").json["model"] == str(tiny_model_dir)


def test_skip_errors_names_the_file_and_goes_on(build, corpus):
    (corpus / "broken.pdf").write_bytes(b"%PDF-1.4 no more")
    assert build("--json").exit_code == 22
    built = build("--skip-errors", "--json").json
    assert [path.rsplit("/", 1)[-1] for path, _ in built["skipped"]] == ["broken.pdf"]


def test_update_computes_from_the_first_change_on(cag, book, corpus):
    before = cag("show", "book", "--store", book, "--json").json
    (corpus / "zeta.txt").write_text("The zeta crane lifts nine tons.\n")
    updated = cag("update", "book", corpus, "--store", book, "--json").json
    assert updated["num_documents"] == 3
    assert 0 < updated["reused_tokens"] < before["num_tokens"]
    assert updated["reused_tokens"] + updated["computed_tokens"] == updated["num_tokens"]
    assert cag("show", "book", "--store", book, "--json").json["digest"] == updated["digest"] != before["digest"]


def test_update_says_which_documents_are_others(cag, book, corpus):
    (corpus / "alpha.md").write_text("# Alpha gate\n\nIt has gone.\n")
    (corpus / "relay.txt").rename(corpus / "zeta.txt")
    updated = cag("update", "book", corpus, "--store", book, "--json")
    changes = {kind: updated.json[kind] for kind in ("added", "changed", "removed")}
    assert changes == {"added": ["zeta.txt"], "changed": ["alpha.md"], "removed": ["relay.txt"]}
    assert {"added: zeta.txt", "changed: alpha.md", "removed: relay.txt"} <= set(updated.stderr.splitlines())
    (corpus / "a-copy.md").write_text((corpus / "alpha.md").read_text())  # known documents are told from copies
    again = cag("update", "book", corpus, "--store", book, "--json").json
    assert again["added"] == again["changed"] == again["removed"] == []


def test_verbose_prints_the_effective_configuration(build, tiny_model_dir, tmp_path, cag, corpus):
    noted = build("--verbose").stderr
    for expected in (f"model = {tiny_model_dir}", "compute_dtype = torch.float32", f"store = {tmp_path / 's'}"):
        assert expected in noted
    before = ("--verbose", "build", corpus, "--name", "b", "--model", tiny_model_dir, "--store", tmp_path / "s")
    assert "compute_dtype = " in cag(*before).stderr
    assert "compute_dtype = " not in build().stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "told"),
    [
        (("--codec", "zip9"), 54, "zip9"),
        (("--codec", '{"id": "int8", "nonsense": 1}'), 54, "nonsense"),
        (("--codec", "{id: int8}"), 2, "nor JSON"),
        (("--name", "a/b"), 57, "a/b"),
        (("--adapter", "nowhere"), 2, "nowhere"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(cag, corpus, tmp_path, options, exit_code, told):
    arguments = ("build", corpus, "--name", "book", "--model", "no/such", "--store", tmp_path / "s", *options)
    refused = cag(*arguments, "--json")
    assert refused.exit_code == refused.error["exit_code"] == exit_code
    assert told in json.dumps(refused.error)
    assert not (tmp_path / "s").exists()


def test_a_missing_path_is_refused_before_a_model_is_loaded(cag, tmp_path):
    refused = cag("build", tmp_path / "nix", "--name", "book", "--model", "no/such", "--json")
    assert (refused.exit_code, refused.error["code"]) == (22, "unreadable_document")


def test_a_cache_can_be_built_for_a_while(build, cag, tmp_path, corpus, tiny_model_dir):
    build("--ttl", "2h")
    assert Store.open(tmp_path / "s").ref("book").expires_at is not None
    cag("update", "book", corpus, "--store", tmp_path / "s")
    assert Store.open(tmp_path / "s").ref("book").expires_at is None
    assert build("--ttl", "soon").exit_code == 2


def test_a_build_can_keep_the_store_below_a_size(build, cag, tmp_path, corpus, monkeypatch):
    build()
    store = Store.open(tmp_path / "s")
    store.commit("older", store.resolve("book")[1])
    (corpus / "alpha.md").write_text("Another text altogether, so that nothing is shared with the caches before.")
    monkeypatch.setenv("CAG_MAX_BYTES", "1kB")
    built = build("--json")
    assert built.exit_code == 0
    assert "evicted older" in built.stderr
    assert "more than 1.0 kB" in built.stderr
    assert store.names() == ["book"]
    assert store.verify("book").ok


def test_auto_says_in_one_line_what_it_chose(build, cag, tmp_path):
    printed = build("--codec", "auto", "--max-kl", "0.01").stdout
    (line,) = [line for line in printed.splitlines() if "auto chose " in line]
    built = build("--codec", "auto", "--max-kl", "0.01", "--json").json
    assert built["codec_choice"]["reason"] == line.strip()
    assert built["codec_choice"]["codec"] == built["codec"]
    assert built["fidelity"]["mean_kl"] <= built["max_kl"] == 0.01
    assert {"lossless", built["codec"]["id"]} <= {trial["codec"]["id"] for trial in built["codec_choice"]["tried"]}
    assert built["codec"]["id"] in printed
    shown = cag("show", "book", "--store", tmp_path / "s")
    assert line.strip() in shown.stdout
    assert "mean KL" in shown.stdout
    listed = cag("ls", "--store", tmp_path / "s", "--json").json["caches"]
    assert [cache["fidelity"] for cache in listed] == [built["fidelity"]]
    assert cag("show", "book", "--store", tmp_path / "s", "--json").json["codec_choice"] == built["codec_choice"]


def test_a_loss_that_cannot_be_judged_is_warned_of(cag, tiny_model_dir, tmp_path):
    (tmp_path / "x.txt").write_text("x")
    at = ("--model", tiny_model_dir, "--store", tmp_path / "s", "--name", "book", "--json")
    lossy = cag("build", tmp_path / "x.txt", "--codec", "int8", *at)
    (line,) = [line for line in lossy.stderr.splitlines() if line.startswith("warning: ")]
    assert lossy.json["warnings"] == [line.removeprefix("warning: ")]
    assert f"{lossy.json['fidelity']['num_probes']} positions" in line
    exact = cag("build", tmp_path / "x.txt", "--codec", "auto", *at)
    assert "warning" not in exact.stderr
    assert exact.json["codec"]["id"] == "lossless"


def test_a_codec_over_its_bound_is_refused_unless_forced(build, cag, tmp_path):
    before = build("--json").json["digest"]
    over = ("--codec", "int8", "--max-kl", "1e-12", "--json")
    refused = build(*over)
    assert (refused.exit_code, refused.error["code"]) == (33, "fidelity_missed")
    assert "--force" in refused.error["hint"]
    assert cag("show", "book", "--store", tmp_path / "s", "--json").json["digest"] == before
    forced = build(*over, "--force").json
    assert forced["codec"]["id"] == "int8"
    assert forced["fidelity"]["mean_kl"] > forced["max_kl"]
    assert forced["codec_choice"] is None


def test_chunks_that_are_gone_are_said(build, cag, corpus, tmp_path):
    (corpus / "relay.txt").write_text("Each lock of the canal has a relay of its own, which is oiled in spring. " * 20)
    build("--codec", "int8")
    cag("gc", "--grace-seconds", 0, "--store", tmp_path / "s")
    (corpus / "zeta.txt").write_text("The zeta crane lifts nine tons.\n")
    updated = cag("update", "book", corpus, "--store", tmp_path / "s")
    assert "0 reused" in updated.stdout
    assert "only lossy chunks were left" in updated.stdout


@pytest.mark.parametrize("bound", ["-1", "much"])
def test_a_bound_that_is_none_is_refused(build, bound):
    assert build("--max-kl", bound).exit_code == 2


@pytest.mark.parametrize("command", [["build", "--name", "book"], ["update", "book"]])
def test_a_file_that_cannot_be_read_comes_with_what_to_do(cag, book, tmp_path, command):
    folder = tmp_path / "unreadable"
    folder.mkdir()
    (folder / "cafe.txt").write_bytes(b"caf\xe9")
    hint = cag(*command, folder, "--store", book, "--json").error["hint"]
    assert "iconv" in hint
    assert "--skip-errors" in hint
    (folder / "cafe.txt").write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1")
    assert "iconv" not in cag(*command, folder, "--store", book, "--json").error["hint"]
