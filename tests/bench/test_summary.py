from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cag_bench.notes import _few_passages, busy_notes
from cag_bench.plot import plot_ttft
from cag_bench.rows import ResultRows
from cag_bench.summary import arm_details, arm_figures, break_even, by_arm, loading_ratio, ratios
from cag_bench.table import markdown_table, ratio_cell, table_columns, table_rows

ARMS = ["cag-hot", "cag-disk", "full-prefill", "rag-hybrid@3"]


@pytest.fixture
def groups(make_sample):
    samples = []
    for index in range(4):
        samples.append(make_sample("cag-hot", index, 0.1 * (index + 1)))
        samples.append(make_sample("cag-disk", index, 0.2 * (index + 1), load_s=0.05, page_cache_dropped=index > 0))
        samples[-1] = replace(samples[-1], read_s=0.1 if index else None)
        samples.append(make_sample("rag-hybrid@3", index, 0.8 * (index + 1), retrieve_s=0.01, gold_retrieved=index > 1))
    samples += [make_sample("full-prefill", index, 8.0 * (index + 1), cached_tokens=0) for index in range(2)]
    return by_arm(samples, ARMS)


@pytest.fixture
def summary(groups):
    return {
        "machine": {
            "gpu": None,
            "processor": "P",
            "cores": 2,
            "memory_bytes": 2**33,
            "compute_dtype": "float32",
            "load_average_begin": [1.0, 1.0, 1.0],
            "load_average_end": [2.0, 1.0, 1.0],
        },
        "commit": "c0ffee",
        "model": {"id": "tiny", "fingerprint": "f" * 64},
        "corpus": {"num_documents": 4, "num_tokens": 900, "sha256": "a" * 64},
        "cache": {
            "codec": {"id": "int8"},
            "raw_bytes": 3_000_000,
            "stored_bytes": 2_000_000,
            "fidelity": {"mean_kl": 0.00123},
        },
        "arms": {name: arm_figures(group) | arm_details(group) for name, group in groups.items()},
        "ratios": ratios(groups),
        "retrieval": {"quality": {"bm25": {"unit": "passage", "n": 4, "recall@1": 0.25, "mrr": 0.5}, "dense": None}},
        "break_even_questions": break_even(groups, 17.5) | {"cag-ram": {"full-prefill": None}},
        "notes": ["A note."],
    }


def test_arm_figures_have_the_fields_of_the_contract(groups):
    figures = arm_figures(groups["cag-disk"])
    assert list(figures) == [
        "n",
        "ttft_s",
        "retrieve_s",
        "load_s",
        "prefill_s",
        "tpot_s",
        "cached_tokens",
        "computed_tokens",
        "em",
        "f1",
    ]
    assert figures["n"] == 4
    assert figures["ttft_s"] == {"p50": pytest.approx(0.5), "p90": pytest.approx(0.74), "p99": pytest.approx(0.794)}
    assert (figures["load_s"], figures["cached_tokens"], figures["computed_tokens"]) == (0.05, 100, 10)


def test_scores_are_means_over_scored_questions_only(make_sample):
    unscored = {"em": None, "f1": None, "rouge_l": None, "containment": None, "tpot_s": None}
    samples = [
        make_sample("cag-hot", 0, 0.1, em=1.0, f1=1.0),
        make_sample("cag-hot", 1, 0.1, em=0.0, f1=0.5),
        make_sample("cag-hot", 2, 0.1, **unscored),
    ]
    figures = arm_figures(samples)
    assert (figures["n"], figures["em"], figures["f1"], figures["tpot_s"]) == (3, 0.5, 0.75, 0.01)
    assert arm_details(samples)["num_scored"] == 2
    nothing = arm_figures(samples[2:])
    assert (nothing["em"], nothing["f1"], nothing["tpot_s"]) == (None, None, None)


def test_details_count_dropped_page_caches_and_found_gold(groups):
    assert arm_details(groups["cag-disk"])["page_cache_dropped"] == {"samples": 4, "dropped": 3}
    assert arm_details(groups["cag-hot"])["page_cache_dropped"] is None
    assert arm_details(groups["rag-hybrid@3"])["gold_retrieved"] == 0.5


def test_ratios_are_taken_question_by_question(groups):
    found = ratios(groups)
    assert set(found) == {
        "cag-disk/cag-hot",
        "full-prefill/cag-hot",
        "rag-hybrid@3/cag-hot",
        "cag-hot/cag-disk",
        "full-prefill/cag-disk",
        "rag-hybrid@3/cag-disk",
    }
    assert found["rag-hybrid@3/cag-hot"] == {"p50": pytest.approx(8), "ci95": None, "n": 4}
    assert found["full-prefill/cag-hot"] == {"p50": pytest.approx(80), "ci95": None, "n": 2}


def test_loading_is_compared_with_a_hot_answer_and_reading(groups):
    expected = {"p50": pytest.approx(1.5), "ci95": None, "n": 3}
    assert loading_ratio(groups) == expected
    assert loading_ratio({"cag-hot": groups["cag-hot"]}) is None


