"""Plain text: kept as it is. The title is a first line that stands apart like a heading."""

from __future__ import annotations

import re

from cag.corpus.decoding import NotTextError, decode_text
from cag.corpus.loaders.base import Extract, Source, check_text_size, unreadable

_UNDERLINE = re.compile(r"([=\-~*#_])\1{2,}")
_MAX_TITLE_LINE = 80


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain."""
    text = read_text(source)
    return [Extract(text, _title(text))]


def read_text(source: Source, *, allow_declared: bool = False) -> str:
    """The characters of `source`; `allow_declared` as in `decode_text`.

    Raises: UnreadableDocument.
    """
    check_text_size(source, len(source.content))
    try:
        return decode_text(source.content, allow_declared=allow_declared)
    except NotTextError as error:
        raise unreadable(source.name, str(error), error.hint) from error


def _title(text: str) -> str:
    first, second = [*text.lstrip().splitlines()[:2], "", ""][:2]
    first = re.sub(r"^#+ +", "", first.strip())
    stands_apart = not second.strip() or _UNDERLINE.fullmatch(second.strip())
    reads_as_title = 0 < len(first) <= _MAX_TITLE_LINE and first[-1] not in ".,;:!?"
    return first if stands_apart and reads_as_title else ""
