"""The whole run of `cag bench serve` on a tiny random model: real cache, scheduler, files."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cag.building.builder import build_cache
from cag.building.options import BuildOptions
from cag.errors import UsageError
from cag_bench.corpus import read_corpus
from cag_bench.full_answers import answer_reader, answers_of_full_length
from cag_bench.questions import load_questions
from cag_bench.serve import ServeOptions, run_serve
from cag_bench.serve_table import markdown


def test_a_run_compares_answers_and_writes_its_files(tiny_engine, corpus_dir, questions_file, tmp_path):
    options = ServeOptions(sessions=(1, 3), max_tokens=5, rounds=2)
    out, stops = tmp_path / "out", tiny_engine.model.stop_ids
    summary = run_serve(
        tiny_engine, read_corpus([str(corpus_dir)]), load_questions(questions_file), options, out, lambda *_: None
    )
    assert tiny_engine.model.stop_ids == stops
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert (out / "table.md").read_text() == markdown(summary)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert sorted((row["round"], row["sessions"], row["arm"]) for row in rounds) == sorted(
        (number, size, arm) for number in range(2) for size in (1, 3) for arm in ("alone", "together")
    )
    for row in rounds:
        assert row["completion_tokens"] == 5 * row["sessions"]  # stop tokens are not heeded
        assert row["tokens_per_s"] == pytest.approx(row["completion_tokens"] / row["seconds"])
        assert len(row["ttft_s"]) == row["sessions"]
        assert all(0 < first <= row["seconds"] for first in row["ttft_s"])
        assert row["commit"]
    assert rows[-1]["corpus"]["num_documents"] == 4
    assert rows[-1]["model_fingerprint"] == tiny_engine.model.fingerprints.weights
    assert "warm-up, not counted: every size and arm once" in markdown(summary)
    for entry in summary["sessions"]:
        assert entry["same_answers"] == entry["answers"] == 2 * entry["sessions"]
        assert entry["together_over_alone"]["n"] == 2


def test_arms_with_drafts_say_the_same_and_how_much_was_guessed(tiny_engine, corpus_dir, questions_file, tmp_path):
    options = ServeOptions(sessions=(1, 2), max_tokens=24, rounds=2, speculate=True)
    questions, out = load_questions(questions_file), tmp_path / "out"
    summary = run_serve(tiny_engine, read_corpus([str(corpus_dir)]), questions, options, out, lambda *_: None)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["kind"] == "round"]
    assert len(rounds) == 2 * 2 * 4
    assert all(row["drafted_tokens"] == 0 for row in rounds if not row["arm"].endswith("drafts"))
    drafted = sum(row["drafted_tokens"] for row in rounds)
    assert 0 < sum(row["accepted_tokens"] for row in rounds) <= drafted
    for entry in summary["sessions"]:
        assert entry["same_answers"] == entry["answers"]
        assert {arm: ratio["n"] for arm, ratio in entry["drafts_over_none"].items()} == {"alone": 2, "together": 2}
        tokens = {figures["completion_tokens"] for figures in entry["arms"].values()}
        assert len(tokens) == 1
        assert tokens.pop() <= 24 * entry["answers"]
    table = (out / "table.md").read_text()
    assert table == markdown(summary)
    assert "| drafts / none | guessed of answers | of guesses right |" in table


@pytest.mark.parametrize(
    "bad", [{"sessions": ()}, {"sessions": (0,)}, {"sessions": (4, 1, 4)}, {"max_tokens": 0}, {"rounds": 0}]
)
def test_sizes_below_one_and_those_named_twice_are_refused(bad):
    with pytest.raises(UsageError):
        ServeOptions(**bad)


def test_speeds_stand_beside_what_the_answers_contain(tiny_engine, corpus_dir, questions_file, tmp_path):
    documents, options = read_corpus([str(corpus_dir)]), ServeOptions(sessions=(3,), max_tokens=4, rounds=1)
    questions = load_questions(questions_file)
    build_cache(tiny_engine.model, tiny_engine.store, "handbook", documents.documents, BuildOptions())
    with tiny_engine.open("handbook") as prefix:
        said = prefix.ask(questions[0].question, max_tokens=4).text
    questions[0] = replace(questions[0], answers=(said,))
    questions[1] = replace(questions[1], answers=("no such word",))
    summary = run_serve(tiny_engine, documents, questions, options, tmp_path, lambda *_: None)
    row = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert (row["qids"], row["containment"]) == (["q1", "q2", "q3"], [1.0, 0.0, None])
    assert row["answers"][0] == said
    assert [figures["containment"] for figures in summary["sessions"][0]["arms"].values()] == [0.5, 0.5]
    header, _, *rows = [line.split(" | ") for line in markdown(summary).splitlines() if line.startswith("|")]
    assert [cells[header.index("contains")] for cells in rows] == ["0.50", "0.50"]


def test_what_a_full_answer_says_ends_where_the_models_answers_end(tiny_engine):
    model = tiny_engine.model
    ids = model.tokenizer("green paint\n\nQuestion: no", add_special_tokens=False)["input_ids"]
    (stop, *_) = model.stop_ids
    assert answer_reader(model)([*ids[:5], stop, *ids]) == "green"
    model.template = replace(model.template, stop_strings=("\n\nQuestion:", "\nQuestion:"))
    text_of = answer_reader(model)
    with answers_of_full_length(model):
        assert text_of(ids) == "green paint"


def test_answers_of_one_token_have_no_time_for_a_further_one(tiny_engine, corpus_dir, questions_file, tmp_path):
    options = ServeOptions(sessions=(1,), max_tokens=1, rounds=1)
    summary = run_serve(
        tiny_engine, read_corpus([str(corpus_dir)]), load_questions(questions_file), options, tmp_path, lambda *_: None
    )
    (entry,) = summary["sessions"]
    assert [figures["tpot_s"] for figures in entry["arms"].values()] == [None, None]
    header, _, *rows = [line.split(" | ") for line in markdown(summary).splitlines() if line.startswith("|")]
    assert [row[header.index("per token p50")] for row in rows] == ["-", "-"]


def test_answers_have_all_their_tokens_where_texts_end_them_too(tiny_engine, corpus_dir, questions_file, tmp_path):
    model, documents, questions = tiny_engine.model, read_corpus([str(corpus_dir)]), load_questions(questions_file)
    build_cache(model, tiny_engine.store, "handbook", documents.documents, BuildOptions())
    with tiny_engine.open("handbook") as prefix:
        text = prefix.ask(questions[0].question, max_tokens=12).text
    model.template = replace(model.template, stop_strings=(text[0],))
    options = ServeOptions(sessions=(1,), max_tokens=12, rounds=1)
    summary = run_serve(tiny_engine, documents, questions, options, tmp_path, lambda *_: None)
    (entry,) = summary["sessions"]
    assert [figures["completion_tokens"] for figures in entry["arms"].values()] == [12, 12]
    assert model.template.stop_strings == (text[0],)
