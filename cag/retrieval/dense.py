"""Dense retrieval: exact cosine similarity of embeddings in numpy.

A corpus that fits a model's window has hundreds of passages; a matrix product over them takes microseconds, so there
is no approximate index here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cag.errors import UsageError
from cag.retrieval.base import Embedder, ExactRetriever, Passage, Vectors


class DenseRetriever(ExactRetriever):
    """Cosine similarity between the query's vector and each passage's."""

    name = "dense"

    def __init__(self, passages: Sequence[Passage], embedder: Embedder, *, vectors: Vectors | None = None) -> None:
        """Embed the passages, or take `vectors` [number of passages, num_dimensions] that `embedder` made before.

        Raises: `UsageError` when `vectors` has another shape.
        """
        super().__init__(passages)
        self._embedder = embedder
        if vectors is None:
            vectors = embedder.embed_passages([passage.indexed_text for passage in passages])
        expected = (len(passages), embedder.num_dimensions)
        if vectors.shape != expected:
            raise UsageError(f"The passage vectors have shape {vectors.shape}, expected {expected}.")
        self.vectors: Vectors = np.ascontiguousarray(vectors, dtype=np.float32)

    def scores(self, query: str) -> Vectors:
        """See `ExactRetriever.scores`. Between -1 and 1; the vectors are unit vectors."""
        scores: Vectors = self.vectors @ self._embedder.embed_query(query)
        return scores
