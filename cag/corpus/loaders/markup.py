"""The small part of Markdown in which structured formats (HTML, reStructuredText, Word) are written out.

A text is a list of blocks, joined by blank lines. Text inside blocks is never escaped: quotes read as in the source.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import repeat


def join_blocks(blocks: Iterable[str]) -> str:
    """Blocks with a blank line between them; blank ones left out."""
    return "\n\n".join(block for block in blocks if block.strip())


def heading(level: int, text: str) -> str:
    """A heading of level 1 and up (deeper than 6 stays 6); "" for a blank one."""
    text = " ".join(text.split())
    return f"{'#' * min(max(level, 1), 6)} {text}" if text else ""


def fence(code: str, language: str = "") -> str:
    """A code block as it stands, with a fence longer than any in it."""
    code = code.strip("\n")
    longest = max((len(run) for run in re.findall(r"`{3,}", code)), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}{language}\n{code}\n{marks}" if code.strip() else ""


def bullets(items: Iterable[Sequence[str]], marks: Iterable[str] | None = None) -> str:
    """A list whose items are lists of blocks, each behind its mark; by default behind a dash."""
    lines = []
    for mark, blocks in zip(repeat("-") if marks is None else marks, items, strict=False):
        body = "\n".join(block for block in blocks if block.strip())
        if body:
            lines.append(f"{mark} {textwrap.indent(body, ' ' * (len(mark) + 1)).lstrip(' ')}")
    return "\n".join(lines)


def definition(term: str, blocks: Iterable[str]) -> str:
    """A term, and below it what belongs to it, indented by two spaces."""
    return "\n".join(part for part in (term, textwrap.indent(join_blocks(blocks), "  ")) if part.strip())


def quotation(blocks: Iterable[str]) -> str:
    """Blocks marked as a quotation."""
    return textwrap.indent(join_blocks(blocks), "> ", lambda _: True) if (blocks := list(blocks)) else ""
