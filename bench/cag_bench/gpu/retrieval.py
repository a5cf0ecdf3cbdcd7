"""What retrieving takes on this machine's processor: the project's own BM25 over as many words as the prefix has."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from cag.retrieval import build_retriever, split_passages
from cag_bench.gpu.clock import Budget

TEXTS = Path(__file__).resolve().parents[3] / "examples" / "handbook" / "docs"
QUERY = "Who approves leave of more than two weeks, and how long before has it to be asked for?"
TOKENS_PER_WORD = 1.3
NUM_PASSAGES = 10


@dataclass(frozen=True)
class _Text:
    doc_id: str
    title: str
    text: str


def retrieval_samples(num_tokens: int, count: int, budget: Budget) -> list[float] | None:
    """Seconds of each query over the example's texts, repeated to `num_tokens`; None where the texts are not."""
    files = sorted(TEXTS.rglob("*.md"))
    if not files:
        return None
    documents: list[_Text] = []
    num_words = 0
    while num_words * TOKENS_PER_WORD < num_tokens:
        file = files[len(documents) % len(files)]
        documents.append(_Text(f"{len(documents)}", file.stem, file.read_text(encoding="utf-8")))
        num_words += len(documents[-1].text.split())
    retriever = build_retriever("bm25", split_passages(documents))
    samples: list[float] = []
    while len(samples) < count and (budget.left_s > 0 or not samples):
        begin = time.perf_counter()
        retriever.retrieve(QUERY, NUM_PASSAGES)
        samples.append(time.perf_counter() - begin)
    return samples
