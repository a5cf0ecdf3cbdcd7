"""Probes of a cache, made from its own corpus: where next tokens are predicted to see what a codec has cost.

Continuations: excerpts from all over the prefix, read behind all of it. Questions: the beginning of a sentence, asked
for in the chat template's form, with the text behind it as the answer. Where a short text has too few of both, it is
asked more: after each of its places in turn, in other words. Each is a branch of its own behind the prefix, so no probe
reads another one. Which they are depends on corpus and tokenizer alone. Knows no model, codec or store.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np

from cag.prompt import PrefixLayout, TextDocument, encode, question_ids

NUM_PROBES = 256
EXCERPT_TOKENS = 32
NUM_QUESTIONS = 4
ANSWER_TOKENS = 32

_SENTENCE = re.compile(r"[^\s.!?\u3002\uff01\uff1f][^\n.!?\u3002\uff01\uff1f]{23,159}")
_PASSAGE = re.compile(r"[^\s.!?\u3002\uff01\uff1f][^\n.!?\u3002\uff01\uff1f]{0,159}")
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # scripts that set no words apart
_WORD = re.compile(rf"[{_UNSPACED}]{{1,2}}|[^\s{_UNSPACED}]{{1,16}}")  # or a piece of one
_ANSWER_CHARACTERS = 12 * ANSWER_TOKENS  # more than they have, in any script
_GOLDEN = 0.6180339887498949  # multiples of it, without their whole parts, lie evenly however many there are

_ABOUT = (
    'What does "{title}" say about {topic}?',
    'Which sentence of "{title}" has the words "{topic}"?',
    "I want to know more of {topic}. What is written there?",
    'Quote the part of "{title}" on {topic}.',
    "Is there anything about {topic} in the documents?",
    "Tell me what you have read about {topic}.",
)
"""Answered by the passage that has the words."""
_ONWARD = (
    'How does this part of "{title}" go on? {opening}',
    "Read on from here, please: {opening}",
    'Which words come next in "{title}"? {opening}',
    'Finish this part of "{title}": {opening}',
    "What stands behind these words? {opening}",
    'Of "{title}" I have no more than this; complete it: {opening}',
)
"""Answered by the text behind the words."""


def warnings_about(method: str, num_probes: int) -> tuple[str, ...]:
    """What users have to know about a loss: whether it was measured at so few positions that it is a hint at most.
    Equal bits need none."""
    few = f"the loss was measured at {num_probes} positions, not at {NUM_PROBES} or more: the text is too short"
    return (few,) if method != "bits" and num_probes < NUM_PROBES else ()


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
    """Branches with `NUM_PROBES` probes or a few more; fewer only where the corpus is a few words.

    Args:
        tokenizer: of the model.
        layout: the prefix over `documents`.
        documents: of the corpus.
        room_tokens: what the model's window holds behind the prefix; longer branches are left out.
    """
    questions = [found for found in _questions(tokenizer, layout, documents) if len(found.token_ids) <= room_tokens]
    missing = NUM_PROBES - _num_probes(questions)
    excerpts = _continuations(layout, max(missing, NUM_PROBES // 2), min(EXCERPT_TOKENS, room_tokens))
    branches = list(dict.fromkeys(questions + excerpts))  # a text that repeats itself gives the same one again
    if _num_probes(branches) >= NUM_PROBES:
        return branches
    further = (found for found in _further(tokenizer, layout, documents) if len(found.token_ids) <= room_tokens)
    return _enough(chain(branches, further))


def _num_probes(branches: Iterable[Branch]) -> int:
    return sum(len(branch.targets) for branch in branches)


def _enough(branches: Iterable[Branch]) -> list[Branch]:
    """As many as give `NUM_PROBES` probes, without those that would probe behind the same tokens as one before."""
    kept: list[Branch] = []
    seen = set[tuple[int, ...]]()  # what stands before each probe
    for branch in branches:
        if len(seen) >= NUM_PROBES:
            break
        length = len(branch.token_ids)
        before = {branch.token_ids[:end] for end in range(length - len(branch.targets) + 1, length + 1)}
        if seen.isdisjoint(before):
            kept.append(branch)
            seen |= before
    return kept


def _questions(tokenizer: Any, layout: PrefixLayout, documents: Sequence[TextDocument]) -> list[Branch]:
    """At most `NUM_QUESTIONS`, about sentences evenly spread over the corpus."""
    places = [(document, found) for document in documents for found in _SENTENCE.finditer(document.text)]
    # the middle of each of as many equal parts
    chosen = sorted({(2 * part + 1) * len(places) // (2 * NUM_QUESTIONS) for part in range(NUM_QUESTIONS)})
    branches: list[Branch] = []
    for document, found in (places[index] for index in chosen[: len(places)]):
        cut = found.start() + _opening_length(found.group())
        opening = document.text[found.start() : cut]
        branches += _asked(
            tokenizer, layout, document, _ONWARD[0].format(title=document.title[:80], opening=opening), cut
        )
    return branches


def _further(tokenizer: Any, layout: PrefixLayout, documents: Sequence[TextDocument]) -> Iterator[Branch]:
    """Questions after every place of the corpus in every wording: each round goes through all places, evenly spread
    wherever it ends, and the wordings take turns."""
    places = [place for document in documents for place in _places(document)]
    order = sorted(range(len(places)), key=lambda index: index * _GOLDEN % 1)
    wordings = [wording for pair in zip(_ABOUT, _ONWARD, strict=True) for wording in pair]
    for first in range(len(wordings)):
        for turn, index in enumerate(order, start=first):
            place, wording = places[index], wordings[turn % len(wordings)]
            onward = wording in _ONWARD
            if place.opening or not onward:
                question = wording.format(title=place.document.title[:80], topic=place.topic, opening=place.opening)
                cut = place.start if onward else place.passage
                yield from _asked(tokenizer, layout, place.document, question, cut)


@dataclass(frozen=True)
class _Place:
    """The word at `start` and the one behind it, `topic`, and what stands before them in their passage."""

    document: TextDocument
    passage: int
    start: int
    topic: str
    opening: str


def _places(document: TextDocument) -> Iterator[_Place]:
    """One for each word."""
    for passage in _PASSAGE.finditer(document.text):
        words = list(_WORD.finditer(document.text, passage.start(), passage.end()))
        for word, behind in zip(words, [*words[1:], *words[-1:]], strict=True):
            topic = document.text[word.start() : behind.end()].strip(string.punctuation) or word.group()
            opening = document.text[passage.start() : word.start()]
            yield _Place(document, passage.start(), word.start(), topic, opening)


def _asked(tokenizer: Any, layout: PrefixLayout, document: TextDocument, question: str, cut: int) -> Iterator[Branch]:
    """The question with the text behind `cut` as its answer; none where that is blank."""
    rest = document.text[cut : cut + _ANSWER_CHARACTERS].strip()
    answer = encode(tokenizer, rest, special=False)[:ANSWER_TOKENS]
    if answer:
        asked = question_ids(tokenizer, layout.template, question)
        yield Branch("question", (*asked, *answer[:-1]), tuple(answer))


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
