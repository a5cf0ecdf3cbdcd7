"""The contract of an arm: one way to answer a question, timed by the engine itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from cag.engine import Engine
from cag.generation.answer import Answer
from cag.generation.generate import SamplingOptions
from cag.prompt import PrefixLayout
from cag.retrieval import Passage, Retriever


@dataclass(frozen=True)
class ArmAnswer:
    """An answer, and what only the arm knows of it.

    `page_cache_dropped` is None where nothing was to be dropped, `passages` where nothing was retrieved. `read_s` is
    what reading the cache's files takes by itself, cold.
    """

    answer: Answer
    page_cache_dropped: bool | None = None
    passages: tuple[Passage, ...] | None = None
    read_s: float | None = None


@dataclass(frozen=True)
class ArmContext:
    """What arms are made of: the same engine for all. `cache_name` is None when no arm needs a cache."""

    engine: Engine
    layout: PrefixLayout
    cache_name: str | None
    retrievers: dict[str, Retriever]


class BenchArm(ABC):
    """Answers questions in one way. What a question needs beforehand is done in `ask`, before its clock starts."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def ask(self, question: str, options: SamplingOptions) -> ArmAnswer:
        """Answer one question; the timings of the answer count from where a user would have asked."""

    def close(self) -> None:
        """Give back what the arm holds."""
        return
