"""A corpus cut so that its prompt has exactly as many tokens as wanted. Knows a tokenizer; no model and no store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cag.corpus import Document
from cag.corpus.document import text_sha256
from cag.errors import UsageError
from cag.prompt import PromptTemplate, lay_out
from cag_bench.corpus import BenchCorpus

MAX_STEPS = 12  # characters, either way: a token more or less comes with every few of them


def cut_corpus(corpus: BenchCorpus, tokenizer: Any, template: PromptTemplate, num_tokens: int) -> BenchCorpus:
    """The first documents, the last of them cut, so that `lay_out` makes `num_tokens` tokens of them.

    A document's marker brings several tokens at once, so where no cut meets the size, the first documents are left out
    one after the other. Passages that reach beyond the cut are left out.

    Raises: `UsageError` for a corpus that is too small, a size below that of the prompt, or one that no cut meets.
    """

    def count(documents: Sequence[Document]) -> int:
        return len(lay_out(tokenizer, template, documents).token_ids)

    if count(()) >= num_tokens:
        raise UsageError(f"the prompt alone has {count(())} tokens; {num_tokens} leave no room for a document.")
    if count(corpus.documents) < num_tokens:
        raise UsageError(f"the corpus has {count(corpus.documents)} tokens with its prompt, fewer than {num_tokens}.")
    for first in range(len(corpus.documents)):
        cut = _cut(corpus.documents[first:], count, num_tokens)
        if cut is not None:
            return corpus.cut_to(cut)
    raise UsageError(
        f"no cut of the corpus has exactly {num_tokens} tokens with its prompt.", hint="Take another size."
    )


def _cut(
    documents: Sequence[Document], count: Callable[[Sequence[Document]], int], num_tokens: int
) -> tuple[Document, ...] | None:
    """The cut of `documents` that has `num_tokens` tokens, if there is one near where there are enough."""
    low, high = 0, sum(len(document.text) for document in documents)
    while low < high:  # the least cut that has enough; counts nearly rise, and what follows looks around
        middle = (low + high) // 2
        enough = count(first_characters(documents, middle)) >= num_tokens
        low, high = (low, middle) if enough else (middle + 1, high)
    for step in range(MAX_STEPS):
        for place in {low + step, max(0, low - step)}:
            cut = first_characters(documents, place)
            if count(cut) == num_tokens:
                return cut
    return None


def first_characters(documents: Sequence[Document], num_characters: int) -> tuple[Document, ...]:
    """Documents until `num_characters` characters of text are taken; one that would be blank is left out."""
    taken: list[Document] = []
    for document in documents:
        text = document.text[: max(0, num_characters)].rstrip()
        num_characters -= len(document.text)
        if text:
            taken.append(replace(document, text=text, sha256=text_sha256(text)))
    return tuple(taken)
