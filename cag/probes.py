"""Probes of a cache, made from its own corpus: where next tokens are predicted to see what a codec has cost.

Continuations: excerpts from all over the prefix, read behind all of it. Questions: the beginning of a sentence, asked
for in the chat template's form, with the text behind it as the answer. Each is a branch of its own behind the prefix,
so no probe reads another one. Which they are depends on corpus and tokenizer alone. Knows no model, codec or store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cag.prompt import PrefixLayout, TextDocument, encode, question_ids

NUM_PROBES = 256
EXCERPT_TOKENS = 32
NUM_QUESTIONS = 4
ANSWER_TOKENS = 32

_SENTENCE = re.compile(r"[^\s.!?\u3002\uff01\uff1f][^\n.!?\u3002\uff01\uff1f]{23,159}")
_ANSWER_CHARACTERS = 12 * ANSWER_TOKENS  # more than they have, in any script


@dataclass(frozen=True)
class Branch:
    """A sequence behind the prefix. The predictions of its last `len(targets)` tokens are probed; `targets` are the
    tokens that really follow them."""

    kind: Literal["continuation", "question"]
    token_ids: tuple[int, ...]
    targets: tuple[int, ...]


def make_probes(
    tokenizer: Any, layout: PrefixLayout, documents: Sequence[TextDocument], room_tokens: int
) -> list[Branch]:
    """Branches with `NUM_PROBES` probes or a few more; fewer where the corpus is too short for as many.

    Args:
        tokenizer: of the model.
        layout: the prefix over `documents`.
        documents: of the corpus.
        room_tokens: what the model's window holds behind the prefix; longer branches are left out.
    """
    questions = [found for found in _questions(tokenizer, layout, documents) if len(found.token_ids) <= room_tokens]
    missing = NUM_PROBES - sum(len(question.targets) for question in questions)
    return questions + _continuations(layout, max(missing, NUM_PROBES // 2), min(EXCERPT_TOKENS, room_tokens))


def _questions(tokenizer: Any, layout: PrefixLayout, documents: Sequence[TextDocument]) -> list[Branch]:
    """At most `NUM_QUESTIONS`, about sentences evenly spread over the corpus."""
    places = [(document, found) for document in documents for found in _SENTENCE.finditer(document.text)]
    # the middle of each of as many equal parts
    chosen = sorted({(2 * part + 1) * len(places) // (2 * NUM_QUESTIONS) for part in range(NUM_QUESTIONS)})
    branches = []
    for document, found in (places[index] for index in chosen[: len(places)]):
        cut = found.start() + _opening_length(found.group())
        question = f'How does this part of "{document.title[:80]}" go on? {document.text[found.start() : cut]}'
        asked = question_ids(tokenizer, layout.template, question)
        rest = document.text[cut : cut + _ANSWER_CHARACTERS].strip()
        answer = encode(tokenizer, rest, special=False)[:ANSWER_TOKENS]
        if answer:
            branches.append(Branch("question", (*asked, *answer[:-1]), tuple(answer)))
    return branches


def _opening_length(sentence: str) -> int:
    """Characters to the last space before the middle; half of all where words are not set apart."""
    middle = len(sentence) // 2
    space = sentence.rfind(" ", middle // 2, middle)
    return space if space >= 0 else middle


def _continuations(layout: PrefixLayout, num_probes: int, excerpt_tokens: int) -> list[Branch]:
    """Excerpts from the documents' part of the prefix, evenly spread and not overlapping, with `num_probes` tokens or a
    few more."""
    first = layout.spans[0].start if layout.spans else 0
    last = layout.spans[-1].end if layout.spans else len(layout.token_ids)
    length = min(excerpt_tokens, last - first - 1)  # the token behind the last one is a target
    if length < 1:
        return []
    count = min(-(-num_probes // length), (last - first - 1) // length)
    starts = np.linspace(first, last - 1 - length, count).astype(int)
    ids = layout.token_ids.tolist()
    return [
        Branch("continuation", tuple(ids[start : start + length]), tuple(ids[start + 1 : start + 1 + length]))
        for start in starts
    ]
