"""The whole run on a tiny random model: real builder, store, arms, files."""

from __future__ import annotations

import json

import pytest

from cag.errors import CorpusTooLarge, UsageError
from cag.prompt import question_ids
from cag.retrieval.minilm import MiniLmEmbedder
from cag_bench.arm_names import parse_arms
from cag_bench.arms.cached import HotArm
from cag_bench.corpus import read_corpus
from cag_bench.questions import load_questions
from cag_bench.ttft import TtftOptions, run_ttft

NAMES = ["cag-hot", "cag-ram", "cag-disk", "full-prefill", "rag-bm25@2"]
ARMS = parse_arms(",".join(NAMES))


def quiet(_stage, _done, _total):
    return None


@pytest.fixture
def run(tiny_engine, corpus_dir, questions_file, tmp_path):
    def start(arms=ARMS, **options):
        settings = TtftOptions(arms, max_tokens=4, **options)
        questions = load_questions(questions_file)
        return run_ttft(tiny_engine, read_corpus([str(corpus_dir)]), questions, settings, tmp_path / "out", quiet)

    return start


def rows_of(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]


def test_a_run_measures_every_arm_and_writes_its_files(run, tiny_engine, tmp_path):
    result = run(full_n=2)
    summary = result.summary
    assert {name: arm["n"] for name, arm in summary["arms"].items()} == dict.fromkeys(NAMES, 3) | {"full-prefill": 2}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "results.jsonl",
        "summary.json",
        "table.md",
        "ttft.png",
    ]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    prefix_tokens = summary["corpus"]["num_tokens"]
    model = tiny_engine.model
    for sample in result.samples:
        asked = len(question_ids(model.tokenizer, model.template, sample.question))
        assert sample.cached_tokens + sample.computed_tokens == sample.prompt_tokens
        assert (sample.cached_tokens, sample.computed_tokens) == (
            (prefix_tokens, asked) if sample.arm.startswith("cag-") else (0, sample.prompt_tokens)
        )
        assert 0 < sample.prefill_s <= sample.ttft_s <= sample.total_s
        assert (sample.load_s > 0) == (sample.arm in ("cag-ram", "cag-disk"))
        assert (sample.retrieve_s > 0) == sample.arm.startswith("rag-")
        assert (sample.page_cache_dropped is None) == (sample.arm != "cag-disk")
        assert (sample.read_s is not None and sample.read_s > 0) == bool(sample.page_cache_dropped)


