"""Answers of as many tokens as were asked for: a model whose answers end nowhere before. Knows no arms and no peers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

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
