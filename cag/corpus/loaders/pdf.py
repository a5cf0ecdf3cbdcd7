"""PDF through pypdf: the text layer, page by page, with wrapped lines joined.

pypdf goes on past damage and logs what it lost; here a loss is an error, so that no half-read document is cached.
A PDF without a text layer gives a blank text.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pypdf import PasswordType, PdfReader
from pypdf.errors import DependencyError

from cag.corpus.loaders.base import Extract, Source, check_text_size, unreadable
from cag.corpus.loaders.pdf_lines import join_pages

_LOSSES = (
    *("while decompressing", "Invalid Root object", "Advanced encoding", "will be incomplete", "Impossible to decode"),
    *("not a stream or an array", "may be missing", "Invalid stream", "object not found"),
)
# What fonts without a map to Unicode come out as: control characters, replacement characters, private-use glyphs.
_NO_CHARACTER = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\ue000-\uf8ff]")
_MAX_NO_CHARACTERS = 0.05
_MAX_TITLE_LINE = 120


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for other files, for damage, and for a password other than the empty one."""
    if b"%PDF-" not in source.content[:1024]:
        raise unreadable(source.name, "its content is not a PDF")
    if b"%%EOF" not in source.content[-4096:]:
        raise unreadable(source.name, "the PDF breaks off before its end", "Download or export it again.")
    with _recorded_losses() as losses:
        reader = _open(source)
        pages = list(_pages(source, reader))
        declared = reader.metadata.title if reader.metadata else None
    if losses:
        raise unreadable(
            source.name, f"text of the PDF would be lost ({losses[0][:100]})", "Repair or export it again."
        )
    text = join_pages(pages)
    if len(_NO_CHARACTER.findall(text)) > _MAX_NO_CHARACTERS * len(text):
        raise unreadable(source.name, "the fonts of the PDF do not tell which characters they show", "Run OCR on it.")
    first_line = text.lstrip().split("\n", 1)[0]
    return [Extract(text, declared or (first_line if len(first_line) <= _MAX_TITLE_LINE else ""))]


def _open(source: Source) -> PdfReader:
    reader = PdfReader(io.BytesIO(source.content))
    try:
        if reader.is_encrypted and reader.decrypt("") == PasswordType.NOT_DECRYPTED:
            raise unreadable(source.name, "the PDF is encrypted with a password", "Save it without one.")
    except DependencyError as error:
        raise unreadable(source.name, "the PDF is encrypted", "Save it without encryption.") from error
    return reader


def _pages(source: Source, reader: PdfReader) -> Iterator[str]:
    num_bytes = 0
    for page in reader.pages:
        text = page.extract_text()
        num_bytes += len(text.encode("utf-8", "replace"))
        check_text_size(source, num_bytes)
        yield text


class _LossHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if any(loss in message for loss in _LOSSES):
            self.losses.append(message)


@contextmanager
def _recorded_losses() -> Iterator[list[str]]:
    """Collect what pypdf logs about lost content, and keep the rest of its log from the terminal."""
    logger, handler = logging.getLogger("pypdf"), _LossHandler()
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield handler.losses
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
