"""Documents to passages: given paragraphs where a document has them, else windows of word pieces within sections.

Every passage is a literal span of its document's text. A window ends at a paragraph, sentence or line end where there
is one near its limit, and neighbours of one section overlap, so that a fact at a seam is whole in one of the two.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Protocol

from cag.corpus.loaders import format_of
from cag.errors import UsageError
from cag.retrieval.base import Passage
from cag.retrieval.headings import Section, split_sections
from cag.retrieval.words import estimated_piece_spans

PieceSpans = Callable[[str], Sequence[tuple[int, int]]]

# Read as text where they are named by themselves, and source code or settings all the same.
UNLISTED_SOURCE = (".env", ".ipynb")
# Text in other markup, where such lines are items of lists, comments and the ends of blocks.
OTHER_MARKUP = (".adoc", ".asciidoc", ".log", ".org", ".tex", ".textile", ".wiki")
# Where a window may begin or end, best first: after a blank line, a sentence, a line, a word.
SEAMS = (
    re.compile(r"\n[ \t]*\n\s*\Z"),
    re.compile(r"[.!?][\"')\]]*\s+\Z"),
    re.compile(r"\n\s*\Z"),
    re.compile(r"\s\Z"),
)
# So much of the piece before a seam is looked at: the end of a sentence may be a full stop and closing marks.
CLOSING_CHARACTERS = 3


class SourceDocument(Protocol):
    """What is needed of a document. One may also have `paragraphs`: mappings with `pid`, `start` and `end`."""

    @property
    def doc_id(self) -> str: ...  # noqa: D102
    @property
    def title(self) -> str: ...  # noqa: D102
    @property
    def text(self) -> str: ...  # noqa: D102


def split_passages(
    documents: Iterable[SourceDocument],
    *,
    max_word_pieces: int = 200,
    overlap: int = 40,
    piece_spans: PieceSpans | None = None,
) -> list[Passage]:
    """The passages of all documents, in document order; none of them is blank.

    `piece_spans` gives the character span of each word piece of a text (an embedder's tokenizer); by default pieces
    are estimated by a pattern, so that passages do not depend on a model.

    Raises: `UsageError` unless 0 <= overlap < max_word_pieces, or when a given paragraph lies outside its text.
    """
    if not 0 <= overlap < max_word_pieces:
        raise UsageError(f"overlap must be at least 0 and below max_word_pieces, found {overlap} of {max_word_pieces}.")
    spans_of = piece_spans or estimated_piece_spans
    passages: list[Passage] = []
    for document in documents:
        paragraphs = getattr(document, "paragraphs", None)
        if paragraphs:
            passages.extend(_given_passages(document, paragraphs))
        else:
            passages.extend(_window_passages(document, max_word_pieces, overlap, spans_of))
    return passages


def _given_passages(document: SourceDocument, paragraphs: Sequence[Mapping[str, Any]]) -> Iterator[Passage]:
    for paragraph in paragraphs:
        start, end = int(paragraph["start"]), int(paragraph["end"])
        if not 0 <= start <= end <= len(document.text):
            raise UsageError(
                f"Paragraph {paragraph['pid']} ({start}:{end}) lies outside the text of {document.doc_id}."
            )
        text = document.text[start:end]
        if text.strip():
            yield Passage(str(paragraph["pid"]), document.doc_id, document.title, text, start, end)


def _window_passages(
    document: SourceDocument, max_word_pieces: int, overlap: int, spans_of: PieceSpans
) -> Iterator[Passage]:
    number = 0
    for section in _sections(document):
        pieces = spans_of(document.text[section.start : section.end])
        for start, end in _windows(document.text, section, pieces, max_word_pieces, overlap):
            title = passage_title(document.title, section.headings)
            yield Passage(f"{document.doc_id}#{number}", document.doc_id, title, document.text[start:end], start, end)
            number += 1


def passage_title(document_title: str, headings: Sequence[str]) -> str:
    """The document's title and the headings that lead to the passage, joined by " > "; a first heading that repeats
    the title is left out.
    """
    below = headings[1:] if headings and headings[0] == document_title else headings
    return " > ".join(part for part in (document_title, *below) if part)


def _sections(document: SourceDocument) -> list[Section]:
    if _has_no_headings(document.doc_id):
        return [Section(0, len(document.text), ())]
    return split_sections(document.text)


def _has_no_headings(doc_id: str) -> bool:
    """Whether a line that starts with "#" is no heading (but a comment or a directive), and a row of dashes no rule."""
    return format_of(PurePosixPath(doc_id)) == "code" or doc_id.lower().endswith((*UNLISTED_SOURCE, *OTHER_MARKUP))


def _windows(
    text: str, section: Section, pieces: Sequence[tuple[int, int]], max_word_pieces: int, overlap: int
) -> Iterator[tuple[int, int]]:
    """Character spans of at most `max_word_pieces` pieces each that cover all pieces of the section."""

    def seam_before(piece: int) -> int:
        gap_start = section.start + pieces[piece - 1][1] - CLOSING_CHARACTERS
        return _seam_rank(text[max(gap_start, 0) : section.start + pieces[piece][0]])

    first, last = 0, 0
    while last < len(pieces):
        limit = first + max_word_pieces
        if limit >= len(pieces):
            last = len(pieces)
        else:
            # The last third of the window is searched from its end, so that of equal seams the latest wins.
            last = min(range(limit, limit - max_word_pieces // 3, -1), key=seam_before, default=limit)
        yield section.start + pieces[first][0], section.start + pieces[last - 1][1]
        if last < len(pieces):
            first = max(min(range(last - overlap, last - overlap // 2 + 1), key=seam_before), first + 1)


def _seam_rank(gap: str) -> int:
    """How good a seam the characters between two pieces are: an index into `SEAMS`, or its length for none."""
    return next((rank for rank, seam in enumerate(SEAMS) if seam.search(gap)), len(SEAMS))
