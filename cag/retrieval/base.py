"""The contracts of retrieval: passages, retrievers that rank them, embedders that turn text into vectors.

A passage goes in with the title that places it ("file > heading"); a ranked list of passages comes out for a query.
Nothing here knows of language models, caches or prompts. A vector database is plugged in by a subclass of
`Retriever`; a method that scores every passage subclasses `ExactRetriever`, which ranks them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cag.errors import EmptyCorpus, UsageError

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Passage:
    """A retrieval unit: the characters `start:end` of one document's text, and the title that places them."""

    passage_id: str
    doc_id: str
    title: str
    text: str
    start: int
    end: int

    @property
    def indexed_text(self) -> str:
        """What retrievers index: the title, then the text."""
        return f"{self.title}\n{self.text}" if self.title else self.text


@dataclass(frozen=True)
class ScoredPassage:
    """A passage and its score. Scores compare within one query of one retriever only; higher is better."""

    passage: Passage
    score: float


class Embedder(ABC):
    """Text to unit vectors. Queries and passages are apart because some models prepend instructions to one side."""

    name: str
    num_dimensions: int

    @abstractmethod
    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors [len(texts), num_dimensions], in the order of `texts`."""

    @abstractmethod
    def embed_query(self, text: str) -> Vectors:
        """The unit vector [num_dimensions] of one query."""


class Retriever(ABC):
    """Ranks the passages it was built over. Immutable after construction, so that threads may share it."""

    name: str

    @abstractmethod
    def retrieve(self, query: str, k: int) -> list[ScoredPassage]:
        """The best `min(k, number of passages)` passages, best first; ties in passage order.

        Raises: `UsageError` when `k` is below 1.
        """


class ExactRetriever(Retriever):
    """A retriever that scores every passage and ranks by score."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Raises: `EmptyCorpus` without passages."""
        if not passages:
            raise EmptyCorpus("There is no passage to retrieve from.", hint="Give documents that have text.")
        self.passages: tuple[Passage, ...] = tuple(passages)

    @abstractmethod
    def scores(self, query: str) -> Vectors:
        """The score of each passage, [number of passages], in passage order."""

    def retrieve(self, query: str, k: int) -> list[ScoredPassage]:
        """See `Retriever.retrieve`."""
        scores = self.scores(query)
        return [ScoredPassage(self.passages[index], float(scores[index])) for index in top_indices(scores, k)]


def top_indices(scores: Vectors, k: int) -> npt.NDArray[np.intp]:
    """Indices of the `min(k, len(scores))` highest scores, highest first; equal scores in index order.

    Raises: `UsageError` when `k` is below 1.
    """
    if k < 1:
        raise UsageError(f"k must be at least 1, found {k}.")
    if k >= len(scores):
        return np.argsort(-scores, kind="stable")
    # Every score equal to the k-th stays a candidate, so that ties are broken by index and not by the partition.
    kth_score = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= kth_score)
    return candidates[np.argsort(-scores[candidates], kind="stable")[:k]]
