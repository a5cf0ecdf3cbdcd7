"""What an answer carries: text, what was thought before it, citations, token counts, timings, and which cache and model
it came from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """What a step adds to an answer: to its `text`, and to the `reasoning` before it, which comes first."""

    text: str = ""
    reasoning: str = ""


def joined(pieces: Iterable[Piece]) -> Piece:
    """Pieces that follow each other as one."""
    texts, reasonings = [], []
    for text, reasoning in pieces:
        texts.append(text)
        reasonings.append(reasoning)
    return Piece("".join(texts), "".join(reasonings))


@dataclass(frozen=True)
class Citation:
    """A literal span `quote` of a document that the answer rests on; `score` in [0, 1] says how well it covers it."""

    doc_id: str
    title: str
    path: str
    quote: str
    score: float


@dataclass(frozen=True)
class Usage:
    """Token counts. `cached_tokens` counts prompt tokens whose keys and values were not computed for this request.
    `reasoning_tokens` of the `completion_tokens` came before the answer itself: thoughts, with their marks.

    `drafted_tokens` were guessed and run along, `accepted_tokens` of them were what the model says
    (`cag.generation.speculation`); like times, they may differ between two runs of the same answer, so equality does
    not look at them.
    """

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    drafted_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Timings:
    """Seconds. `load_s`: loading the cache; `prefill_s`: computing the rest of the prompt and the first token's logits,
    waiting for layers that still load included, so the two overlap; `ttft_s`: from the call to the first token;
    `tpot_s`: per further token; `retrieve_s`: retrieval, if any; `answer_ttft_s`: from the call to the first token
    behind the thoughts; without thoughts as `ttft_s`, and 0 if they had no end.
    """

    load_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    total_s: float
    retrieve_s: float = 0.0
    answer_ttft_s: float = 0.0


@dataclass(frozen=True)
class CacheOrigin:
    """Which cache served the prefix, and from where: `device` (resident), or what it was loaded from for this request:
    `memory`, `disk` or `object-store` (the slowest of them); `none`."""

    name: str
    digest: str
    tier: str


@dataclass(frozen=True)
class Answer:
    """One answer with its proof. `reasoning` is what the model thought before it; it is no part of `text`."""

    text: str
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    cache: CacheOrigin
    model: str
    finish_reason: str = "stop"
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    reasoning: str = ""

    def to_json(self) -> dict[str, Any]:
        """The object that `cag ask --json` prints."""
        return {
            "answer": self.text,
            "reasoning": self.reasoning,
            "citations": [asdict(citation) for citation in self.citations],
            "usage": asdict(self.usage),
            "timings": asdict(self.timings),
            "cache": asdict(self.cache),
            "model": self.model,
            "finish_reason": self.finish_reason,
        }
