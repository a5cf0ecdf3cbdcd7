"""What a load reports: documents, ids, duplicates, empty files, errors, progress, bounds."""

import hashlib
import os

import pytest

from cag.corpus import CorpusLimits, load_corpus, load_documents
from cag.errors import EmptyCorpus, UnreadableDocument, error_row


def test_a_document_carries_id_title_path_text_and_digest(tree):
    root = tree({"guide/getting-started.md": "# Hello\n\nworld\n"})
    (document,) = load_documents([root])
    assert document.doc_id == "guide/getting-started.md"
    assert document.title == "Hello"
    assert document.path == f"{root}/guide/getting-started.md"
    assert document.text == "# Hello\n\nworld"
    assert document.sha256 == hashlib.sha256(document.text.encode()).hexdigest()


def test_duplicates_are_kept_once_and_reported(tree):
    root = tree({"a.md": "same\n", "b.txt": "same\r\n\r\n", "c.md": "other"})
    report = load_corpus([root])
    assert [document.doc_id for document in report.documents] == ["a.md", "c.md"]
    assert report.duplicates == ((f"{root}/b.txt", f"{root}/a.md"),)


def test_the_same_argument_twice_adds_nothing(tree):
    root = tree({"a.md": "a"})
    report = load_corpus([root, root / "a.md"])
    assert len(report.documents) == len(report.duplicates) == 1


def test_empty_files_are_reported(tree):
    root = tree({"a.md": "a", "blank.txt": " \n\t\n", "none.md": "", "front.md": "---\ntitle: only\n---\n"})
    assert load_corpus([root]).empty == (f"{root}/blank.txt", f"{root}/front.md", f"{root}/none.md")


@pytest.mark.parametrize("files", [{"empty.md": ""}, {"picture.xyz": b"\x00"}, {".hidden.md": "hidden"}])
def test_a_corpus_without_text_is_an_error(tree, files):
    with pytest.raises(EmptyCorpus) as caught:
        load_corpus([tree(files)])
    assert error_row(caught.value).code == "empty_corpus"


def test_ids_that_collide_get_the_name_of_their_folder_then_a_number(tree):
    root = tree({"x/a.md": "1", "y/a.md": "2", "z/y/a.md": "3"})
    arguments = [root / "x", root / "y", root / "z" / "y"]
    ids = [document.doc_id for document in load_documents(arguments)]
    assert ids == ["a.md", "y/a.md", "y/a.md~2"]
    assert [document.doc_id for document in load_documents(arguments[:2])] == ids[:2]


def test_known_documents_keep_their_ids_and_win_among_equal_texts(tree):
    root = tree({"x/b.md": "text", "y/a.md": "namesake", "y/c.md": "last"})
    arguments = [root / "x", root / "y"]
    known = [(document.path, document.doc_id) for document in load_documents(arguments)]
    tree({"x/a.md": "new", "x/a-copy.md": "text", "y/b.md": "another"})
    report = load_corpus(arguments, known=known)
    assert [document.doc_id for document in report.documents] == ["x/a.md", "b.md", "a.md", "y/b.md", "c.md"]
    assert report.duplicates == ((f"{root}/x/a-copy.md", f"{root}/x/b.md"),)


def test_a_binary_file_named_txt_is_an_error_or_skipped_on_request(tree):
    root = tree({"a.md": "a", "bad.txt": b"\x89PNG\r\n\x1a\n\x00\x00"})
    with pytest.raises(UnreadableDocument, match="PNG") as caught:
        load_corpus([root])
    assert caught.value.facts["path"] == f"{root}/bad.txt"
    assert error_row(caught.value).code == "unreadable_document"
    report = load_corpus([root], skip_errors=True)
    assert [document.doc_id for document in report.documents] == ["a.md"]
    assert report.skipped == ((f"{root}/bad.txt", "its content is a PNG picture, not text"),)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission(tree):
    root = tree({"a.md": "a", "locked.md": "secret"})
    (root / "locked.md").chmod(0)
    with pytest.raises(UnreadableDocument, match="Permission denied"):
        load_corpus([root])
    assert load_corpus([root], skip_errors=True).skipped[0][0] == f"{root}/locked.md"


def test_progress_counts_every_file_once(tree):
    root = tree({"a.md": "a", "b.xyz": "unknown", "c.md": ""})
    calls = []
    load_corpus([root], progress=lambda *call: calls.append(call))
    assert calls == [(1, 3, f"{root}/a.md"), (2, 3, f"{root}/b.xyz"), (3, 3, f"{root}/c.md")]


@pytest.mark.parametrize("limits", [CorpusLimits(max_file_bytes=99), CorpusLimits(max_text_bytes=99)])
def test_files_over_a_limit_are_refused(tree, limits):
    root = tree({"small.md": "a" * 99, "large.md": "b" * 100})
    with pytest.raises(UnreadableDocument, match="more than 99 bytes"):
        load_corpus([root], limits=limits)
    report = load_corpus([root], limits=limits, skip_errors=True)
    assert [document.doc_id for document in report.documents] == ["small.md"]
