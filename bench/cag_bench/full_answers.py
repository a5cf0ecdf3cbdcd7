"""Answers of as many tokens as were asked for: a model whose answers end nowhere before, and what they say up to where
they would have ended. Knows no arms and no peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from cag.generation.thoughts import read_answer
from cag.model import LanguageModel


@contextmanager
def answers_of_full_length(model: LanguageModel) -> Iterator[None]:
    """Inside, no answer ends before its number of tokens, neither at a stop token nor at a text of the template."""
    stop_ids, template = model.stop_ids, model.template
    model.stop_ids, model.template = frozenset(), replace(template, stop_strings=())
    try:
        yield
    finally:
        model.stop_ids, model.template = stop_ids, template


def answer_reader(model: LanguageModel) -> Callable[[Sequence[int]], str]:
    """Tokens of an answer to its text, which ends where the model's answers end now: at a stop token, or before a text
    of the template."""
    stop_ids, template = model.stop_ids, model.template
    form = model.thinking.form(template, think=False)

    def text_of(token_ids: Sequence[int]) -> str:
        end = next((place for place, token in enumerate(token_ids) if token in stop_ids), None)
        text = read_answer(model.tokenizer, form, token_ids[:end]).text
        ends = [place for stop in template.stop_strings if (place := text.find(stop)) >= 0]
        return text[: min(ends, default=None)].strip()

    return text_of
