from __future__ import annotations

import gzip
import json

import pytest

from cag.errors import EmptyCorpus, UsageError
from cag_bench.corpus import read_corpus
from cag_bench.questions import Question, load_questions
from cag_bench.retrieval import build_retrievers, retrieval_quality

FIRST, SECOND = "Pumps are green.\r\n", "Valves are old.  \n"


def row(**changes):
    text = FIRST + SECOND
    paragraphs = [
        {"pid": "p0", "start": 0, "end": len(FIRST)},
        {"pid": "p1", "start": len(FIRST), "end": len(text)},
    ]
    return {"doc_id": "d", "title": "Works", "text": text, "paragraphs": paragraphs} | changes


def as_utf_16(content):
    return content.decode().encode("utf-16")


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("d.jsonl", bytes),
        ("d.jsonl.gz", gzip.compress),
        ("d.ndjson", bytes),
        ("D.JSONL", bytes),
        ("d.ndjson.gz", gzip.compress),
        ("cafe\u0301.jsonl", bytes),
        ("d.jsonl", as_utf_16),
    ],
)
def test_paragraphs_of_json_lines_are_the_passages_even_where_the_text_was_normalised(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(json.dumps(row()).encode()))
    corpus = read_corpus([str(tmp_path / name)])
    assert corpus.documents[0].text == "Pumps are green.\nValves are old."
    assert [(p.passage_id, p.text) for p in corpus.passages] == [("p0", "Pumps are green."), ("p1", "Valves are old.")]


def test_paragraphs_may_stand_in_any_order_and_overlap(tmp_path):
    turned = row()
    turned["paragraphs"].reverse()
    turned["paragraphs"].append({"pid": "both", "start": 6, "end": len(FIRST) + 6})
    (tmp_path / "d.jsonl").write_text(json.dumps(turned))
    found = [(p.passage_id, p.text) for p in read_corpus([str(tmp_path / "d.jsonl")]).passages]
    assert found == [("p0", "Pumps are green."), ("both", "are green.\nValves"), ("p1", "Valves are old.")]


def test_paragraphs_that_are_not_found_give_way_to_windows(tmp_path):
    cut = {"text": "Cafe\u0301 here.", "paragraphs": [{"pid": "accent", "start": 4, "end": 11}]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row(**cut)))
    assert [p.passage_id for p in read_corpus([str(tmp_path / "d.jsonl")]).passages] == ["d#0"]


def test_paragraphs_are_those_of_their_line_whatever_id_the_document_gets(tmp_path):
    lines = [row(text=f"{name} is green.", paragraphs=[{"pid": name, "start": 0, "end": 8}]) for name in "abc"]
    lines[1]["doc_id"] = None
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    passages = read_corpus([str(tmp_path / "d.jsonl")]).passages
    assert [p.passage_id for p in passages] == ["a", "b", "c"]
    assert [p.doc_id for p in passages] == ["d", "d.jsonl#2", f"{tmp_path.name}/d"]


@pytest.mark.parametrize(
    "wrong", ["p0", {"pid": "p0"}, {"pid": "p0", "start": -3, "end": 5}, {"pid": "p0", "start": 0, "end": 999}]
)
def test_paragraphs_that_are_no_part_of_the_text_are_refused(tmp_path, wrong):
    """One that is left out would be missing from the RAG arms' index, and from no other arm."""
    (tmp_path / "d.jsonl").write_text(json.dumps(row(paragraphs=[wrong])))
    with pytest.raises(UsageError, match="no part of its text"):
        read_corpus([str(tmp_path / "d.jsonl")])


def test_folders_are_split_into_windows_and_every_document_counts_in_the_digest(corpus_dir):
    before = read_corpus([str(corpus_dir)])
    assert {p.doc_id for p in before.passages} == {"alpha.md", "beta.txt", "delta.md", "omega.txt"}
    (corpus_dir / "omega.txt").write_text("Somebody has seen it.\n")
    after = read_corpus([str(corpus_dir)])
    assert after.sha256 != before.sha256
    assert before.facts()["num_documents"] == 4


