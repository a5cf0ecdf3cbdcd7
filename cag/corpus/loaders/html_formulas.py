"""Superscripts and MathML of an HTML page, rewritten in place as the text that stands for them."""

from __future__ import annotations

import re
from collections.abc import Callable

from bs4 import Tag
from bs4.element import NavigableString

from cag.corpus.loaders.formulas import fraction, matrix, over_range, root, superscript
from cag.corpus.loaders.html_page import BLOCKS

_NOT_RAISED = BLOCKS | {"img"}
_SLASH = re.compile(r"\s*[/\u2044\u2215]\s*")
_NOTE = re.compile(r"\w{1,3}(?:[,;\s]+\w{1,3})*")
_TEX_STYLE = re.compile(r"\s*\{\\(?:display|text)style (.*)\}\s*", re.DOTALL)


def write_formulas(page: Tag) -> None:
    """Put text in each formula and each superscript of `page`."""
    for formula in page.find_all("math"):
        formula.string = _formula(formula)
    for raised in reversed(page.find_all("sup")):
        below = _denominator(raised)
        if below is not None:  # a space, as 3 and 1/2 are not 31/2
            raised.string, below.string = f" {raised.get_text()}", f"{below.get_text()} "
        elif not raised.find(lambda tag: tag.name in _NOT_RAISED):
            raised.string = _raised(raised)


def _denominator(raised: Tag) -> Tag | None:
    """The subscript behind a slash that makes a superscript a numerator."""
    slash = raised.next_sibling
    below = slash.next_sibling if isinstance(slash, NavigableString) and _SLASH.fullmatch(slash) else None
    return below if isinstance(below, Tag) and below.name == "sub" and raised.get_text().strip().isalnum() else None


def _raised(element: Tag) -> str:
    """The mark of a note, which is a link, in brackets; anything else as a power."""
    text = element.get_text().strip()
    parent = element.parent
    is_link = element.find("a", href=True) or (parent and parent.get("href") and parent.contents == [element])
    written = superscript(text)
    return f"[{text}]" if is_link and _NOTE.fullmatch(text) and written != text else written


def _formula(element: Tag) -> str:
    """TeX, where the page has it beside MathML."""
    source = element.find("annotation", encoding=re.compile("tex", re.IGNORECASE))
    tex = source.get_text() if source else str(element.get("alttext") or "")
    styled = _TEX_STYLE.fullmatch(tex)
    return (styled.group(1) if styled else tex).strip() or _text(element)


def _text(element: Tag) -> str:
    if element.name in ("annotation", "annotation-xml"):
        return ""
    children = element.find_all(True, recursive=False)
    if not children:
        return " ".join(element.get_text().split())
    parts = list(map(_text, children))
    write = _WRITERS.get((element.name, len(parts)))
    if write is not None:
        return write(*parts)
    if element.name == "mtable":
        return matrix([list(map(_text, row.find_all("mtd", recursive=False))) for row in children])
    text = "".join(parts)
    return root(text) if element.name == "msqrt" else f"({text})" if element.name == "mfenced" else text


# By the name of an element and the number of its parts.
_WRITERS: dict[tuple[str, int], Callable[..., str]] = {
    ("msup", 2): lambda base, upper: base + superscript(upper),
    ("msubsup", 3): lambda base, lower, upper: base + lower + superscript(upper),
    ("munderover", 3): over_range,
    ("mfrac", 2): fraction,
    ("mroot", 2): root,
}
