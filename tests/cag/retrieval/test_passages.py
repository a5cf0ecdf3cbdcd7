from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag.errors import UsageError
from cag.retrieval import split_passages
from cag.retrieval.passages import _seam_rank
from cag.retrieval.words import estimated_piece_spans


@dataclass(frozen=True)
class TextDocument:
    text: str
    doc_id: str = "guide.md"
    title: str = "Guide"
    paragraphs: tuple[dict[str, object], ...] = field(default=())


SENTENCES = " ".join(
    f"Sentence number {number} tells of machine {number} in hall {number % 7}." for number in range(90)
)


@given(
    text=st.text(alphabet="ab. \n#=-`日_5", max_size=400),
    max_word_pieces=st.integers(1, 30),
    overlap=st.integers(0, 29),
    suffix=st.sampled_from([".md", ".py"]),
)
def test_passages_are_short_literal_spans_that_cover_every_word(text, max_word_pieces, overlap, suffix):
    overlap = min(overlap, max_word_pieces - 1)
    document = TextDocument(text, doc_id=f"file{suffix}")
    passages = split_passages([document], max_word_pieces=max_word_pieces, overlap=overlap)
    covered = set()
    for passage in passages:
        assert passage.text == text[passage.start : passage.end]
        assert passage.text.strip()
        assert len(estimated_piece_spans(passage.text)) <= max_word_pieces
        covered.update(range(passage.start, passage.end))
    assert covered >= {index for index, character in enumerate(text) if not character.isspace()}
    assert len({passage.passage_id for passage in passages}) == len(passages)
    starts = [passage.start for passage in passages]
    assert starts == sorted(set(starts))


def test_windows_overlap_and_break_between_sentences():
    passages = split_passages([TextDocument(SENTENCES)])
    assert len(passages) > 3
    for left, right in itertools.pairwise(passages):
        assert left.text.endswith(".")
        assert right.text.startswith("Sentence")
        shared = SENTENCES[right.start : left.end]
        assert 20 <= len(estimated_piece_spans(shared)) <= 40


def test_without_overlap_windows_do_not_share_text():
    passages = split_passages([TextDocument(SENTENCES)], overlap=0)
    assert all(left.end <= right.start for left, right in itertools.pairwise(passages))


def test_a_short_document_is_one_passage_titled_by_the_document():
    (passage,) = split_passages([TextDocument("All of it.\n", doc_id="notes.txt", title="Notes")])
    assert (passage.passage_id, passage.doc_id, passage.title, passage.text) == (
        "notes.txt#0",
        "notes.txt",
        "Notes",
        "All of it.",
    )
    assert passage.indexed_text == "Notes\nAll of it."


def test_sections_give_the_title_and_bound_the_windows():
    text = "# Guide\n\nWelcome.\n\n## Install\n\n### On Linux\n\nRun it.\n\n## Use\n\nAsk it.\n"
    passages = split_passages([TextDocument(text)])
    assert [(passage.title, passage.text) for passage in passages] == [
        ("Guide", "# Guide\n\nWelcome."),
        ("Guide > Install > On Linux", "## Install\n\n### On Linux\n\nRun it."),
        ("Guide > Use", "## Use\n\nAsk it."),
    ]


@pytest.mark.parametrize("name", ["run.py", "lib.nim", "Build.BAZEL", "Dockerfile", "a\nb.yaml", "notes.ipynb", ".env"])
def test_comments_in_source_code_are_no_headings(name):
    document = TextDocument("# set up\nx = 1\n\n# run\nx += 1\n", doc_id=f"tool/{name}", title="run")
    (passage,) = split_passages([document])
    assert passage.title == "run"


@pytest.mark.parametrize(
    ("name", "text"), [("a.adoc", "[source,bash]\n----\ncag ls\n----\nmore\n"), ("a.textile", "# one\n# two\n\nmore\n")]
)
def test_marks_of_other_markup_are_no_headings(name, text):
    (passage,) = split_passages([TextDocument(text, doc_id=name, title="Guide")])
    assert passage.title == "Guide"


def test_given_paragraphs_are_the_passages():
    text = "First part.\n\nSecond part."
    paragraphs = ({"pid": "p0", "start": 0, "end": 11}, {"pid": "p1", "start": 11, "end": 13})
    passages = split_passages([TextDocument(text, paragraphs=paragraphs)])
    assert [(passage.passage_id, passage.text) for passage in passages] == [("p0", "First part.")]


def test_a_paragraph_outside_its_text_is_refused():
    with pytest.raises(UsageError, match="p9"):
        split_passages([TextDocument("Short.", paragraphs=({"pid": "p9", "start": 2, "end": 99},))])


@pytest.mark.parametrize(("max_word_pieces", "overlap"), [(0, 0), (10, 10), (10, -1)])
def test_an_overlap_that_cannot_advance_is_refused(max_word_pieces, overlap):
    with pytest.raises(UsageError):
        split_passages([TextDocument("Text.")], max_word_pieces=max_word_pieces, overlap=overlap)


def test_blank_documents_have_no_passages():
    assert split_passages([TextDocument(""), TextDocument(" \n\n "), TextDocument("\n", doc_id="a.py")]) == []


def test_the_tokenizer_of_an_embedder_bounds_the_windows(embedder):
    passages = split_passages(
        [TextDocument(SENTENCES)], max_word_pieces=100, overlap=10, piece_spans=embedder.piece_spans
    )
    assert max(len(embedder.piece_spans(passage.text)) for passage in passages) <= 100
    assert min(len(embedder.piece_spans(passage.text)) for passage in passages[:-1]) >= 66


@pytest.mark.parametrize(
    ("gap", "rank"),
    [("it.\n \n", 0), ('it."  ', 1), ("it,\n\t", 2), ("it ", 3), ("it", 4), ("", 4), (".\na ", 3), ("a. b", 4)],
)
def test_seams_are_told_apart(gap, rank):
    assert _seam_rank(gap) == rank


def test_an_identifier_with_a_dot_still_has_headings():
    text = "## Changes\n\nNone.\n\n## Thanks\n\nAll.\n"
    passages = split_passages([TextDocument(text, doc_id="release-1.2", title="Release")])
    assert [passage.title for passage in passages] == ["Release > Changes", "Release > Thanks"]