def test_break_even_uses_the_same_questions_on_both_sides(groups):
    # Mean seconds over four questions: rag-hybrid@3 2, cag-hot 0.25; over two: full-prefill 12, cag-hot 0.15.
    paid = break_even(groups, build_s=17.5)
    assert paid["cag-hot"] == {"rag-hybrid@3": 10, "full-prefill": 2}
    assert paid["cag-disk"] == {"rag-hybrid@3": 12, "full-prefill": 2}
    assert break_even(groups, None)["cag-hot"] == {"rag-hybrid@3": None, "full-prefill": None}


def test_a_build_pays_against_every_arm_without_a_cache(make_sample):
    names = ["cag-hot", "cag-ram", "rag-bm25@1", "rag-dense@3"]
    samples = [make_sample(name, 0, seconds) for name, seconds in zip(names, (0.1, 0.2, 0.6, 1.1), strict=True)]
    assert break_even(by_arm(samples, names), 2.0) == {"cag-hot": {"rag-bm25@1": 4, "rag-dense@3": 2}}


def test_table_has_a_row_an_arm_and_a_cell_a_column(summary):
    rows = table_rows(summary)
    assert [row[0] for row in rows] == ARMS
    assert all(len(row) == len(table_columns(summary)) for row in rows)
    assert rows[0][:5] == ["cag-hot", "4", "250", "370", "397"]
    cells = dict(zip(table_columns(summary), rows[0], strict=True))
    assert (cells["total"], cells["tpot"], cells["EM"], cells["ROUGE-L"]) == ("300", "10.0", "1.00", "1.00")
    assert rows[0][-2:] == ["-", "0.50 (4)"]
    assert rows[2][-2:] == ["80.00 (2)", "40.00 (2)"]


def test_arms_that_are_called_after_more_passages_than_there_are_say_so(make_sample):
    found = {"retrieved_passage_ids": ("a#0", "b#0")}
    groups = {
        name: [make_sample(name, 0, 1.0, **(found if name.startswith("rag-") else {}))]
        for name in ("cag-hot", "rag-bm25@2", "rag-bm25@3", "rag-dense@10")
    }
    note = "Fewer passages were found than the arm is called after: rag-bm25@3 (2), rag-dense@10 (2)."
    assert _few_passages(groups) == [note]
    assert _few_passages({"rag-bm25@2": groups["rag-bm25@2"]}) == []


@pytest.mark.parametrize(("load", "is_busy"), [(0.2, False), (1.99, False), (2.0, True), (11.5, True)])
def test_a_machine_that_was_busy_is_told(load, is_busy):
    notes = busy_notes({"load_average_begin": [load, 0.0, 0.0], "cores": 2})
    assert [f"load average {load} on 2 cores" in note for note in notes] == [True] * is_busy


def test_an_interval_stands_beside_its_ratio_where_there_are_pairs_for_one():
    assert ratio_cell({"p50": 8.0, "ci95": [7.5, 8.25], "n": 6}) == "8.00 [7.50, 8.25] (6)"
    assert ratio_cell({"p50": 8.0, "ci95": None, "n": 5}) == "8.00 (5)"
    assert ratio_cell(None) == "-"


def test_markdown_says_origin_and_notes(summary):
    text = markdown_table(summary)
    assert "- code: c0ffee" in text
    assert "load average 1.0 at the beginning and 2.0 at the end" in text
    assert "int8, 3.0 MB raw, 2.0 MB stored (1.50 : 1), mean KL 0.0012 nats" in text
    assert (
        "- Questions after which the build has paid, cag-hot: 2 against full-prefill, 10 against rag-hybrid@3." in text
    )
    assert "- Questions after which the build has paid, cag-ram: none against full-prefill." in text
    assert "- Retrieval by bm25 for itself, of passages: recall@1 0.250, mrr 0.500 (n = 4)." in text
    assert "dense" not in text
    assert text.endswith("- A note.\n")
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {len(table_columns(summary)) + 1}


def test_rows_carry_their_origin_and_survive_a_broken_run(tmp_path, make_sample):
    origin = {"machine": {"cores": 2}, "commit": "c0ffee", "versions": {"python": "3"}}
    with pytest.raises(RuntimeError), ResultRows(tmp_path, origin) as rows:
        rows.write_sample(make_sample("cag-hot", 0, 0.25))
        raise RuntimeError
    (row,) = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert row["kind"] == "sample"
    assert {key: row[key] for key in origin} == origin
    assert (row["arm"], row["ttft_s"], row["tpot_s"]) == ("cag-hot", 0.25, 0.01)


def test_plot_is_a_picture_with_one_row_an_arm(tmp_path):
    small, large = tmp_path / "small.png", tmp_path / "large.png"
    plot_ttft({"cag-hot": [0.05, 0.06], "full-prefill": [12.0], "rag-bm25@3": []}, "tiny", small)
    plot_ttft({f"rag-bm25@{k}": [0.1 * k] for k in range(1, 9)}, "tiny", large)
    assert small.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert height(large) - height(small) == 6 * 0.5 * 150


def height(path):
    return int.from_bytes(path.read_bytes()[20:24], "big")
