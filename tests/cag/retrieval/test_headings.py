from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cag.retrieval.headings import find_headings, split_sections


def headings_of(text: str) -> list[tuple[int, str]]:
    return [(heading.level, heading.text) for heading in find_headings(text)]


def test_both_kinds_of_headings_are_found():
    text = "Top\n===\n\nwords\n\nBelow\n-----\n\n### Deep ###\nwords\n"
    assert headings_of(text) == [(1, "Top"), (2, "Below"), (3, "Deep")]


def test_code_fences_hide_headings():
    text = "# Real\n```sh\n# a comment\n~~~\n```\n~~~~\n```\n# still code\n~~~\n~~~~\n# Next\n"
    assert headings_of(text) == [(1, "Real"), (1, "Next")]


def test_inline_code_opens_no_fence():
    assert headings_of("```x``` is code\n# Real\n") == [(1, "Real")]


def test_an_open_fence_hides_the_rest():
    assert headings_of("# Real\n```\n# code\n") == [(1, "Real")]


def test_rules_tables_lists_and_hashtags_are_no_headings():
    text = "words\n\n---\n\n| a | b |\n---\n- item\n---\n#hashtag\n####### seven\n"
    assert headings_of(text) == []


def test_closing_marks_are_dropped_when_they_stand_apart():
    assert headings_of("# Why C#\n## Two ##  \n### ###\n#### \n") == [(1, "Why C#"), (2, "Two")]


def test_a_heading_of_very_many_spaces_is_read_in_linear_time():
    assert headings_of("# a" + " " * 200_000 + "# b\n") == [(1, "a" + " " * 200_000 + "# b")]


def test_deeper_headings_end_with_their_parent():
    text = "intro\n# A\na\n### A.1\nb\n## A.2\nc\n# B\nd\n"
    assert [section.headings for section in split_sections(text)] == [(), ("A",), ("A", "A.1"), ("A", "A.2"), ("B",)]


def test_headings_at_the_end_without_text_stay_a_section():
    text = "# A\na\n# B\n"
    assert [text[section.start : section.end] for section in split_sections(text)] == ["# A\na\n", "# B\n"]


@given(st.text(alphabet="ab \n#=-`~|", max_size=300))
def test_sections_follow_each_other_without_gaps(text):
    sections = split_sections(text)
    assert "".join(text[section.start : section.end] for section in sections) == (text if text.strip() else "")
