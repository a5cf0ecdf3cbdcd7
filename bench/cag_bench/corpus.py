"""The corpus of a run: documents as the engine reads them, and the passages that the RAG arms retrieve from.

Where the documents come from JSON lines with `paragraphs` (character offsets), those are the passages, as the question
sets mean them; other documents are split into windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cag.corpus import CorpusLimits, CorpusReport, Document, load_corpus
from cag.corpus.discovery import find_files
from cag.corpus.document import text_sha256
from cag.corpus.folders import portable_name
from cag.corpus.loaders import Source, format_of
from cag.corpus.loaders.jsonl import read_records
from cag.corpus.normalization import normalize_text
from cag.errors import UsageError
from cag.retrieval import Passage, split_passages


@dataclass(frozen=True)
class BenchCorpus:
    """Documents in prompt order, their passages, and one digest over all texts."""

    paths: tuple[str, ...]
    report: CorpusReport
    passages: tuple[Passage, ...]
    sha256: str

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents."""
        return self.report.documents

    def cut_to(self, documents: Sequence[Document]) -> BenchCorpus:
        """The corpus of these, some of its documents or beginnings of them. Passages that reach beyond go."""
        kept = {document.doc_id: len(document.text) for document in documents}
        passages = tuple(found for found in self.passages if found.end <= kept.get(found.doc_id, 0))
        report = replace(self.report, documents=tuple(documents))
        return replace(self, report=report, passages=passages, sha256=documents_sha256(documents))

    def facts(self) -> dict[str, Any]:
        """What rows and summary say of it."""
        return {
            "paths": list(self.paths),
            "num_documents": len(self.documents),
            "num_passages": len(self.passages),
            "num_characters": sum(len(document.text) for document in self.documents),
            "sha256": self.sha256,
            "duplicates": len(self.report.duplicates),
            "empty": len(self.report.empty),
            "skipped": len(self.report.skipped),
        }


@dataclass(frozen=True)
class _PassageSource:
    """A document as `split_passages` takes it."""

    doc_id: str
    title: str
    text: str
    paragraphs: tuple[dict[str, Any], ...]


def read_corpus(paths: Sequence[str]) -> BenchCorpus:
    """Read files, folders or JSON lines of documents.

    Raises: as `cag.corpus.load_corpus`; `UsageError` for a paragraph that is no part of its document.
    """
    report = load_corpus(paths)
    rows = _rows_by_text(paths, {document.path for document in report.documents})
    sources = [_source(document, rows.get(document.sha256)) for document in report.documents]
    digest = documents_sha256(report.documents)
    return BenchCorpus(tuple(map(str, paths)), report, tuple(split_passages(sources)), digest)


def documents_sha256(documents: Sequence[Document]) -> str:
    """One digest over all texts, in their order."""
    return hashlib.sha256("\n".join(document.sha256 for document in documents).encode()).hexdigest()


def _rows_by_text(paths: Sequence[str], wanted: set[str]) -> dict[str, dict[str, Any]]:
    """The lines of the JSON-lines files among `wanted`, which the corpus has read already, by the digest of their text:
    a corpus has each text once, while ids are those that were still free."""
    files = dict.fromkeys(file.path for file in find_files(paths, lambda _error: None, lambda _path, _reason: None))
    lines = [path for path in files if portable_name(path) in wanted and format_of(path) == "jsonl"]
    rows: dict[str, dict[str, Any]] = {}
    for path in lines:
        for _, row in read_records(Source(portable_name(path), path.read_bytes(), CorpusLimits())):
            rows.setdefault(text_sha256(normalize_text(row["text"])), row)
    return rows


def _source(document: Document, row: Mapping[str, Any] | None) -> _PassageSource:
    paragraphs = _placed_paragraphs(document, row) if row is not None else ()
    return _PassageSource(document.doc_id, document.title, document.text, paragraphs)


def _placed_paragraphs(document: Document, row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The row's paragraphs, in the order of their starts, with offsets into the document's normalised text; none when
    one of them cannot be found there. They may overlap."""
    given = list(row.get("paragraphs") or ())
    for paragraph in given:
        _check_paragraph(paragraph, row, document.doc_id)
    placed: list[dict[str, Any]] = []
    raw_end = start = end = 0
    for paragraph in sorted(given, key=lambda paragraph: paragraph["start"]):
        wanted = normalize_text(row["text"][paragraph["start"] : paragraph["end"]]).strip()
        start = document.text.find(wanted, start if paragraph["start"] < raw_end else end)
        if start < 0:
            return ()
        raw_end, end = paragraph["end"], start + len(wanted)
        placed.append({"pid": paragraph["pid"], "start": start, "end": end})
    return tuple(placed)


def _check_paragraph(paragraph: Any, row: Mapping[str, Any], doc_id: str) -> None:
    """Raises: `UsageError`. A paragraph that is nowhere would take its text from the RAG arms and from no other."""
    match paragraph:
        case {"pid": _, "start": int(start), "end": int(end)} if 0 <= start <= end <= len(row["text"]):
            return
    raise UsageError(
        f"document {doc_id!r} has a paragraph {paragraph!r} that is no part of its text.",
        hint='Each is {"pid": ..., "start": ..., "end": ...}, characters of the text as the line has it.',
    )
