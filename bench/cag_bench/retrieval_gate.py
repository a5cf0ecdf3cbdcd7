"""Retrieval quality of the RAG path on the evaluation data, measured as its reference figures were.

A data folder and an embedding model's folder go in; per data set and retriever the mean Recall@1/3/5/10, MRR and
nDCG@10 come out, in percent. Paragraphs are the passages of SQuAD, HotpotQA and NQ (the whole `all` sets, every
question); the documentation corpus is split into passages, and a passage is right when it holds the evidence.
Run it as `python -m cag_bench.retrieval_gate DATA_DIR EMBEDDER_DIR`.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cag.retrieval import Embedder, Passage, Retriever, build_retriever, split_passages
from cag.retrieval.base import Vectors
from cag.retrieval.minilm import MiniLmEmbedder
from cag_bench.retrieval_metrics import all_found_at_k, ndcg_at_k, recall_at_k, reciprocal_rank

KINDS = ("bm25", "dense", "hybrid")
PARAGRAPH_SETS = {"squad": "dev/squad/all", "hotpotqa": "dev/hotpotqa/all", "nq_open": "dev/nq_open/all"}
DOCS_CORPUS = "docs_corpus"
RANKING_DEPTH = 100

Figures = dict[str, float]
GateReport = dict[str, dict[str, Figures]]


@dataclass(frozen=True)
class GateDocument:
    """A document as `split_passages` takes it; `paragraphs` is empty where windows are wanted."""

    doc_id: str
    title: str
    text: str
    paragraphs: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class GateQuestion:
    """A question and the ids of the passages that answer it."""

    question: str
    passage_ids: frozenset[str]


class RememberingEmbedder(Embedder):
    """Embeds each text once, queries in batches ahead of time, so that the kinds of one data set share the work."""

    def __init__(self, embedder: Embedder) -> None:
        self.name = embedder.name
        self.num_dimensions = embedder.num_dimensions
        self._embedder = embedder
        self._vectors: dict[str, Vectors] = {}

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """See `Embedder.embed_passages`."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._vectors))
        self._vectors.update(zip(missing, self._embedder.embed_passages(missing), strict=True))
        return np.stack([self._vectors[text] for text in texts])

    def embed_query(self, text: str) -> Vectors:
        """See `Embedder.embed_query`. Right for models that treat queries and passages alike."""
        vector: Vectors = self.embed_passages([text])[0]
        return vector


def run_gate(data_dir: Path, embedder_dir: Path, progress: Callable[[str], None] | None = None) -> GateReport:
    """The figures of every data set and kind: `report[data set][kind][figure]`, in percent.

    `progress` is called with the name of each data set before it is measured.
    """
    embedder = MiniLmEmbedder(embedder_dir)
    loaders = {name: (load_paragraph_set, folder) for name, folder in PARAGRAPH_SETS.items()}
    loaders[DOCS_CORPUS] = (load_docs_corpus, DOCS_CORPUS)
    report: GateReport = {}
    for name, (load, folder) in loaders.items():
        if progress:
            progress(name)
        passages, questions = load(data_dir / folder)
        report[name] = evaluate_kinds(passages, questions, embedder)
    return report


def evaluate_kinds(
    passages: Sequence[Passage], questions: Sequence[GateQuestion], embedder: Embedder
) -> dict[str, Figures]:
    """The figures of each built-in kind over the same passages and questions."""
    shared = RememberingEmbedder(embedder)
    shared.embed_passages([question.question for question in questions])
    return {kind: evaluate(build_retriever(kind, passages, shared), questions) for kind in KINDS}


def evaluate(retriever: Retriever, questions: Sequence[GateQuestion]) -> Figures:
    """Mean figures over the questions, in percent; MRR over the first 100 passages."""
    return _mean_percent([_figures(retriever, question) for question in questions])


def _figures(retriever: Retriever, question: GateQuestion) -> Figures:
    ranking = [found.passage.passage_id for found in retriever.retrieve(question.question, RANKING_DEPTH)]
    relevant = question.passage_ids
    figures = {f"recall@{k}": recall_at_k(ranking, relevant, k) for k in (1, 3, 5, 10)}
    # A passage that holds the evidence suffices, however many overlapping ones hold it too.
    figures["hit@5"] = float(not relevant.isdisjoint(ranking[:5]))
    figures["mrr"] = reciprocal_rank(ranking, relevant)
    figures["ndcg@10"] = ndcg_at_k(ranking, relevant, 10)
    figures["all@10"] = all_found_at_k(ranking, relevant, 10)
    return figures


def _mean_percent(rows: Sequence[Figures]) -> Figures:
    return {figure: 100.0 * sum(row[figure] for row in rows) / len(rows) for figure in rows[0]}


def load_paragraph_set(folder: Path) -> tuple[list[Passage], list[GateQuestion]]:
    """Passages and answerable questions of a folder whose documents have `paragraphs` and whose questions `pids`."""
    passages = split_passages(_documents(folder))
    questions = [
        GateQuestion(row["question"], frozenset(row["pids"]))
        for row in _rows(folder / "questions.jsonl")
        if row["pids"]
    ]
    return passages, questions


def load_docs_corpus(folder: Path) -> tuple[list[Passage], list[GateQuestion]]:
    """Passages and questions of a folder whose questions have `doc_ids` and `evidence`, a literal quote."""
    passages = split_passages(_documents(folder))
    rows = _rows(folder / "questions.jsonl")
    return passages, [GateQuestion(row["question"], _holding_evidence(passages, row)) for row in rows]


def _holding_evidence(passages: Sequence[Passage], row: dict[str, Any]) -> frozenset[str]:
    evidence = _single_spaced(row["evidence"])
    holding = (
        passage.passage_id
        for passage in passages
        if passage.doc_id in row["doc_ids"] and evidence in _single_spaced(passage.text)
    )
    # Evidence that no passage holds whole can never be found: the question then counts as missed.
    return frozenset(holding) or frozenset({f"no passage holds the evidence of {row['qid']}"})


def _single_spaced(text: str) -> str:
    return " ".join(text.split())


def _documents(folder: Path) -> list[GateDocument]:
    return [
        GateDocument(row["doc_id"], row["title"], row["text"], tuple(row.get("paragraphs", ())))
        for row in _rows(folder / "documents.jsonl")
    ]


def _rows(path: Path) -> list[dict[str, Any]]:
    compressed = path.with_name(path.name + ".gz")
    text = gzip.decompress(compressed.read_bytes()).decode() if compressed.is_file() else path.read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def main() -> None:
    """Print one JSON line a data set and kind."""
    data_dir, embedder_dir = (Path(argument) for argument in sys.argv[1:])
    report = run_gate(data_dir, embedder_dir, progress=lambda name: print(f"measuring {name} ...", file=sys.stderr))
    for name, kinds in report.items():
        for kind, figures in kinds.items():
            print(json.dumps({"data": name, "kind": kind} | {key: round(value, 1) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