def test_a_run_that_breaks_off_leaves_no_figures_of_an_older_one(run, tmp_path, monkeypatch):
    run(parse_arms("cag-hot"))
    older, ask = rows_of(tmp_path), HotArm.ask

    def breaks(self, question, options):
        if question == "What colour is the beta pump?":
            raise KeyboardInterrupt
        return ask(self, question, options)

    monkeypatch.setattr(HotArm, "ask", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(parse_arms("cag-hot"))
    assert [row["kind"] for row in older] == ["sample"] * 3 + ["run"]
    assert [row["kind"] for row in rows_of(tmp_path)] == ["sample"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.jsonl"]


def test_a_corpus_can_be_cut_to_a_number_of_tokens(run, corpus_dir):
    whole = read_corpus([str(corpus_dir)])
    summary = run(arms=parse_arms("cag-hot,rag-bm25@1"), prefix_tokens=600).summary
    assert summary["corpus"]["sha256"] != whole.sha256
    assert summary["corpus"]["num_tokens"] == 600
    assert 0 < summary["corpus"]["num_passages"] < len(whole.passages)  # none from behind the cut
    assert summary["options"]["prefix_tokens"] == 600
    with pytest.raises(UsageError, match="fewer than"):
        run(prefix_tokens=10**6)
    with pytest.raises(UsageError, match="prefix-tokens"):
        run(prefix_tokens=0)


def test_a_cache_changes_no_answer(run):
    answers = {}
    for sample in run().samples:
        if not sample.arm.startswith("rag-"):
            answers.setdefault(sample.qid, set()).add(sample.answer)
    assert all(len(texts) == 1 for texts in answers.values())


def test_every_row_says_where_it_comes_from(run, tmp_path):
    result = run(n=2)
    rows = rows_of(tmp_path)
    assert [row["kind"] for row in rows] == ["sample"] * 10 + ["run"]
    for row in rows:
        assert row["commit"] == result.summary["commit"]
        assert row["versions"]["torch"]
        assert row["machine"]["cores"] >= 1
    run_row = rows[-1]
    assert len(run_row["machine"]["load_average_end"]) == 3
    assert run_row["options"]["arms"] == NAMES
    assert run_row["corpus"]["num_documents"] == 4
    assert run_row["model"]["fingerprint"]
    assert run_row["cache"]["codec"]["id"] == "lossless"
    assert run_row["retrieval"]["quality"]["bm25"]["recall@1"] == 1.0


def test_printed_object_is_that_of_the_contract(run):
    printed = run().printed()
    assert list(printed) == ["machine", "commit", "versions", "arms", "ratios", "notes"]
    times = {"ttft_s", "retrieve_s", "load_s", "prefill_s", "tpot_s"}
    fields = {"n", "cached_tokens", "computed_tokens", "em", "f1"} | times
    assert all(set(arm) == fields for arm in printed["arms"].values())
    expected = {f"{arm}/{base}" for base in ("cag-hot", "cag-disk") for arm in NAMES if arm != base}
    assert set(printed["ratios"]) == expected
    assert all(set(ratio) == {"p50", "ci95", "n"} for ratio in printed["ratios"].values())


def test_ratios_come_from_samples_of_the_same_question(run):
    result = run()
    ttft = {(sample.arm, sample.qid): sample.ttft_s for sample in result.samples}
    by_hand = sorted(ttft["rag-bm25@2", qid] / ttft["cag-hot", qid] for qid in ("q1", "q2", "q3"))
    assert result.summary["ratios"]["rag-bm25@2/cag-hot"]["p50"] == by_hand[1]


def test_a_second_run_reuses_the_cache_and_gives_no_build_time(run, tiny_engine):
    first, second = run().summary, run().summary
    tiny_engine.model.most_read_tokens = 0  # as in a process of its own
    third = run().summary
    assert first["cache"]["build"] == "computed"
    assert first["cache"]["build_s"] > 0
    assert first["break_even_questions"]["cag-hot"]["full-prefill"] >= 1
    assert second["cache"]["build"] == "reused"
    assert second["cache"]["build_s"] is None
    assert second["break_even_questions"]["cag-hot"]["full-prefill"] is None
    assert second["cache"]["name"] == first["cache"]["name"]
    # Having read as much in this process is a warm-up for full-prefill.
    for summary in (first, second):
        assert summary["notes"][0].endswith("full-prefill: a build in this process was the same prefill.")
    assert "full-prefill" in third["notes"][0].partition("each of")[2]


def test_notes_say_what_was_left_out(run):
    notes = "\n".join(run(full_n=1).summary["notes"])
    assert "full-prefill: only the first 1 of 3 questions." in notes
    assert "1 of 3 questions have no accepted answer" in notes
    assert "cag-disk: the page cache" in notes
    assert "Warm-up, not counted: one question each of cag-hot" in notes
    assert "13 of 13 answers were cut at 4 tokens" in notes
    assert "supporting texts" not in notes


def test_a_question_beyond_the_window_is_a_row_and_a_note_and_the_others_are_paired(run, questions_file, tmp_path):
    asked = questions_file.read_text().splitlines()
    long = {"qid": "long", "question": "far too long " * 1000, "answers": ["x"]}
    questions_file.write_text("\n".join([asked[0], json.dumps(long), asked[1]]))
    summary = run(arms=parse_arms("cag-hot,rag-bm25@1")).summary
    assert {name: arm["n"] for name, arm in summary["arms"].items()} == {"cag-hot": 2, "rag-bm25@1": 2}
    assert summary["ratios"]["rag-bm25@1/cag-hot"]["n"] == 2
    refused = [row for row in rows_of(tmp_path) if row["kind"] == "refused"]
    assert {(row["arm"], row["qid"]) for row in refused} == {("cag-hot", "long"), ("rag-bm25@1", "long")}
    assert all("window of 8192" in row["error"] and row["commit"] for row in refused)
    assert "no pair: cag-hot (1 of 3), rag-bm25@1 (1 of 3)." in "\n".join(summary["notes"])


def test_an_arm_without_any_sample_is_a_row_of_the_table(run, questions_file, tmp_path):
    long = {"question": "far too long " * 1000, "answers": ["x"]}
    questions_file.write_text(json.dumps(long) + "\n" + questions_file.read_text())
    summary = run(arms=parse_arms("cag-hot,full-prefill"), full_n=1).summary
    assert (summary["arms"]["full-prefill"]["n"], summary["arms"]["full-prefill"]["ttft_s"]) == (0, None)
    assert summary["break_even_questions"]["cag-hot"] == {"full-prefill": None}
    assert "| full-prefill | 0 | - | - |" in (tmp_path / "out" / "table.md").read_text()


def test_questions_whose_texts_are_not_in_the_corpus_are_told_and_not_held_against_retrieval(run, corpus_dir):
    (corpus_dir / "beta.txt").unlink()
    result = run(arms=parse_arms("rag-bm25@1"))
    assert "1 of 3 questions name supporting texts that are not in the corpus" in "\n".join(result.summary["notes"])
    assert [sample.gold_retrieved for sample in result.samples] == [True, None, None]  # the last names no document
    assert result.summary["arms"]["rag-bm25@1"]["gold_retrieved"] == 1.0


def test_without_cached_arms_nothing_is_built(run, tiny_engine):
    result = run(arms=parse_arms("rag-bm25@1"))
    assert result.summary["cache"] is None
    assert result.summary["ratios"] == {}
    assert tiny_engine.store.names() == []


def test_another_codec_is_another_cache(run):
    lossless, int8 = run(arms=ARMS[:1]).summary["cache"], run(arms=ARMS[:1], codec="int8").summary["cache"]
    assert lossless["name"] != int8["name"]
    assert int8["codec"]["id"] == "int8"
    assert int8["stored_bytes"] < lossless["stored_bytes"]


def test_a_corpus_beyond_the_window_is_the_builders_error(run, corpus_dir):
    (corpus_dir / "long.txt").write_text("far too long " * 1000)
    with pytest.raises(CorpusTooLarge, match="more than fit"):
        run()


@pytest.mark.parametrize("wrong", [{"n": 0}, {"full_n": -1}])
def test_counts_below_one_are_refused(wrong):
    with pytest.raises(UsageError, match="at least 1"):
        TtftOptions(**wrong)


@pytest.mark.slow
def test_hybrid_arm_embeds_the_query_inside_the_clock(tiny_model_dir, corpus_dir, questions_file, tmp_path):
    """With the real embedding model, in the user's cache home."""
    from cag.engine import Engine

    engine = Engine.load(str(tiny_model_dir), store=tmp_path / "store", device="cpu")
    embedded = []
    original = MiniLmEmbedder.embed_query

    def counting(self, text):
        embedded.append(text)
        return original(self, text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniLmEmbedder, "embed_query", counting)
        options = TtftOptions(parse_arms("cag-hot,rag-dense@1,rag-hybrid@2"), max_tokens=2, n=2)
        documents, questions = read_corpus([str(corpus_dir)]), load_questions(questions_file)
        result = run_ttft(engine, documents, questions, options, tmp_path / "out", quiet)
    hybrid = [sample for sample in result.samples if sample.arm == "rag-hybrid@2"]
    assert [sample.gold_retrieved for sample in hybrid] == [True, True]
    # A warm-up and two questions for each of the two arms, then two questions for the quality of each kind.
    assert len(embedded) == 2 * 3 + 2 * 2
    assert all(sample.retrieve_s > 0.0005 for sample in hybrid)
    assert set(result.summary["retrieval"]["quality"]) == {"dense", "hybrid"}
