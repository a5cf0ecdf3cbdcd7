"""The retrieval gate: the RAG path the engine is measured against must be a strong one."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from cag.models import fetch_model
from cag.retrieval import Embedder
from cag_bench.retrieval_gate import PARAGRAPH_SETS, evaluate_kinds, load_docs_corpus, load_paragraph_set, run_gate

GATE = [
    ("squad", "recall@1", 81.0),
    ("squad", "recall@5", 96.0),
    ("squad", "mrr", 88.0),
    ("hotpotqa", "recall@5", 78.0),
    ("hotpotqa", "recall@10", 91.0),
    ("nq_open", "recall@5", 97.5),
    ("docs_corpus", "hit@5", 95.0),
]


class LetterEmbedder(Embedder):
    """Counts of letters as unit vectors: a real, if weak, embedding that needs no model."""

    name = "letters"
    num_dimensions = 26

    def embed_passages(self, texts):
        counts = np.array([[text.lower().count(chr(97 + letter)) for letter in range(26)] for text in texts])
        counts = counts.reshape(-1, 26).astype(np.float32) + 1e-3
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    def embed_query(self, text):
        return self.embed_passages([text])[0]


def write_lines(path: Path, rows: list[dict]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def test_a_paragraph_set_is_loaded_and_measured(tmp_path):
    text = "Foxes sleep by day.\u2028Owls hunt by night."
    paragraphs = [{"pid": "fox", "start": 0, "end": 19}, {"pid": "owl", "start": 20, "end": len(text)}]
    document = {"doc_id": "d", "title": "Animals", "text": text, "paragraphs": paragraphs}
    write_lines(tmp_path / "documents.jsonl.gz", [document])
    rows = [("Who hunts at night?", ["owl"]), ("Do foxes sleep?", ["fox"]), ("No answer?", [])]
    write_lines(tmp_path / "questions.jsonl", [{"question": question, "pids": pids} for question, pids in rows])
    passages, questions = load_paragraph_set(tmp_path)
    assert [passage.text for passage in passages] == ["Foxes sleep by day.", "Owls hunt by night."]
    assert len(questions) == 2
    report = evaluate_kinds(passages, questions, LetterEmbedder())
    assert list(report) == ["bm25", "dense", "hybrid"]
    assert report["bm25"]["recall@1"] == report["bm25"]["mrr"] == 100.0


def test_evidence_is_looked_for_in_its_own_document(tmp_path):
    rows = [{"doc_id": f"{name}.md", "title": name, "text": "The key\nturns left."} for name in ("right", "wrong")]
    write_lines(tmp_path / "documents.jsonl.gz", rows)
    found = {"qid": "q1", "question": "Which way?", "doc_ids": ["right.md"], "evidence": "The key turns"}
    lost = {"qid": "q2", "question": "Which way?", "doc_ids": ["right.md"], "evidence": "not there"}
    write_lines(tmp_path / "questions.jsonl", [found, lost])
    passages, questions = load_docs_corpus(tmp_path)
    assert questions[0].passage_ids == {"right.md#0"}
    report = evaluate_kinds(passages, questions, LetterEmbedder())
    assert {figures["hit@5"] for figures in report.values()} == {50.0}


@pytest.fixture(scope="module")
def report(shared_data: Path):
    return run_gate(shared_data, Path(fetch_model("all-minilm-l6-v2")))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("data", "figure", "at_least"), GATE)
def test_hybrid_retrieval_passes_the_gate(report, data, figure, at_least):
    assert report[data]["hybrid"][figure] >= at_least


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("data", PARAGRAPH_SETS)
def test_the_hybrid_ranks_better_than_bm25_alone(report, data):
    assert report[data]["hybrid"]["mrr"] > report[data]["bm25"]["mrr"]
