"""What an answer carries: text, citations, token counts, timings, and which cache and model it came from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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


@dataclass(frozen=True)
class Timings:
    """Seconds. `load_s`: loading the cache; `prefill_s`: computing the rest of the prompt and the first token's logits,
    waiting for layers that still load included, so the two overlap; `ttft_s`: from the call to the first token;
    `tpot_s`: per further token; `retrieve_s`: retrieval, if any.
    """

    load_s: float
    prefill_s: float
    ttft_s: float
    tpot_s: float
    total_s: float
    retrieve_s: float = 0.0


@dataclass(frozen=True)
class CacheOrigin:
    """Which cache served the prefix, and from where: `device` (resident), or what it was loaded from for this request:
    `memory`, `disk` or `object-store` (the slowest of them); `none`."""

    name: str
    digest: str
    tier: str


@dataclass(frozen=True)
class Answer:
    """One answer with its proof."""

    text: str
    citations: tuple[Citation, ...]
    usage: Usage
    timings: Timings
    cache: CacheOrigin
    model: str
    finish_reason: str = "stop"
    token_ids: tuple[int, ...] = field(default=(), repr=False)

    def to_json(self) -> dict[str, Any]:
        """The object that `cag ask --json` prints."""
        return {
            "answer": self.text,
            "citations": [asdict(citation) for citation in self.citations],
            "usage": asdict(self.usage),
            "timings": asdict(self.timings),
            "cache": asdict(self.cache),
            "model": self.model,
            "finish_reason": self.finish_reason,
        }
