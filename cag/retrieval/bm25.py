"""BM25 over stemmed words (bm25s, PyStemmer). Stop words stay: leaving them out measured worse.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009; the variant is Lucene's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import Stemmer

from cag.retrieval.base import ExactRetriever, Passage, Vectors
from cag.retrieval.words import split_words


def _imported_bm25s() -> ModuleType:
    """bm25s without JAX: where it finds JAX it starts it at once, and JAX takes three quarters of a GPU's memory."""
    hidden = "jax" not in sys.modules
    if hidden:
        sys.modules["jax"] = None  # type: ignore[assignment]  # an import of it fails
    try:
        import bm25s
    finally:
        if hidden:
            del sys.modules["jax"]
    return bm25s  # type: ignore[no-any-return]


bm25s = _imported_bm25s()


class Bm25Retriever(ExactRetriever):
    """Exact BM25 scores of every passage; words that no passage has add nothing."""

    name = "bm25"

    def __init__(
        self, passages: Sequence[Passage], *, k1: float = 1.5, b: float = 0.75, language: str = "english"
    ) -> None:
        """Index the title and text of each passage. `language` is a Snowball stemmer's name."""
        super().__init__(passages)
        self._language = language
        tokens = [self._words(passage.indexed_text) for passage in passages]
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._has_words = any(tokens)
        if self._has_words:
            self._index.index(tokens, show_progress=False)

    def scores(self, query: str) -> Vectors:
        """See `ExactRetriever.scores`. All zero when the query shares no word with the passages."""
        known = self._index.get_tokens_ids(self._words(query)) if self._has_words else []
        if not known:
            return np.zeros(len(self.passages), dtype=np.float32)
        scores: Vectors = self._index.get_scores_from_ids(known)
        return scores

    def _words(self, text: str) -> list[str]:
        # A stemmer object is not safe to share between threads, and costs microseconds to make.
        words: list[str] = Stemmer.Stemmer(self._language).stemWords(split_words(text))
        return words
