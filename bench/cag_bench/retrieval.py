"""The retrievers of the RAG arms, built once before the clock, and how well they find what the questions rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cag.errors import UsageError
from cag.models import EMBEDDING_MODEL, fetch_model
from cag.retrieval import Bm25Retriever, DenseRetriever, Embedder, HybridRetriever, Passage, Retriever
from cag.retrieval.base import ExactRetriever
from cag.retrieval.minilm import MiniLmEmbedder
from cag_bench.figures import mean
from cag_bench.questions import Question
from cag_bench.retrieval_metrics import ndcg_at_k, recall_at_k, reciprocal_rank

RANKING_DEPTH = 100
RECALL_KS = (1, 3, 5, 10)


def load_embedder(device: str) -> MiniLmEmbedder:
    """The embedding model on `device`, pulled when it is not here yet. Raises as `fetch_model`."""
    return MiniLmEmbedder(fetch_model(EMBEDDING_MODEL).directory, device=device)


def build_retrievers(kinds: set[str], passages: Sequence[Passage], embedder: Embedder | None) -> dict[str, Retriever]:
    """The retrievers of `kinds` over the same passages; the hybrid one shares the indexes of the other two.

    Raises: `UsageError` when a kind needs an embedder and there is none; `EmptyCorpus` without passages.
    """
    retrievers: dict[str, Retriever] = {}
    if not kinds:
        return retrievers
    bm25 = Bm25Retriever(passages)
    if "bm25" in kinds:
        retrievers["bm25"] = bm25
    if needs_embedder(kinds):
        if embedder is None:
            raise UsageError("dense and hybrid retrieval need an embedder.")
        dense: ExactRetriever = DenseRetriever(passages, embedder)
        both = {"dense": dense, "hybrid": HybridRetriever(bm25, dense)}
        retrievers |= {kind: retriever for kind, retriever in both.items() if kind in kinds}
    return retrievers


def needs_embedder(kinds: set[str]) -> bool:
    """Whether one of `kinds` embeds queries."""
    return bool(kinds & {"dense", "hybrid"})


def retrieval_quality(
    retriever: Retriever, questions: Sequence[Question], passages: Sequence[Passage]
) -> dict[str, Any] | None:
    """Mean Recall@1/3/5/10, MRR and nDCG@10 in 0..1 over `questions_with_gold`. The `unit` is the passage or the
    document (ranked by its best passage). None when no question names anything that exists.
    """
    scored, by_passage = questions_with_gold(questions, passages)
    if not scored:
        return None
    rows = [_figures(retriever, question, by_passage=by_passage) for question in scored]
    figures = {name: mean([row[name] for row in rows]) for name in rows[0]}
    return {"unit": "passage" if by_passage else "document", "n": len(rows), **figures}


def questions_with_gold(questions: Sequence[Question], passages: Sequence[Passage]) -> tuple[list[Question], bool]:
    """The questions all of whose gold items are in the corpus, and whether these items are passages: they are where
    every question that names anything names passages, some of which exist; else they are documents."""
    named = [question for question in questions if question.doc_ids or question.passage_ids]
    known = {passage.passage_id for passage in passages}
    found = [question for question in named if question.passage_ids and known.issuperset(question.passage_ids)]
    if found and all(question.passage_ids for question in named):
        return found, True
    known = {passage.doc_id for passage in passages}
    return [question for question in named if question.doc_ids and known.issuperset(question.doc_ids)], False


def _figures(retriever: Retriever, question: Question, *, by_passage: bool) -> dict[str, float]:
    passages = [found.passage for found in retriever.retrieve(question.question, RANKING_DEPTH)]
    ids = [passage.passage_id if by_passage else passage.doc_id for passage in passages]
    ranking = list(dict.fromkeys(ids))
    gold = frozenset(question.passage_ids if by_passage else question.doc_ids)
    figures = {f"recall@{k}": recall_at_k(ranking, gold, k) for k in RECALL_KS}
    return figures | {"mrr": reciprocal_rank(ranking, gold), "ndcg@10": ndcg_at_k(ranking, gold, 10)}
