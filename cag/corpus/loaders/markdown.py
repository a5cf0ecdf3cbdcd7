"""Markdown: kept as it is, because models read it; only YAML front matter is taken off, and gives the title."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from cag.corpus.loaders.base import Extract, Source
from cag.corpus.loaders.text import read_text

_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?\n)?(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL)
_YAML_KEY = re.compile(r"[\w.\"'][\w .\"'-]*:(\s.*)?")
_YAML_START = re.compile(rf"(#.*\n)*{_YAML_KEY.pattern}")
_YAML_LINE = re.compile(rf"[ \t]*(#.*|- ?.*|{_YAML_KEY.pattern}|[\]}}],?)?|[ \t]+.*")
_FRONT_TITLE = re.compile(r"^title:[ \t]+(?P<quote>[\"']?)(?P<title>[^\n|>&*!{\[].*?)(?P=quote)[ \t]*$", re.MULTILINE)
# A first heading stands near the top; parsing a long text for its title would cost more than reading it.
_TITLE_CHARACTERS = 32_768


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain."""
    text = read_text(source).replace("\r\n", "\n")
    front_matter, body = split_front_matter(text)
    declared = _FRONT_TITLE.search(front_matter)
    return [Extract(body, declared.group("title") if declared else first_heading(body))]


def split_front_matter(text: str) -> tuple[str, str]:
    """(front matter without its fences, rest); ("", text) when the text starts with a rule and not with YAML.

    Front matter begins with a key, comments above it or not; a list between two rules is text, whatever stands in it.
    """
    found = _FRONT_MATTER.match(text)
    front_matter = (found.group(1) or "") if found else ""
    lines = front_matter.splitlines()
    is_yaml = _YAML_START.match(front_matter) and all(_YAML_LINE.fullmatch(line) for line in lines)
    return (front_matter, text[found.end() :]) if found and is_yaml else ("", text)


def first_heading(markdown: str) -> str:
    """The text of the first heading, without its markup; "" without one. Headings in code blocks do not count."""
    tokens = _parser().parse(markdown[:_TITLE_CHARACTERS])
    for token, inline in pairwise(tokens):
        if token.type == "heading_open":
            return "".join(_plain(child) for child in inline.children or ())
    return ""


@cache
def _parser() -> MarkdownIt:
    """Of all texts: making one takes longer than parsing a short text, and a file of JSON lines has many."""
    return MarkdownIt("commonmark")


def _plain(token: Token) -> str:
    if token.type in ("text", "code_inline", "image"):
        return token.content
    return " " if token.type in ("softbreak", "hardbreak") else ""
