"""A corpus cut so that its prompt has exactly as many tokens as wanted. Knows a tokenizer; no model and no store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cag.corpus import Document
from cag.corpus.document import text_sha256
from cag.errors import UsageError
from cag.prompt import PromptTemplate, lay_out
from cag_bench.corpus import BenchCorpus

MAX_STEPS_BACK = 200  # characters; a token more or less comes with nearly every few of them


def cut_corpus(corpus: BenchCorpus, tokenizer: Any, template: PromptTemplate, num_tokens: int) -> BenchCorpus:
    """The first documents, the last of them cut, so that `lay_out` makes `num_tokens` tokens of them.

    Raises: `UsageError` for a corpus that is too small, or a size that no cut meets.
    """

    def count(num_characters: int) -> int:
        documents = first_characters(corpus.documents, num_characters)
        return len(lay_out(tokenizer, template, documents).token_ids)

    low, high = 0, sum(len(document.text) for document in corpus.documents)
    if count(high) < num_tokens:
        raise UsageError(f"the corpus has {count(high)} tokens with its prompt, fewer than {num_tokens}.")
    while low < high:  # the least cut that has enough; nearly monotone is good enough, since what follows looks around
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) >= num_tokens else (middle + 1, high)
    for step in range(MAX_STEPS_BACK):
        for cut in {low + step, max(0, low - step)}:
            if count(cut) == num_tokens:
                report = replace(corpus.report, documents=first_characters(corpus.documents, cut))
                return replace(corpus, report=report, passages=())
    raise UsageError(
        f"no cut of the corpus has exactly {num_tokens} tokens with its prompt.", hint="Take another size."
    )


def first_characters(documents: Sequence[Document], num_characters: int) -> tuple[Document, ...]:
    """Documents until `num_characters` characters of text are taken; one that would be blank is left out."""
    taken: list[Document] = []
    for document in documents:
        text = document.text[: max(0, num_characters)].rstrip()
        num_characters -= len(document.text)
        if text:
            taken.append(replace(document, text=text, sha256=text_sha256(text)))
    return tuple(taken)
