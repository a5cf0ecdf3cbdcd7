import gzip
import json

import pytest

from cag.corpus import CorpusLimits, load_corpus, load_documents
from cag.errors import UnreadableDocument

ROWS = [
    {"doc_id": "a/1", "title": "One", "text": "first"},
    {"text": "# Two\n\nsecond", "other": [1]},
    {"doc_id": 7, "text": "third"},
]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n\n"


@pytest.mark.parametrize("name", ["docs.jsonl", "docs.jsonl.gz", "docs.ndjson"])
def test_one_document_a_line(tree, name):
    content = LINES.encode()
    root = tree({name: gzip.compress(content) if name.endswith(".gz") else content})
    documents = load_documents([root])
    assert [document.doc_id for document in documents] == ["a/1", f"{name}#2", "7"]
    assert [document.title for document in documents] == ["One", "Two", "7"]
    assert {document.path for document in documents} == {f"{root}/{name}"}


def test_duplicates_and_empty_texts_are_told_by_their_id(tree):
    rows = [{"doc_id": "a", "text": "same"}, {"doc_id": "b", "text": "same\n"}, {"doc_id": "c", "text": " "}]
    root = tree({"d.jsonl": "\n".join(map(json.dumps, rows))})
    report = load_corpus([root])
    assert report.duplicates == ((f"{root}/d.jsonl#b", f"{root}/d.jsonl#a"),)
    assert report.empty == (f"{root}/d.jsonl#c",)


def test_ids_given_twice_stay_apart(tree):
    rows = [{"doc_id": "a", "text": "one"}, {"doc_id": "a", "text": "two"}]
    root = tree({"d.jsonl": "\n".join(map(json.dumps, rows))})
    assert [document.doc_id for document in load_documents([root])] == ["a", "root/a"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1]", "line 2 is not an object"),
        ('{"text": 5}', "line 2 is not an object with a text"),
        ('{"text": "x", "doc_id": []}', "doc_id is neither"),
        ('{"text": "x", "title": {}}', "title is neither"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + "9" * 5_000 + "}", "not JSON"),
    ],
)
def test_a_broken_line_is_named(load_one, line, reason):
    with pytest.raises(UnreadableDocument, match=reason):
        load_one("a.jsonl", f'{{"text": "fine"}}\n{line}\n')


def test_lines_of_something_else_are_an_error_only_when_asked_for(tree):
    root = tree({"questions.jsonl": '{"question": "why?"}\n', "documents.jsonl": '{"text": "because"}\n'})
    report = load_corpus([root])
    assert [document.text for document in report.documents] == ["because"]
    assert report.skipped[0][0] == f"{root}/questions.jsonl"
    with pytest.raises(UnreadableDocument, match="first line is not a document"):
        load_corpus([root / "questions.jsonl"])


@pytest.mark.parametrize("title", ["Untitled (album)", "Document 1", "Q3-report.pdf", "Anonymous"])
def test_a_title_that_is_given_is_taken_whatever_it_says(load_one, title):
    assert load_one("a.jsonl", json.dumps({"doc_id": "7", "title": title, "text": "x"})).title == title


def test_lone_surrogates_do_not_break_the_digest(load_one):
    document = load_one("a.jsonl", '{"doc_id": "\\ud800", "title": "t\\ud800", "text": "x\\ud800"}')
    assert document.text == "x\ufffd"
    (document.doc_id + document.title).encode("utf-8")


@pytest.mark.parametrize("damage", ["cut", "flip", "not gzip"])
def test_damaged_gzip(load_one, damage):
    content = gzip.compress(LINES.encode() * 50)
    flipped = content[:40] + bytes([content[40] ^ 0xFF]) + content[41:]
    with pytest.raises(UnreadableDocument):
        load_one("a.jsonl.gz", {"cut": content[:-20], "flip": flipped, "not gzip": b"\x1f\x8bxxxx"}[damage])


def test_a_gzip_bomb_is_bounded(tree):
    root = tree({"bomb.jsonl.gz": gzip.compress(b'{"text": "' + b"a" * 20_000_000 + b'"}')})
    with pytest.raises(UnreadableDocument, match="more than 1000000 bytes of text"):
        load_corpus([root], limits=CorpusLimits(max_text_bytes=1_000_000))
