"""Sections of a text by its Markdown headings: `# Heading` lines and underlined ones, outside code fences.

A text goes in, character ranges with their path of headings come out, in order, without gaps. Which files are worth
the look is the caller's matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

ATX_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*)")
UNDERLINE = re.compile(r"(={3,}|-{3,})[ \t]*$")
UNDERLINE_LEVEL = {"=": 1, "-": 2}
# A line of inline code may begin with three backticks too; then it has others further on.
FENCE = re.compile(r" {0,3}(`{3,}(?=[^`\n]*\n?\Z)|~{3,})")
LINE = re.compile(r"[^\n]*\n|[^\n]+")


@dataclass(frozen=True)
class Heading:
    """A heading line: where its first line starts, where the text after it starts, its level (1 is the top)."""

    start: int
    body_start: int
    level: int
    text: str


@dataclass(frozen=True)
class Section:
    """The characters `start:end`, heading line included, and the headings that lead to it, outermost first."""

    start: int
    end: int
    headings: tuple[str, ...]


def split_sections(text: str) -> list[Section]:
    """Consecutive sections that cover `text`; a heading with nothing below it joins the section that follows."""
    sections: list[Section] = []
    path: list[Heading] = []
    start, body_start = 0, 0
    for heading in find_headings(text):
        if text[body_start : heading.start].strip():
            sections.append(_section(start, heading.start, path))
            start = heading.start
        path = [parent for parent in path if parent.level < heading.level] + [heading]
        body_start = heading.body_start
    if text[start:].strip():
        sections.append(_section(start, len(text), path))
    return sections


def find_headings(text: str) -> Iterator[Heading]:
    """The headings of `text`, in order."""
    previous: re.Match[str] | None = None
    for line in _lines_outside_fences(text):
        atx = ATX_HEADING.match(line.group())
        if atx and (heading_text := _without_closing_marks(atx.group(2))):
            yield Heading(line.start(), line.end(), len(atx.group(1)), heading_text)
        elif previous and _is_underlined(previous, line):
            level = UNDERLINE_LEVEL[line.group()[0]]
            yield Heading(previous.start(), line.end(), level, previous.group().strip())
        previous = None if atx else line


def _without_closing_marks(heading_text: str) -> str:
    text = heading_text.strip()
    bare = text.rstrip("#")
    # "C#" keeps its mark; only marks that stand apart close a heading.
    return bare.rstrip() if bare == "" or bare[-1].isspace() else text


def _is_underlined(title: re.Match[str], line: re.Match[str]) -> bool:
    title_text = title.group().strip()
    # Table rows and list items above a rule are no titles; neither is a line far from the one above it.
    plausible = bool(title_text) and title_text[0] not in "|-*+>=" and title.end() == line.start()
    return plausible and UNDERLINE.match(line.group().rstrip()) is not None


def _lines_outside_fences(text: str) -> Iterator[re.Match[str]]:
    fence = ""
    for line in LINE.finditer(text):
        mark = FENCE.match(line.group())
        if fence:
            closes = mark is not None and mark.group(1).startswith(fence) and not line.group().strip(" \t\n" + fence[0])
            fence = "" if closes else fence
        elif mark:
            fence = mark.group(1)
        else:
            yield line


def _section(start: int, end: int, path: list[Heading]) -> Section:
    return Section(start, end, tuple(heading.text for heading in path))
