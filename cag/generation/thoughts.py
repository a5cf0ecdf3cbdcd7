"""Tokens of an answer to its text, with what the model thinks before it apart. The one place where that is done.

Thoughts stand at the very beginning, between marks, or the prompt has opened them; a mark behind them is text like any
other. Marks may be special tokens, which are otherwise never shown, or written out in several tokens. Knows a tokenizer
and an `AnswerForm`; knows no model and no sampling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream

from cag.generation.answer import Piece, joined
from cag.thinking import AnswerForm, Marks

_TOKEN = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")  # what is one token of a mark where that has tokens of its own


class ThoughtSplitter:
    """Splits a text that comes in pieces; however it is cut, the parts are the same."""

    def __init__(self, marks: Marks = (), *, opened: str = "", opening: str = "") -> None:
        """Arguments: as in `AnswerForm`."""
        self._beginnings = dict(marks) | ({opening: ""} if opening else {})  # each with the end of what it begins
        self._end = opened
        self._held = ""
        self._has_begun = not (self._beginnings or opened)
        self.is_thinking = bool(opened)

    @property
    def is_answering(self) -> bool:
        """Whether all that comes is the answer's."""
        return self._has_begun and not self.is_thinking

    def awaits(self, text: str) -> bool:
        """Whether `text` belongs to the mark by which the thoughts that are under way end."""
        return self.is_thinking and text in self._end

    def split(self, text: str, *, is_last: bool = False) -> Piece:
        """What of `text`, and of what was held back before, certainly belongs to one or the other; behind the last
        piece, all of it."""
        self._held += text
        if not self._has_begun:
            self._begin(is_last)
        reasoning = self._think(is_last) if self._has_begun and self.is_thinking else ""
        answer = ""
        if self.is_answering:
            answer, self._held = self._held, ""
        return Piece(answer, reasoning)

    def _begin(self, is_last: bool) -> None:
        text = self._held.lstrip()
        found = min((mark for mark in self._beginnings if text.startswith(mark)), key=len, default=None)
        if found is None and not is_last and any(mark.startswith(text) for mark in self._beginnings):
            return
        self._has_begun = True
        if found is not None:
            self._held, self._end = text[len(found) :], self._beginnings[found]
        self.is_thinking = bool(self._end)

    def _think(self, is_last: bool) -> str:
        thought, mark, rest = self._held.partition(self._end)
        if mark:
            self._held, self.is_thinking = rest, False
            return thought
        shown = len(thought) - (0 if is_last else held_back(thought, (self._end,)))
        self._held = thought[shown:]
        return thought[:shown]


class AnswerReader:
    """Reads the tokens of an answer one by one."""

    def __init__(self, tokenizer: Any, form: AnswerForm | None = None) -> None:
        """Without a form nothing is a thought."""
        self._tokenizer = tokenizer
        self.splitter = ThoughtSplitter()
        if form is not None:
            self.splitter = ThoughtSplitter(form.marks, opened=form.opened, opening=form.opening)
        whole = set() if form is None else {form.opened, form.opening}.union(*form.marks)
        self._marks = _tokens_of(tokenizer, whole)
        self._in_answers = {token: text for token, text in self._marks.items() if text in whole}
        self._restart()

    def read(self, token: int) -> Piece:
        """Text that is there with one more token."""
        mark = (self._in_answers if self.splitter.is_answering else self._marks).get(token)
        if mark is not None:
            text = self._rest() + mark
            self._restart()
            return self.splitter.split(text)
        return self.splitter.split(self._step(token))

    def end(self) -> Piece:
        """Bytes of a character that the last token left open, and what may have been a mark."""
        return self.splitter.split(self._rest(), is_last=True)

    def thinks_on(self, token: int) -> bool:
        """Whether a token that ends turns is only a part of the mark that ends thoughts."""
        return self.splitter.awaits(self._marks.get(token) or "\0")

    def _restart(self) -> None:
        self._stream = DecodeStream(skip_special_tokens=True)
        self._unread: list[int] = []  # tokens whose text is not there yet

    def _step(self, token: int) -> str:
        """Tokens of single bytes are decoded a run at a time: one that is no UTF-8 takes back what its beginning gave,
        which stays here; the rest of the run begins another one."""
        backend = self._tokenizer.backend_tokenizer
        self._unread.append(token)
        try:
            text = self._stream.step(backend, token)
        except Exception:  # tokenizers has no type of its own for it
            self._stream = DecodeStream(skip_special_tokens=True)
            text = "".join(self._stream.step(backend, unread) or "" for unread in self._unread)
        if text:
            self._unread = []
        return text or ""

    def _rest(self) -> str:
        unread, self._unread = self._unread, []
        text: str = self._tokenizer.decode(unread, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def read_answer(tokenizer: Any, form: AnswerForm, token_ids: Iterable[int]) -> Piece:
    """Tokens of a whole answer."""
    reader = AnswerReader(tokenizer, form)
    return joined([*map(reader.read, token_ids), reader.end()])


def without_thoughts(text: str, marks: Marks) -> str:
    """An answer that somebody kept, without thoughts that stand before it; all of it where these have no end."""
    splitter = ThoughtSplitter(marks)
    answer = splitter.split(text).text
    return answer if splitter.is_answering else text


def held_back(text: str, marks: Sequence[str]) -> int:
    """Characters at the end of `text` that may be the beginning of one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


def _tokens_of(tokenizer: Any, marks: Iterable[str]) -> dict[int, str]:
    texts = {text for mark in marks for text in _TOKEN.findall(mark)}
    found = {tokenizer.backend_tokenizer.token_to_id(text): text for text in texts}
    return {token: text for token, text in found.items() if token is not None}
