"""JSON Lines of documents, plain or gzip: one object a line with `text`, and where present `doc_id` and `title`.

Other fields are left alone. A document without `doc_id` is named by its line number.
"""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

from cag.corpus.loaders.base import NOT_DOCUMENTS, Extract, Source, check_text_size, unreadable
from cag.corpus.loaders.markdown import first_heading
from cag.corpus.loaders.text import read_text


def load(source: Source) -> list[Extract]:
    """One text a line, blank lines left out. Raises: as `read_records`."""
    return [_extract(source, number, record) for number, record in read_records(source)]


def read_records(source: Source) -> list[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, behind its number; all have a `text`.

    Raises: UnreadableDocument naming the line; its reason is `NOT_DOCUMENTS` when the first is none.
    """
    text = read_text(_unpacked(source))
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(number, _record(source, number, line, is_first=index == 0)) for index, (number, line) in enumerate(lines)]


def _unpacked(source: Source) -> Source:
    if not source.content.startswith(b"\x1f\x8b"):
        return source
    with gzip.GzipFile(fileobj=io.BytesIO(source.content)) as stream:
        content = stream.read(source.limits.max_text_bytes + 1)
    check_text_size(source, len(content))
    return Source(source.name, content, source.limits)


def _record(source: Source, number: int, line: str, *, is_first: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise unreadable(source.name, f"line {number} is not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        reason = NOT_DOCUMENTS if is_first else f"line {number} is not an object with a text field"
        raise unreadable(source.name, reason, 'Each line is {"doc_id": ..., "title": ..., "text": ...}.')
    return record


def _extract(source: Source, number: int, record: dict[str, Any]) -> Extract:
    doc_id, title = record.get("doc_id"), record.get("title")
    for field, value in (("doc_id", doc_id), ("title", title)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise unreadable(source.name, f"line {number}: {field} is neither a string nor a whole number")
    has_title = title is not None and str(title).strip()
    return Extract(
        text=record["text"],
        title=str(title) if has_title else first_heading(record["text"]),
        doc_id="" if doc_id is None else str(doc_id).strip().encode("utf-8", "replace").decode("utf-8"),
        fragment=str(number),
    )
