"""How a model thinks before it answers, read off its chat template and its tokenizer: what it is asked with to think,
which marks it may put around its thoughts, and how its template has answers that were given, without them.

The prefix of a cache is the same for answers with and without thoughts: only what stands behind a question differs.
Knows a tokenizer; knows no model, no store and no tokens of answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from cag.errors import UsageError
from cag.prompt import THOUGHTS, PromptTemplate, TemplateCut, cut_template, opened_thoughts

EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
"""How much a model may be asked to think, as clients say it."""

_AT_ONCE = {"enable_thinking": False}
_THINKING = {"enable_thinking": True, "thinking": True}

Marks = tuple[tuple[str, str], ...]
"""Pairs of marks, as those of `THOUGHTS`."""


@dataclass(frozen=True)
class AnswerForm:
    """How one answer is asked for and read.

    Attributes:
        template: the pieces of its prompt.
        given: what the template has between a question and an answer that was given.
        marks: what the model may put around thoughts, at the beginning.
        opened: the mark that ends the thoughts that the prompt has opened; empty if it has opened none.
        opening: what the model may put before an answer without thoughts; it is no part of it.
    """

    template: PromptTemplate
    given: str
    marks: Marks = ()
    opened: str = ""
    opening: str = ""


@dataclass(frozen=True)
class Thinking:
    """What is known of a model's thoughts.

    Attributes:
        after: what stands behind a question if the model is to think. None: not only that would have to differ, but
            the text before the question, too, which caches hold for answers at once.
        given, given_thinking: what stands between a question and an answer that was given, in conversations without
            and with thoughts.
        opening: see `AnswerForm`.
        marks: those that the template or the tokenizer knows.
        efforts: of `EFFORTS`, those that change nothing in the prompt of an answer with thoughts.
    """

    after: str | None
    given: str
    given_thinking: str
    opening: str = ""
    marks: Marks = ()
    efforts: tuple[str, ...] = EFFORTS

    def form(self, template: PromptTemplate, *, think: bool) -> AnswerForm:
        """For answers behind a prefix that was cut by `template`. Raises: UsageError: the model cannot think there."""
        if not think:
            return AnswerForm(template, self.given, self.marks, opened_thoughts(template.after))
        if self.after is None:
            raise UsageError(
                "the chat template of the model says before the documents whether to think, and caches hold what it "
                "says for answers without thoughts.",
                hint="Ask without thinking, or take a model whose template says so behind the question.",
            )
        asked = replace(template, after=self.after)
        return AnswerForm(asked, self.given_thinking, THOUGHTS, opened_thoughts(self.after), self.opening)


def thinking_from_json(stored: Mapping[str, Any]) -> Thinking:
    """What `dataclasses.asdict` made of one, and JSON of that."""
    marks = tuple((begin, end) for begin, end in stored["marks"])
    return Thinking(**dict(stored) | {"marks": marks, "efforts": tuple(stored["efforts"])})


def read_thinking(tokenizer: Any, template: PromptTemplate) -> Thinking:
    """Of a tokenizer whose chat template was cut to `template`."""
    source, marks = getattr(tokenizer, "chat_template", None), _known_marks(tokenizer)
    at_once = cut_template(tokenizer, **_AT_ONCE) if source else None
    given = template.after if at_once is None else at_once.given
    if at_once is None or not marks:  # there is nothing to choose
        return Thinking(template.after, given, given, marks=marks)
    thinking = cut_template(tokenizer, **_THINKING)
    if thinking is None or (thinking.before, thinking.middle) != (at_once.before, at_once.middle):
        return Thinking(None, given, given, marks=marks)
    knows_efforts = "reasoning_effort" in str(source)
    efforts = [
        effort
        for effort in EFFORTS
        if not knows_efforts or cut_template(tokenizer, **_THINKING, reasoning_effort=effort) == thinking
    ]
    return Thinking(thinking.asked, given, thinking.given, _opening(thinking), marks, tuple(efforts))


def _known_marks(tokenizer: Any) -> Marks:
    """Others would take text from the answer of a model that never thinks, if that begins with the name of a mark."""
    source, token_id = str(getattr(tokenizer, "chat_template", "")), tokenizer.backend_tokenizer.token_to_id
    return tuple((b, e) for b, e in THOUGHTS if b in source or e in source or token_id(b) is not None)


def _opening(cut: TemplateCut) -> str:
    """What stands before answers that were given and is not asked with: the channel of answers, or empty thoughts."""
    return cut.given[len(cut.asked) :].lstrip() if cut.given.startswith(cut.asked) else ""
