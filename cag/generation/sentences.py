"""Texts to sentences, as literal spans: cut at line breaks and at the ends of sentences of many scripts.

A full stop ends no sentence before a small letter, or behind an initial (`Charles W. Eliot`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A stop with white space behind it, or an East Asian one; closing quotes and brackets belong to neither side.
_END = re.compile(
    "(?<=[.!?\u2026\u0964\u0965\u061f\u06d4])[\"')\\]\u00bb\u201d\u2019]*\\s+"
    "|(?<=[\u3002\uff01\uff1f])[\u300d\u300f\uff09\u201d\u2019]*"
    "|\n+"
)
_INITIAL = re.compile(r"(?:^|[^\w.])[^\W\d_]\.$")


def sentence_spans(text: str) -> Iterator[tuple[int, int]]:
    """The sentences of `text` in order, each `[start, end)` without white space around it; blank ones are left out."""
    at = 0
    for end, behind in [*_ends(text), (len(text), len(text))]:
        stripped = text[at:end].strip()
        if stripped:
            start = text.index(stripped, at)
            yield start, start + len(stripped)
        at = behind


def _ends(text: str) -> Iterator[tuple[int, int]]:
    """Where sentences end, and where what comes behind them begins."""
    for match in _END.finditer(text):
        end, behind = match.span()
        is_break = "\n" in match[0] or text[end - 1] in "\u3002\uff01\uff1f"
        if is_break or not (text[behind : behind + 1].islower() or _is_initial(text, end)):
            yield end, behind


def _is_initial(text: str, end: int) -> bool:
    return text[end - 2 : end - 1].isupper() and _INITIAL.search(text, max(0, end - 4), end) is not None
