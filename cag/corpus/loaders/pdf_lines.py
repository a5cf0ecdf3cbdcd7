"""Lines of PDF pages to text: running heads and ligatures dropped, hyphenated words mended, wrapped lines joined.

A PDF has no paragraphs, so lines are joined only where that is safe: the line is full, and what follows goes on in the
middle of a sentence. Everything else keeps its line break, so that code and tables stay readable.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# A line this long in relation to the long lines of the document was broken by its margin, not by its author.
_FULL_LINE = 0.75
_MIN_PAGES_OF_RUNNING_HEAD = 3
_LIGATURES = str.maketrans({"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl"})
_HYPHENATED = re.compile(r"(?P<head>(?:^|.*[\s(\"'])(?P<start>[^\W\d_]{2,}))[-\u00ad\u2010]$")
_WORD = re.compile(r"[^\W\d_]+(?:-[^\W\d_]+)*")


def join_pages(pages: Sequence[str]) -> str:
    """The text of a document from the extracted text of its pages."""
    lines = [line for page in _without_running_heads([page.split("\n") for page in pages]) for line in page]
    lines = [line.rstrip().translate(_LIGATURES) for line in lines]
    lengths = sorted(len(line) for line in lines if line)
    full_length = _FULL_LINE * lengths[len(lengths) * 95 // 100] if lengths else 0.0
    words = Counter(word.lower() for line in lines for word in _WORD.findall(line))
    joined: list[str] = []
    last_length = 0
    for line in lines:
        glue = _glue(joined[-1], line, last_length >= full_length, words) if joined else None
        if glue is None:
            joined.append(line)
        else:
            joined[-1] = joined[-1].rstrip("-\u00ad\u2010") + glue + line if glue != " " else f"{joined[-1]} {line}"
        last_length = len(line)
    return "\n".join(joined)


def _glue(before: str, line: str, is_full: bool, words: Counter[str]) -> str | None:
    """What stands between a line and the next: None for a line break, "" or "-" in place of the hyphen, or a space."""
    if not before or not line or before[0].isspace() or not line[0].islower():
        return None
    hyphenated = _HYPHENATED.fullmatch(before)
    if hyphenated:
        return _hyphen(hyphenated.group("start"), line, words)
    return " " if is_full and before[-1] not in ".:;!?{}-" else None


def _hyphen(start: str, line: str, words: Counter[str]) -> str:
    found = _WORD.match(line)
    end = found.group() if found else ""
    compound, plain = f"{start}-{end}".lower(), f"{start}{end}".lower()
    # The text itself tells how it spells the word elsewhere; without another instance a line-end hyphen is a break.
    return "-" if words[compound] > words[plain] else ""


def _without_running_heads(pages: list[list[str]]) -> list[list[str]]:
    """Pages without the first and last lines that most pages share but for numbers; the first instance stays."""
    pages = [_stripped(page) for page in pages]
    if len(pages) < _MIN_PAGES_OF_RUNNING_HEAD:
        return pages
    for edge in (0, -1):
        counts = Counter(_shape(page[edge]) for page in pages if page)
        shape, count = counts.most_common(1)[0] if counts else ("", 0)
        if count < _MIN_PAGES_OF_RUNNING_HEAD or count * 3 < len(pages) * 2:
            continue
        has_words = any(character.isalpha() for character in shape)
        matching = [page for page in pages if page and _shape(page[edge]) == shape]
        for page in matching[1 if has_words else 0 :]:
            del page[edge]
    return pages


def _shape(line: str) -> str:
    return re.sub(r"[0-9]+", "#", " ".join(line.split()))


def _stripped(page: list[str]) -> list[str]:
    full = [index for index, line in enumerate(page) if line.strip()]
    return page[full[0] : full[-1] + 1] if full else []
