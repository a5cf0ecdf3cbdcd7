"""One spelling for equal texts, so that digests, cached tokens and quotes do not depend on editors and systems.

Line ends become newlines; control characters, soft hyphens, zero-width spaces and byte order marks go; no-break spaces
become spaces; lone surrogates become U+FFFD; more than 30 combining marks in a row are parted by U+034F, as in the
Stream-Safe Text Format of Unicode (UAX #15), since composing takes the square of their number; Unicode is composed
(NFC, which keeps ligatures and full-width forms); trailing spaces, blank lines around the text and more than two blank
lines in a row go. Leading spaces stay: they are structure in code and Markdown. `normalize_text` is idempotent.
"""

from __future__ import annotations

import re
import unicodedata

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_REMOVED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
_NO_BREAK_SPACE = re.compile("[\u00a0\u2007\u202f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile("\n{4,}")
_MAX_MARKS = 30
_MAYBE_MARKS = re.compile(r"[^\w\s\x00-\x7f]{8,}")  # no mark is a letter, and none becomes more than four of them
_GRAPHEME_JOINER = "\u034f"


def normalize_text(text: str) -> str:
    """`text` as the corpus keeps it; the rules stand in the docstring of the module."""
    text = _REMOVED.sub("", _LINE_END.sub("\n", text))
    text = _SURROGATE.sub("\ufffd", _NO_BREAK_SPACE.sub(" ", text))
    text = unicodedata.normalize("NFC", _MAYBE_MARKS.sub(_part_marks, text))
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


def _part_marks(run: re.Match[str]) -> str:
    """A run of what is no letter, with a joiner wherever more than `_MAX_MARKS` marks would be composed at once."""
    pieces, marks = [], 0
    for character in run[0]:
        parts = unicodedata.normalize("NFD", character)
        marks = marks + len(parts) if unicodedata.combining(parts[0]) else 0
        if marks > _MAX_MARKS:
            pieces.append(_GRAPHEME_JOINER)
            marks = len(parts)
        pieces.append(character)
    return "".join(pieces)


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(normalize_text(text).split())
