"""RAG arms: retrieve, embed the query, prefill the passages and the question, all inside the clock."""

from __future__ import annotations

from cag.fresh import RagPipeline
from cag.generation.generate import SamplingOptions
from cag.model import LanguageModel
from cag.retrieval import Passage, Retriever, ScoredPassage
from cag_bench.arms.base import ArmAnswer, BenchArm


class RecordingRetriever(Retriever):
    """Another retriever, whose last result can be read."""

    def __init__(self, retriever: Retriever) -> None:
        self.name = retriever.name
        self._retriever = retriever
        self.last: tuple[Passage, ...] = ()

    def retrieve(self, query: str, k: int) -> list[ScoredPassage]:
        """See `Retriever.retrieve`."""
        found = self._retriever.retrieve(query, k)
        self.last = tuple(scored.passage for scored in found)
        return found


class RagArm(BenchArm):
    """The engine's RAG path over an index that was built before."""

    def __init__(self, name: str, model: LanguageModel, retriever: Retriever, k: int) -> None:
        super().__init__(name)
        self._retriever = RecordingRetriever(retriever)
        self._pipeline = RagPipeline(model, self._retriever, k)

    def ask(self, question: str, options: SamplingOptions) -> ArmAnswer:
        """See `BenchArm`. Raises: `RequestTooLong` when the passages exceed the model's window."""
        answer = self._pipeline.ask(question, options)
        return ArmAnswer(answer, passages=self._retriever.last)
