"""Quality of codecs on a tiny model: real builds, real bytes, real probes."""

from __future__ import annotations

import json

import pytest
from transformers import Lfm2Config
from typer.testing import CliRunner

from cag.calibration import CalibrationOptions, calibrate
from cag.engine import Engine
from cag.errors import UsageError
from cag_bench.cli import app
from cag_bench.codec_list import LADDER, codec_label, parse_codecs
from cag_bench.corpus import documents_sha256, read_corpus
from cag_bench.quality import QualityOptions, run_quality
from cag_bench.quality_corpus import cut_corpus
from cag_bench.quality_table import corpus_names, fronts
from cag_store import object_paths
from tiny import write_tiny_model

SMALL = CalibrationOptions(joint_layers=2, num_windows=3, window_tokens=256, gradient_windows=2, least_step=-700)
NUM_TOKENS = 700


@pytest.fixture
def long_corpus(corpus_dir):
    """A corpus of some 2,000 tokens, a byte each."""
    (corpus_dir / "zulu.txt").write_text("".join(f"Valve {i} is turned {i % 7} times a day. " for i in range(50)))
    return read_corpus([str(corpus_dir)])


@pytest.fixture
def summary(tiny_engine, long_corpus, tmp_path):
    with tiny_engine.store.build_lease():
        basis = calibrate(tiny_engine.model, tiny_engine.store, options=SMALL).codec
    codecs = [*parse_codecs(["lossless", "int8", "int4"]), {**basis, "step": -640}, {**basis, "step": -320}]
    options = QualityOptions(codecs, NUM_TOKENS, (1e-9, 10.0))
    return run_quality(tiny_engine, [long_corpus], options, tmp_path / "out", lambda *_: None)


def test_every_file_of_a_cache_is_counted(summary, tiny_engine, long_corpus):
    """The last row's cache is what its name still means."""
    (name,) = tiny_engine.store.names()
    _, manifest = tiny_engine.find(name)
    paths = [*object_paths(manifest), f"refs/{name}.json"]
    paths += [info.path for info in tiny_engine.store.backend.list("manifests") if manifest.digest in info.path]
    found = sum(tiny_engine.store.backend.stat(path).size_bytes for path in paths)
    row = summary["rows"][-1]
    assert row["stored_bytes"]["total"] == found
    assert row["stored_bytes"]["basis"] > 0
    assert row["raw_bytes"] == manifest.raw_bytes
    apart = found - row["stored_bytes"]["basis"]
    assert row["raw_over_stored"] == {
        "with_basis": manifest.raw_bytes / found,
        "without_basis": manifest.raw_bytes / apart,
    }


def test_losses_are_in_order_and_both_kinds_of_probes_are_there(summary):
    rows = {row["label"]: row["fidelity"] for row in summary["rows"]}
    assert list(rows) == ["lossless", "int8", "int4", "transform@-640", "transform@-320"]
    for kind, least in (("corpus", 256), ("following", 512)):
        kl = {label: fidelity[kind]["mean_kl"] for label, fidelity in rows.items()}
        assert kl["lossless"] == 0 < kl["int8"] < kl["int4"]
        assert 0 < kl["transform@-640"] < kl["transform@-320"]
        assert all(fidelity[kind]["num_probes"] >= least for fidelity in rows.values())
    assert rows["lossless"]["following"]["method"] == "bits"
    assert rows["int8"]["following"]["method"] == "probes"


def test_a_hybrid_is_measured_with_its_states(tmp_path, bench_home, long_corpus):
    config = Lfm2Config(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=4096,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    engine = Engine.load(str(write_tiny_model(tmp_path / "model", config=config)), store=tmp_path / "store")
    options = QualityOptions(parse_codecs(["lossless", "int8"]), NUM_TOKENS, (10.0,))
    found = run_quality(engine, [long_corpus], options, tmp_path / "out", lambda *_: None)
    rows = {row["label"]: row for row in found["rows"]}
    (name,) = engine.store.names()
    _, manifest = engine.find(name)
    assert rows["int8"]["stored_bytes"]["states"] == manifest.states.stored_bytes > 0
    assert rows["int8"]["raw_bytes"] == manifest.raw_bytes
    for kind in ("corpus", "following"):
        kl = [rows[label]["fidelity"][kind]["mean_kl"] for label in rows]
        assert kl[0] == 0 < kl[1] < 1
    behind = engine.build(long_corpus.paths, name="built", codec="int8")  # the same chunks, snapshots among them
    assert behind.reused_tokens > 0


def test_corpora_whose_paths_end_alike_stay_apart_and_rows_tell_what_was_cut(tiny_engine, tmp_path):
    folders = [tmp_path / place / "product" / "docs" for place in ("one", "two")]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / f"{name}.txt").write_text("".join(f"Pump {number}{i} {name} hums. " for i in range(40)))
    corpora = [read_corpus([str(folder)]) for folder in folders]
    options = QualityOptions(parse_codecs(["int8"]), NUM_TOKENS, (10.0,))
    summary = run_quality(tiny_engine, corpora, options, tmp_path / "out", lambda *_: None)
    names = ["one/product/docs", "two/product/docs"]
    assert [row["corpus"]["name"] for row in summary["rows"]] == names
    assert list(dict.fromkeys(front["corpus"] for front in summary["fronts"])) == names
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| {name} |" in table for name in names)
    for corpus, row in zip(corpora, summary["rows"], strict=True):
        cut = cut_corpus(tiny_engine.model, corpus.documents, NUM_TOKENS).documents
        assert row["corpus"]["num_characters"] == sum(len(document.text) for document in cut)
        assert (row["corpus"]["num_documents"], len(corpus.documents)) == (len(cut), 2)
        assert row["corpus"]["sha256"] == documents_sha256(cut) != corpus.sha256


