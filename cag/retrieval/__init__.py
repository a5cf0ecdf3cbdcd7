"""Retrieval for the RAG path: documents are split into passages, and a retriever ranks them for a query.

`build_retriever` makes one by its kind. Other distributions plug theirs in (a vector database, say) through the entry
point group `cag.retrievers`: the entry's name is the kind, its value a callable `(passages, embedder) -> Retriever`.
`MiniLmEmbedder` stands in `cag.retrieval.minilm`, so that this package loads without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import entry_points

from cag.errors import UsageError
from cag.retrieval.base import Embedder, ExactRetriever, Passage, Retriever, ScoredPassage
from cag.retrieval.bm25 import Bm25Retriever
from cag.retrieval.dense import DenseRetriever
from cag.retrieval.hybrid import HybridRetriever
from cag.retrieval.passages import split_passages

__all__ = [
    "Bm25Retriever",
    "DenseRetriever",
    "Embedder",
    "ExactRetriever",
    "HybridRetriever",
    "Passage",
    "Retriever",
    "ScoredPassage",
    "available_retrievers",
    "build_retriever",
    "split_passages",
]

ENTRY_POINT_GROUP = "cag.retrievers"

RetrieverFactory = Callable[[Sequence[Passage], Embedder | None], Retriever]


def build_retriever(kind: str, passages: Sequence[Passage], embedder: Embedder | None = None) -> Retriever:
    """A retriever of `kind` ("bm25", "dense", "hybrid" or a plugged-in one) over `passages`.

    Raises: `UsageError` for an unknown kind, or when the kind needs an embedder and has none; `EmptyCorpus` without
    passages.
    """
    return _factory(kind)(passages, embedder)


def available_retrievers() -> list[str]:
    """The kinds `build_retriever` knows, built-in ones first."""
    plugged_in = sorted(entry.name for entry in entry_points(group=ENTRY_POINT_GROUP) if entry.name not in _BUILT_IN)
    return [*_BUILT_IN, *plugged_in]


def _factory(kind: str) -> RetrieverFactory:
    if kind in _BUILT_IN:
        return _BUILT_IN[kind]
    for entry in entry_points(group=ENTRY_POINT_GROUP, name=kind):
        factory: RetrieverFactory = entry.load()
        return factory
    raise UsageError(f"Unknown retriever {kind!r}.", hint=f"Known: {', '.join(available_retrievers())}.")


def _build_bm25(passages: Sequence[Passage], _embedder: Embedder | None) -> Bm25Retriever:
    return Bm25Retriever(passages)


def _build_dense(passages: Sequence[Passage], embedder: Embedder | None) -> DenseRetriever:
    if embedder is None:
        raise UsageError("Dense retrieval needs an embedder.", hint="Give one, or use bm25.")
    return DenseRetriever(passages, embedder)


def _build_hybrid(passages: Sequence[Passage], embedder: Embedder | None) -> HybridRetriever:
    return HybridRetriever(Bm25Retriever(passages), _build_dense(passages, embedder))


_BUILT_IN: dict[str, RetrieverFactory] = {"bm25": _build_bm25, "dense": _build_dense, "hybrid": _build_hybrid}
