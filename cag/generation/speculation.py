"""Drafts of what an answer says next, copied from the corpus and from the conversation, and how many of their tokens a
step should run.

An answer that quotes goes on as its source does. A forward of several tokens costs little more than that of one, as
the weights and the prefix are read once for all of them; and it tells after each token which one the model would have
chosen, so drafted tokens are kept as far as the model agrees and the answer is the one without drafts
(docs/design/013-speculation.md). Knows token ids and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from cag.forward.step_cost import SHARED_READING, StepCost
from cag.ngrams import GrowingText, NgramIndex

MAX_DRAFT_TOKENS = 15  # of one answer in a step: with the token before them one tile
ROW_COUNTS = (2, 3, 5, 10, 16, 24, 32, 48, 64)  # tokens of a step with drafts: few, as each number is recorded once
LONGEST_CLASS = 8  # matches of so many tokens and more count as one kind


class Drafter:
    """Guesses how one answer goes on. Tell it each token of the answer; ask it before each step.

    How often a guess is right is counted for each length of its match, whether the guess was run or not, so an answer
    that stops to quote stops to pay for drafts and one that begins again is found. A rate is estimated as Krichevsky
    and Trofimov do, as if half of one guess had been right before the first.
    """

    def __init__(self, index: Callable[[], NgramIndex], token_ids: Sequence[int]) -> None:
        """`index` gives that of the corpus when it is first needed; `token_ids` are those read behind the corpus."""
        self._make_index = index
        self._read = token_ids
        self._text: GrowingText | None = None
        self._pending: list[int] = []  # tokens that no text holds yet
        self._guess: list[int] = []
        self._match_length = 0
        self._num_seen, self._num_right = [0] * (LONGEST_CLASS + 1), [0] * (LONGEST_CLASS + 1)

    def append(self, token: int) -> None:
        """The answer's next token; the guess is measured by it."""
        if self._guess:
            self._count(self._guess[0] == token)
            self._guess = self._guess[1:] if self._guess[0] == token else []
            self._match_length += 1
        self._pending.append(token)

    def guess(self, limit: int) -> list[int]:
        """At most `limit` tokens that may follow; none where nothing is like the end of the text."""
        text, index = self._grown_text(), self._make_index()
        own, corpus = text.find(), index.find(text.token_ids)
        count = min(limit, MAX_DRAFT_TOKENS)
        if own.length >= corpus.length:
            self._guess = text.copied(own.place, count) if own.length else []
        else:
            self._guess = index.token_ids[corpus.place : corpus.place + count].tolist()
        self._match_length = max(own.length, corpus.length)
        return list(self._guess)

    def chances(self) -> list[float]:
        """For each token of the last guess, how likely it is to be reached and right."""
        rates = [(right + 0.5) / (seen + 1) for right, seen in zip(self._num_right, self._num_seen, strict=True)]
        kinds = (min(self._match_length + index, LONGEST_CLASS) for index in range(len(self._guess)))
        return list(accumulate((rates[kind] for kind in kinds), lambda reached, rate: reached * rate))

    def _grown_text(self) -> GrowingText:
        if self._text is None:
            self._text = GrowingText(self._read)
        for token in self._pending:
            self._text.append(token)
        self._pending.clear()
        return self._text

    def _count(self, right: bool) -> None:
        kind = min(self._match_length, LONGEST_CLASS)
        self._num_seen[kind] += 1
        self._num_right[kind] += right


def share_rows(chances: Sequence[Sequence[float]], num_rows: int, cost: StepCost = SHARED_READING) -> list[int]:
    """How many drafted tokens of each answer a step should run, so that it makes most tokens for its time.

    Args:
        chances: of each answer in the step, as `Drafter.chances` gives them.
        num_rows: tokens that the step runs without drafts.
        cost: of steps, on what runs them.

    Of the few numbers of rows that steps with drafts have, the one with most expected tokens for its cost; rows go to
    the likeliest tokens. One answer and many at once follow the same rule: where many rows are there already, another
    row costs as much, but what a step makes without it is more.
    """
    likely = sorted(((chance, owner) for owner, of_one in enumerate(chances) for chance in of_one), reverse=True)
    expected = list(accumulate((chance for chance, _ in likely), initial=float(len(chances))))
    sizes = [size - num_rows for size in (num_rows, *ROW_COUNTS) if 0 <= size - num_rows <= len(likely)]
    best = max(sizes, key=lambda extra: expected[extra] / cost.of(num_rows + extra), default=0)
    counts = [0] * len(chances)
    for _, owner in likely[:best]:
        counts[owner] += 1
    return counts
