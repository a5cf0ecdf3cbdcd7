"""Questions with their accepted answers, from JSON lines, plain or gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cag.errors import UsageError

_GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Question:
    """A question. Without `answers` it is unanswerable and its answer is not scored; without `doc_ids` and
    `passage_ids` the retrieval is not scored. `all_of`: what an answer must contain, all of it."""

    qid: str
    question: str
    answers: tuple[str, ...]
    doc_ids: tuple[str, ...]
    passage_ids: tuple[str, ...]
    all_of: tuple[str, ...] = ()


def load_questions(path: Path) -> list[Question]:
    """The questions of `path`, in file order: one object a line with `question`, and where known `qid`, `answers`,
    `doc_ids` and `pids` (ids of the supporting documents and of their paragraphs), and `all_of`.

    Raises: `UsageError` for a file that cannot be read, holds no question, or a line that is none.
    """
    numbered = enumerate(_read_text(path).split("\n"), start=1)
    questions = [_question(path, number, line) for number, line in numbered if line.strip()]
    if not questions:
        raise UsageError(f"{path} holds no questions.", path=str(path))
    return questions


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP_MAGIC):
            content = gzip.decompress(content)
        return content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"the questions in {path} cannot be read: {reason}.", path=str(path)) from error


def _question(path: Path, number: int, line: str) -> Question:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _refused(path, number, "has half of a surrogate pair, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise _refused(path, number, f"is not JSON ({error})") from error
    if not isinstance(row, dict) or not isinstance(row.get("question"), str) or not row["question"].strip():
        raise _refused(path, number, 'has no "question"')
    lists = [_strings(path, number, row, key) for key in ("answers", "doc_ids", "pids", "all_of")]
    return Question(str(row.get("qid", number)), row["question"], *lists)


def _strings(path: Path, number: int, row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row.get(key) or []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _refused(path, number, f"has {key!r} that is not a list of strings")
    return tuple(value)


def _refused(path: Path, number: int, what: str) -> UsageError:
    hint = 'Each line is {"qid": ..., "question": ..., "answers": [...], "doc_ids": [...]}.'
    return UsageError(f"{path}: line {number} {what}.", hint=hint, path=str(path), line=number)
