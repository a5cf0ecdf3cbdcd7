"""The shared documentation corpus: 32 files of five formats, and questions whose evidence must be in the texts."""

import gzip
import json
import re

import pytest

from cag.corpus import load_corpus


@pytest.fixture(scope="module")
def folder(shared_data):
    folder = shared_data / "docs_corpus"
    if not folder.is_dir():
        pytest.skip(f"the documentation corpus is not at {folder}")
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return load_corpus([folder / "files"])


def words(text):
    """Words without marks, so that Markdown, reStructuredText and plain extractions can be compared."""
    return re.findall(r"[a-z0-9]+", text.lower())


def flat(text):
    return " ".join(text.split())


def test_every_file_loads_in_stable_order_under_its_relative_path(folder, report):
    files = {path.relative_to(folder / "files").as_posix() for path in (folder / "files").rglob("*") if path.is_file()}
    assert {document.doc_id for document in report.documents} == files
    assert len(report.documents) == 32
    assert (report.duplicates, report.empty, report.skipped) == ((), (), ())


def test_every_question_finds_its_evidence_or_answer_in_its_document(folder, report):
    texts = {document.doc_id: flat(document.text) for document in report.documents}
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 24
    missing = [
        question["qid"]
        for question in questions
        if not any(
            flat(wanted) in texts[doc_id]
            for doc_id in question["doc_ids"]
            for wanted in (question["evidence"], *question["answers"])
        )
    ]
    assert missing == []


def test_the_text_holds_the_words_of_the_reference_extraction(folder, report):
    """reStructuredText is left out: its reference is the raw source, with markup and addresses that go here."""
    texts = {document.doc_id: document.text for document in report.documents}
    with gzip.open(folder / "documents.jsonl.gz", "rt", encoding="utf-8") as lines:
        references = [json.loads(line) for line in lines]
    assert len(references) == 32
    for reference in references:
        if reference["doc_id"].endswith(".rst"):
            continue
        expected, loaded = words(reference["text"]), set(words(texts[reference["doc_id"]]))
        kept = sum(word in loaded for word in expected) / len(expected)
        assert kept >= 0.995, reference["doc_id"]


def test_no_navigation_is_left(report):
    for document in report.documents:
        if document.doc_id.endswith(".html"):
            assert "Home | Search" not in document.text
        if document.doc_id.endswith(".rst"):
            assert not re.search(r"^\.\. |:ref:|toctree|`_", document.text, re.MULTILINE), document.doc_id
