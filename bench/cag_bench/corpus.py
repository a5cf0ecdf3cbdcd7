"""The corpus of a run: documents as the engine reads them, and the passages that the RAG arms retrieve from.

Where the documents come from JSON lines with `paragraphs` (character offsets), those are the passages, as the question
sets mean them; other documents are split into windows.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cag.corpus import CorpusReport, Document, load_corpus
from cag.corpus.normalization import normalize_text
from cag.errors import UsageError
from cag.retrieval import Passage, split_passages

_GZIP_MAGIC = b"\x1f\x8b"


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
    rows = {
        path: _rows_by_id(Path(path)) for path in dict.fromkeys(d.path for d in report.documents) if _is_lines(path)
    }
    sources = [_source(document, rows.get(document.path, {})) for document in report.documents]
    digest = documents_sha256(report.documents)
    return BenchCorpus(tuple(map(str, paths)), report, tuple(split_passages(sources)), digest)


def documents_sha256(documents: Sequence[Document]) -> str:
    """One digest over all texts, in their order."""
    return hashlib.sha256("\n".join(document.sha256 for document in documents).encode()).hexdigest()


def _is_lines(path: str) -> bool:
    return path.endswith((".jsonl", ".jsonl.gz"))


def _rows_by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a file that the corpus has read already, by their `doc_id`."""
    content = path.read_bytes()
    text = (gzip.decompress(content) if content.startswith(_GZIP_MAGIC) else content).decode("utf-8-sig")
    rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    return {str(row.get("doc_id", "")).strip(): row for row in rows}


def _source(document: Document, rows: Mapping[str, dict[str, Any]]) -> _PassageSource:
    row = rows.get(document.doc_id)
    paragraphs = _placed_paragraphs(document.text, row) if row is not None else ()
    return _PassageSource(document.doc_id, document.title, document.text, paragraphs)


def _placed_paragraphs(text: str, row: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """The row's paragraphs with offsets into the normalised `text`; none when one of them cannot be found there."""
    placed, position = [], 0
    for paragraph in row.get("paragraphs") or ():
        _check_paragraph(paragraph, row)
        wanted = normalize_text(row["text"][paragraph["start"] : paragraph["end"]]).strip()
        start = text.find(wanted, position)
        if start < 0:
            return ()
        position = start + len(wanted)
        placed.append({"pid": paragraph["pid"], "start": start, "end": position})
    return tuple(placed)


def _check_paragraph(paragraph: Any, row: Mapping[str, Any]) -> None:
    """Raises: `UsageError`. A paragraph that is nowhere would take its text from the RAG arms and from no other."""
    match paragraph:
        case {"pid": _, "start": int(start), "end": int(end)} if 0 <= start <= end <= len(row["text"]):
            return
    raise UsageError(
        f"document {row['doc_id']!r} has a paragraph {paragraph!r} that is no part of its text.",
        hint='Each is {"pid": ..., "start": ..., "end": ...}, characters of the text as the line has it.',
    )
