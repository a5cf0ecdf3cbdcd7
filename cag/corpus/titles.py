"""The title of a document from what its file offers: declared title, first heading, or file name."""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from cag.corpus.normalization import one_line

MAX_TITLE_CHARACTERS = 200
# What programs write into title fields when nobody chose a title.
_PLACEHOLDER = re.compile(
    r"untitled.*|word document|document ?\d*|microsoft \w+ - .*|powerpoint presentation|"
    r"(no|title)? ?title|\(?anonymous\)?|[^ ]+\.(docx?|pdf|tex|dvi|indd|rtf|odt|qxd)",
    re.IGNORECASE,
)


def title_line(title: str) -> str:
    """`title` as one line, cut to `MAX_TITLE_CHARACTERS`."""
    return one_line(title)[:MAX_TITLE_CHARACTERS].rstrip()


def chosen_title(title: str) -> str:
    """The title that a program wrote into a file, as `title_line`; "" where nobody chose it."""
    line = title_line(title)
    return "" if _PLACEHOLDER.fullmatch(line) else line


def title_of_name(name: str) -> str:
    """A title made of a file name or document id: `guides/getting-started.md` gives "Getting started"."""
    stem = PurePosixPath(name).name.removesuffix(".gz")
    stem = stem.rsplit(".", 1)[0] if "." in stem[1:] else stem
    words = re.sub(r"[-_\s]+", " ", stem).strip()
    return (words[:1].upper() + words[1:])[:MAX_TITLE_CHARACTERS].rstrip() or name
