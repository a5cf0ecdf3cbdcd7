"""One spelling for equal texts, so that digests, cached tokens and quotes do not depend on editors and systems.

Line ends become newlines; control characters, soft hyphens, zero-width spaces and byte order marks go; no-break spaces
become spaces; lone surrogates become U+FFFD; Unicode is composed (NFC, which keeps ligatures and full-width forms);
trailing spaces, blank lines around the text and more than two blank lines in a row go. Leading spaces stay: they are
structure in code and Markdown. `normalize_text` is idempotent.
"""

from __future__ import annotations

import re
import unicodedata

_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_REMOVED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u200b\ufeff]")
_NO_BREAK_SPACE = re.compile("[\u00a0\u2007\u202f]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_BLANK_LINES = re.compile("\n{4,}")


def normalize_text(text: str) -> str:
    """`text` as the corpus keeps it; the rules stand in the docstring of the module."""
    text = _REMOVED.sub("", _LINE_END.sub("\n", text))
    text = _SURROGATE.sub("\ufffd", _NO_BREAK_SPACE.sub(" ", text))
    text = unicodedata.normalize("NFC", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n\n", text).strip("\n")


def one_line(text: str) -> str:
    """`text` with every run of white space as one space."""
    return " ".join(normalize_text(text).split())
