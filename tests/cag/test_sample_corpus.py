"""The sample handbook in ``examples/handbook``: its size and formats, and that each question has its answer in it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cag.corpus import Document, load_corpus

HANDBOOK = Path(__file__).resolve().parents[2] / "examples" / "handbook"
GENERATED = ("alarms/ammonia.pdf", "alarms/escalation.docx", "install/turner-rails.pdf", "maintain/spare-parts.docx")
QUESTIONS = [json.loads(line) for line in (HANDBOOK / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
each_question = pytest.mark.parametrize("question", QUESTIONS, ids=[question["qid"] for question in QUESTIONS])


@pytest.fixture(scope="module")
def documents() -> dict[str, Document]:
    report = load_corpus([HANDBOOK / "docs"])
    assert (report.duplicates, report.empty, report.skipped) == ((), (), ())
    return {document.doc_id: document for document in report.documents}


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the generated documents, written anew by their script."""
    target = tmp_path_factory.mktemp("handbook")
    subprocess.run([sys.executable, HANDBOOK / "make_binaries.py", target], check=True, timeout=60)
    return target / "docs"


def contains(text: str, answer: str) -> bool:
    """Whether the answer stands in the text as whole words, letter case aside."""
    return re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text.lower()) is not None


def test_has_25_to_40_documents_in_at_least_5_formats(documents: dict[str, Document]) -> None:
    files = [path for path in (HANDBOOK / "docs").rglob("*") if path.is_file()]
    assert {path.relative_to(HANDBOOK / "docs").as_posix() for path in files} == set(documents)
    assert 25 <= len(documents) <= 40
    assert {path.suffix for path in files} >= {".md", ".txt", ".rst", ".html", ".pdf", ".docx", ".toml", ".py"}


def test_size_is_about_6000_tokens(documents: dict[str, Document]) -> None:
    # As measured: 22,300 characters are 5,740 tokens of Qwen2.5 and 6,160 of SmolLM2.
    assert 21_500 <= sum(len(document.text) for document in documents.values()) <= 23_800


def test_documents_are_short_and_all_different(documents: dict[str, Document]) -> None:
    assert all(300 <= len(document.text) <= 1_200 for document in documents.values())
    assert len({document.sha256 for document in documents.values()}) == len(documents)
    assert len({document.title for document in documents.values()}) == len(documents)


def test_there_are_30_questions_mostly_about_single_facts() -> None:
    assert len({question["qid"] for question in QUESTIONS}) == len(QUESTIONS) == 30
    assert len({question["question"] for question in QUESTIONS}) == 30
    kinds = [question["kind"] for question in QUESTIONS]
    assert set(kinds) == {"single", "multi"}
    assert kinds.count("single") >= 24


@each_question
def test_question_names_its_documents(question: dict, documents: dict[str, Document]) -> None:
    assert set(question) == {"qid", "question", "answers", "doc_ids", "evidence", "kind"}
    assert set(question["doc_ids"]) <= set(documents)
    assert len(set(question["doc_ids"])) == (1 if question["kind"] == "single" else 2)


@each_question
def test_evidence_is_literal_and_holds_the_answer(question: dict, documents: dict[str, Document]) -> None:
    assert any(question["evidence"] in documents[doc_id].text for doc_id in question["doc_ids"])
    assert contains(question["evidence"], question["answers"][0])


@each_question
def test_answer_stands_in_no_other_document(question: dict, documents: dict[str, Document]) -> None:
    holders = {doc_id for doc_id, document in documents.items() if contains(document.text, question["answers"][0])}
    assert holders
    assert holders <= set(question["doc_ids"])


@each_question
def test_question_does_not_give_the_answer_away(question: dict) -> None:
    assert not any(contains(question["question"], answer) for answer in question["answers"])


def test_generated_documents_match_their_script(documents: dict[str, Document], remade: Path) -> None:
    texts = {document.doc_id: document.text for document in load_corpus([remade]).documents}
    assert texts == {doc_id: documents[doc_id].text for doc_id in GENERATED}


def test_generated_pdfs_are_the_same_bytes_every_time(remade: Path) -> None:
    pdfs = [name for name in GENERATED if name.endswith(".pdf")]
    assert [(remade / name).read_bytes() for name in pdfs] == [(HANDBOOK / "docs" / name).read_bytes() for name in pdfs]


def test_code_and_settings_are_well_formed() -> None:
    script = HANDBOOK / "docs" / "integrate" / "export_lot.py"
    compile(script.read_text(encoding="utf-8"), str(script), "exec")
    settings = tomllib.loads((HANDBOOK / "docs" / "install" / "hub.toml").read_text(encoding="utf-8"))
    assert settings["bus"]["poll_interval_seconds"] == 17
