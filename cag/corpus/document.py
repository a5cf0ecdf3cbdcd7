"""What the rest of the engine sees of a corpus: documents of normalised text, and the report of a load."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """One text of the corpus.

    doc_id: unique in its corpus; the posix path relative to the argument that held the file, or the id in a JSONL line.
    title:  one line, never empty.
    path:   absolute posix path of the file (shared by all documents of one JSONL file).
    text:   normalised (see `cag.corpus.normalization`), never blank; quotes are literal spans of it.
    sha256: hexadecimal digest of `text` in UTF-8.
    """

    doc_id: str
    title: str
    path: str
    text: str
    sha256: str


@dataclass(frozen=True, slots=True)
class CorpusReport:
    """Everything a load found, in the order of the arguments.

    Paths are absolute posix paths; a document inside a JSONL file is written `path#id`.

    documents:  what was kept.
    duplicates: (path, path of the first document with the same text).
    empty:      paths of files without text, among them PDFs that hold only pictures.
    skipped:    (path, reason): unknown types and links in folders; with `skip_errors`, unreadable files too.
    """

    documents: tuple[Document, ...]
    duplicates: tuple[tuple[str, str], ...]
    empty: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def text_sha256(text: str) -> str:
    """Hexadecimal SHA-256 of `text` in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
