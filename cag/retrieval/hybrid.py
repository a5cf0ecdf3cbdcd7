"""Hybrid retrieval: a weighted sum of two retrievers' scores, each scaled to 0..1 within the query.

Fusing scores measured better than fusing ranks on SQuAD and HotpotQA (reciprocal rank fusion lost 7 points of SQuAD
Recall@1), because a rank forgets by how much the first passage leads.
"""

from __future__ import annotations

import numpy as np

from cag.errors import UsageError
from cag.retrieval.base import ExactRetriever, Vectors


class HybridRetriever(ExactRetriever):
    """`weight` times the min-max scaled dense score, plus `1 - weight` times the min-max scaled BM25 score."""

    name = "hybrid"

    def __init__(self, bm25: ExactRetriever, dense: ExactRetriever, weight: float = 0.5) -> None:
        """Raises: `UsageError` when the two rank other passages, or `weight` is outside 0..1."""
        super().__init__(bm25.passages)
        if bm25.passages != dense.passages:
            raise UsageError("The two retrievers of a hybrid one must be built over the same passages.")
        if not 0.0 <= weight <= 1.0:
            raise UsageError(f"weight must be between 0 and 1, found {weight}.")
        self._bm25 = bm25
        self._dense = dense
        self._weight = weight

    def scores(self, query: str) -> Vectors:
        """See `ExactRetriever.scores`. Between 0 and 1."""
        sparse_part = (1.0 - self._weight) * min_max(self._bm25.scores(query))
        fused: Vectors = self._weight * min_max(self._dense.scores(query)) + sparse_part
        return fused


def min_max(scores: Vectors) -> Vectors:
    """`scores` scaled linearly so that the lowest is 0 and the highest 1; all 0 when they are all equal."""
    low, high = scores.min(), scores.max()
    if high <= low:
        return np.zeros_like(scores)
    scaled: Vectors = (scores - low) / (high - low)
    return scaled
