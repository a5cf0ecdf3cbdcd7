"""Inline markup of reStructuredText as docutils reads it, in linear time also where marks are not closed.

docutils looks for the end of each mark in all of the text behind it. Where there was none, there is none for the next
mark of the kind either.
"""

from __future__ import annotations

import re
from typing import Any

from docutils.parsers.rst.states import Inliner

_CLOSED = ("emphasis", "strong", "literal", "interpreted_or_phrase_ref", "target", "substitution_ref")


def mark_reader(settings: Any) -> Inliner:
    """The part of docutils that reads inline markup, for one parse."""
    reader = Inliner()
    reader.init_customizations(settings)
    for name in _CLOSED:
        setattr(reader.patterns, name, _End(getattr(reader.patterns, name)))
    # Parsers call it again, and it would make the patterns anew. Inliner allows no subclass of it to be written.
    reader.init_customizations = lambda _settings: None
    return reader


class _End:
    """The pattern of what closes a mark; it is not searched for in the rest of a text that does not have it."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self._pattern = pattern
        self._text_without = ""

    def search(self, text: str) -> re.Match[str] | None:
        return None if self._text_without.endswith(text) else self._search(text)

    def _search(self, text: str) -> re.Match[str] | None:
        found = self._pattern.search(text)
        if found is None:
            self._text_without = text
        return found