def test_names_of_corpora_are_as_long_as_it_takes():
    assert corpus_names([["a/b/docs"], ["src"]]) == ["b/docs", "src"]
    assert corpus_names([["a/x/docs", "more"], ["b/x/docs"]]) == ["x/docs and 1 more", "x/docs"]
    assert corpus_names([["/a/x/docs"], ["/b/x/docs"], ["docs"]]) == ["a/x/docs", "b/x/docs", "docs"]
    assert corpus_names([["x/docs"], ["x/docs"]]) == ["x/docs", "x/docs"]


def test_a_corpus_is_prefilled_once(tiny_engine, long_corpus, tmp_path, monkeypatch):
    read = []
    forward = tiny_engine.model.forward
    monkeypatch.setattr(
        tiny_engine.model, "forward", lambda ids, *rest, **more: read.append(len(ids)) or forward(ids, *rest, **more)
    )
    codecs = parse_codecs(["lossless", "int8", "int4"])
    summary = run_quality(
        tiny_engine, [long_corpus], QualityOptions(codecs, NUM_TOKENS), tmp_path / "out", lambda *_: None
    )
    _, *corpus = read
    assert sum(corpus) == summary["rows"][0]["corpus"]["num_tokens"] <= NUM_TOKENS


def test_the_smallest_within_a_limit_is_named(summary):
    found = {(front["probes"], front["max_kl"]): front["label"] for front in summary["fronts"]}
    assert found["corpus", 1e-9] == found["following", 1e-9] == "lossless"
    sizes = {row["label"]: row["raw_over_stored"]["without_basis"] for row in summary["rows"]}
    assert found["corpus", 10.0] == max(sizes, key=sizes.get)


def test_nothing_within_a_limit_is_said(summary):
    rows = [row for row in summary["rows"] if row["label"] != "lossless"]
    assert {front["label"] for front in fronts(rows, [0.0])} == {None}


def test_files_of_a_run(summary, tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["codec"] * 5 + ["run"]
    assert all({"machine", "commit", "versions"} <= set(line) for line in lines)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "transform@-320" in table and "none of those measured" not in table
    assert (tmp_path / "out" / "quality.png").stat().st_size > 1000
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_a_cut_corpus_goes_on_where_it_was_cut(tiny_engine, long_corpus):
    model = tiny_engine.model
    cut = cut_corpus(model, long_corpus.documents, NUM_TOKENS)
    assert NUM_TOKENS - 40 <= len(cut.layout.token_ids) <= NUM_TOKENS
    *kept, last = cut.documents
    assert kept == list(long_corpus.documents[: len(kept)])
    whole = long_corpus.documents[len(kept)].text
    assert whole.startswith(last.text) and last.doc_id == long_corpus.documents[len(kept)].doc_id
    rest = [document.text for document in long_corpus.documents[len(cut.documents) :]]
    behind = "\n\n".join([whole[len(last.text) :], *rest])
    assert behind.startswith(model.tokenizer.decode(cut.following.token_ids)[:100])
    assert cut.following.targets[:-1] == cut.following.token_ids[1:]


def test_a_corpus_that_fits_is_not_cut(tiny_engine, long_corpus):
    cut = cut_corpus(tiny_engine.model, long_corpus.documents, 4000)
    assert (cut.documents, cut.following) == (long_corpus.documents, None)
    with pytest.raises(UsageError, match="no room"):
        cut_corpus(tiny_engine.model, long_corpus.documents, 20)


def test_codecs_are_named_in_three_ways():
    assert parse_codecs(["int8", "transform@-515", '{"id": "int4", "wide_key_layers": [0, 3]}', "int8"]) == [
        {"id": "int8"},
        {"id": "transform", "step": -515},
        {"id": "int4", "wide_key_layers": [0, 3]},
    ]
    assert len(parse_codecs(LADDER)) == len(LADDER)
    assert codec_label({"id": "int4", "wide_key_layers": [0, 3]}) == "int4, keys of 2 layers wide"


@pytest.mark.parametrize(
    "text", ["", "transform@", "transform@x", "transform@--5", "transform@²", "{", '{"step": 3}', "@3"]
)
def test_what_is_no_codec_is_refused(text):
    with pytest.raises(UsageError):
        parse_codecs([text])


@pytest.mark.parametrize("limits", [[], [-1.0], [0.01, float("nan")]])
def test_limits_that_are_none_are_refused(limits):
    with pytest.raises(UsageError, match="limits at least 0"):
        QualityOptions(limits=limits)


def test_the_command(tiny_model_dir, bench_home, corpus_dir, tmp_path):
    arguments = ["quality", "--corpus", corpus_dir, "--model", tiny_model_dir, "--out", tmp_path / "out"]
    arguments += ["--codec", "int8", "--tokens", 600, "--device", "cpu"]
    done = CliRunner().invoke(app, [str(part) for part in [*arguments, "--json"]])
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert [row["label"] for row in printed["rows"]] == ["int8"]
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    shown = CliRunner().invoke(app, [str(part) for part in arguments])
    assert "| int8 |" in shown.stdout
    wrong = CliRunner().invoke(app, [str(part) for part in [*arguments, "--max-kl", "much"]])
    assert isinstance(wrong.exception, UsageError)