def test_shared_sets_keep_their_paragraphs_and_ids(shared_data):
    squad = read_corpus([str(shared_data / "dev/squad/tiny4k/documents.jsonl")])
    questions = load_questions(shared_data / "dev/squad/tiny4k/questions.jsonl")
    passage_ids = {passage.passage_id for passage in squad.passages}
    assert len(squad.passages) == 22
    assert all(passage_ids.issuperset(question.passage_ids) for question in questions)
    packed = read_corpus([str(shared_data / "dev/hotpotqa/small/documents.jsonl.gz")])
    assert len(packed.passages) == 160 - packed.facts()["duplicates"]


def test_an_empty_corpus_is_the_error_of_the_engine(tmp_path):
    with pytest.raises(EmptyCorpus):
        read_corpus([str(tmp_path)])


def test_quality_is_by_passage_where_questions_name_passages(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row()))
    passages = read_corpus([str(tmp_path / "d.jsonl")]).passages
    bm25 = build_retrievers({"bm25"}, passages, None)["bm25"]
    right = Question("1", "Which pumps are green?", ("green",), ("d",), ("p0",))
    wrong = Question("2", "Which pumps are green?", ("green",), ("d",), ("p1",))
    assert retrieval_quality(bm25, [right, wrong], passages) == {
        "unit": "passage",
        "n": 2,
        "recall@1": 0.5,
        "recall@3": 1.0,
        "recall@5": 1.0,
        "recall@10": 1.0,
        "mrr": 0.75,
        "ndcg@10": pytest.approx((1 + 1 / 1.584962500721156) / 2),
    }


def test_questions_whose_passages_are_not_there_make_no_documents_of_the_others(tmp_path):
    """By document, one document would be found for every question."""
    (tmp_path / "d.jsonl").write_text(json.dumps(row()))
    passages = read_corpus([str(tmp_path / "d.jsonl")]).passages
    bm25 = build_retrievers({"bm25"}, passages, None)["bm25"]
    wrong = Question("1", "Which pumps are green?", ("green",), ("d",), ("p1",))
    cut_off = Question("2", "Which pipes are red?", ("red",), ("d",), ("p2",))
    quality = retrieval_quality(bm25, [wrong, cut_off], passages)
    assert (quality["unit"], quality["n"], quality["recall@1"]) == ("passage", 1, 0.0)


def test_questions_that_name_documents_alone_are_scored_with_the_others(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row()))
    passages = read_corpus([str(tmp_path / "d.jsonl")]).passages
    bm25 = build_retrievers({"bm25"}, passages, None)["bm25"]
    by_passage = Question("1", "Which pumps are green?", ("green",), ("d",), ("p1",))
    by_document = Question("2", "Which pumps are red?", ("red",), ("d",), ())
    quality = retrieval_quality(bm25, [by_passage, by_document], passages)
    assert (quality["unit"], quality["n"]) == ("document", 2)


def test_quality_is_by_document_otherwise_and_none_without_known_gold(corpus_dir):
    passages = read_corpus([str(corpus_dir)]).passages
    bm25 = build_retrievers({"bm25"}, passages, None)["bm25"]
    known = Question("1", "What is the code of the alpha gate?", ("4711",), ("alpha.md",), ())
    foreign = Question("2", "Who?", ("me",), ("elsewhere.md",), ())
    quality = retrieval_quality(bm25, [known, foreign], passages)
    assert (quality["unit"], quality["n"], quality["recall@1"]) == ("document", 1, 1.0)
    assert retrieval_quality(bm25, [foreign], passages) is None


def test_dense_retrieval_without_an_embedder_is_refused(corpus_dir):
    passages = read_corpus([str(corpus_dir)]).passages
    assert build_retrievers(set(), passages, None) == {}
    with pytest.raises(UsageError, match="embedder"):
        build_retrievers({"hybrid"}, passages, None)
