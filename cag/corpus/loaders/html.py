"""HTML through Beautiful Soup: the main part of the page as light Markdown.

Kept: headings, paragraphs, lists, tables, code, the alternative text of pictures, tabs and sections that are folded
away. Left out: navigation, scripts, styles, the footer of the page, controls of forms, numbers of lines, link targets.
With `main` elements (or roles) only these are read, as long as they hold text. End tags may be missing where HTML lets
them, and text may stand where it should not: nothing that a browser shows as text is lost for that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import cast

from bs4 import Tag
from bs4.element import NavigableString, PageElement, PreformattedString

from cag.corpus.loaders import markup
from cag.corpus.loaders.base import Extract, Source
from cag.corpus.loaders.html_formulas import write_formulas
from cag.corpus.loaders.html_numbers import list_marks, whole_number
from cag.corpus.loaders.html_page import BLOCKS, CODE, HEADINGS, LISTS, read_page
from cag.corpus.loaders.html_ruby import write_ruby
from cag.corpus.loaders.tables import Cell, table
from cag.corpus.loaders.text import read_text

_MAINS = ":is(main, [role=main]):not(:is(main, [role=main]) *)"
_LEAVES = ("br", "img")
_APART = ("label", "button")  # rows of tabs are made of them, with no space between
_MAX_SPAN = 1000
_LANGUAGE = re.compile(r"(?:language|lang|highlight|brush)[-:]([\w+#.-]+)")
_NOT_A_LANGUAGE = ("default", "none", "text", "notranslate")


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain; RecursionError."""
    page, title = read_page(read_text(source, allow_declared=True))
    write_ruby(page)
    write_formulas(page)
    blocks = [block for element in page.select(_MAINS) for block in _blocks(element)] or _blocks(page)
    return [Extract(markup.join_blocks(blocks), title)]


def _blocks(element: Tag) -> list[str]:
    return _grouped(map(_rendered, element.children))


def _rendered(node: PageElement) -> str | list[str]:
    """Blocks, or the text of what stands within a line."""
    if not isinstance(node, Tag) or node.name in _LEAVES:
        return _inline(node)
    if node.name in BLOCKS:
        return _RENDERERS.get(node.name, _blocks)(node)
    parts = list(map(_rendered, node.children))
    if any(isinstance(part, list) for part in parts):
        return _grouped(parts)
    return "".join(map(str, parts)) + (" " if node.name in _APART else "")


def _grouped(parts: Iterable[str | list[str]]) -> list[str]:
    """Blocks as they are, and the text between them as paragraphs."""
    blocks: list[str] = []
    run: list[str] = []
    for part in parts:
        if isinstance(part, str):
            run.append(part)
        else:
            blocks += [_paragraph(run), *part]
            run = []
    return [block for block in (*blocks, _paragraph(run)) if block]


def _heading(element: Tag) -> list[str]:
    return [markup.heading(int(element.name[1]), " ".join(_blocks(element)))]


def _paragraph(run: list[str]) -> str:
    """Inline text with its white space collapsed; line breaks of the source's `br` kept."""
    lines = "".join(run).split("\n")
    return "\n".join(" ".join(line.split()) for line in lines).strip()


def _inline(node: PageElement) -> str:
    """A piece of text, or one of `_LEAVES`."""
    if isinstance(node, Tag):
        return "\n" if node.name == "br" else str(node.get("alt") or "")
    is_text = isinstance(node, NavigableString) and not isinstance(node, PreformattedString)
    return re.sub(r"\s+", " ", str(node)) if is_text else ""


def _code(element: Tag) -> list[str]:
    for line_break in element.find_all("br"):
        line_break.replace_with("\n")
    return [markup.fence(element.get_text(), _language(element))]


def _language(element: Tag) -> str:
    # Highlighters put the language on the code element, on its pre, or on one of the boxes around it.
    around = [element.find("code"), element, element.parent, element.parent.parent if element.parent else None]
    for tag in filter(None, around):
        found = _LANGUAGE.search(" ".join(tag.get_attribute_list("class")))
        if found and found.group(1) not in _NOT_A_LANGUAGE:
            return found.group(1)
    return ""


def _list(element: Tag) -> list[str]:
    """What follows an item without being one belongs to it, as browsers show it; other things stand before the list."""
    lead: list[str] = []
    items: list[Tag] = []
    bodies: list[list[str]] = []
    for name, nodes in _groups(element, ("li",)):
        if name:
            group = cast(list[Tag], list(nodes))
            items += group
            bodies += map(_blocks, group)
        else:
            (bodies[-1] if bodies else lead).extend(_grouped(map(_rendered, nodes)))
    return [*lead, markup.bullets(bodies, list_marks(element, items) if element.name == "ol" else None)]


def _definitions(element: Tag) -> list[str]:
    blocks: list[str] = []
    for name, nodes in _groups(element, ("dt", "dd")):
        if name == "dt":
            blocks += (markup.join_blocks(_blocks(node)) for node in cast(Iterable[Tag], nodes))
        elif name == "dd" and blocks:
            bodies = [markup.definition("", _blocks(node)) for node in cast(Iterable[Tag], nodes)]
            blocks[-1] = "\n".join(filter(str.strip, (blocks[-1], *bodies)))
        else:
            blocks += _grouped(map(_rendered, nodes))
    return blocks


def _groups(element: Tag, names: tuple[str, ...]) -> Iterator[tuple[str, Iterator[PageElement]]]:
    """Runs of children of one of `names`, and of anything else under the name ""."""
    return groupby(
        _opened(element, names), lambda node: node.name if isinstance(node, Tag) and node.name in names else ""
    )


def _opened(element: Tag, names: tuple[str, ...]) -> Iterator[PageElement]:
    """The children of an element; of one that wraps some of `names` and is no list, its children in place of it."""
    for child in element.children:
        if isinstance(child, Tag) and child.name not in (*names, *LISTS) and child.find(names, recursive=False):
            yield from _opened(child, names)
        else:
            yield child


def _table(element: Tag) -> list[str]:
    # Tables that lay out a page, or number the lines of code, hold other structure and are no tables of data.
    if element.find(("table", "pre", *HEADINGS)):
        return _blocks(element)
    groups = [list(group) for _, group in groupby(element.find_all("tr"), lambda row: id(row.parent))]
    rows = [_cells(row, len(group) - index) for group in groups for index, row in enumerate(group)]
    return [*_blocks(element), table(rows)]  # the caption, and what stands outside the cells


def _cells(row: Tag, num_rows: int) -> list[Cell]:
    """The cells of a row, which are empty then; `num_rows`: with those below it in its group, where all of them end."""
    cells = [
        Cell(" ".join(_blocks(cell)), _span(cell, "colspan"), min(_span(cell, "rowspan") or num_rows, num_rows))
        for cell in row.find_all(("td", "th"))
    ]
    for cell in row.find_all(("td", "th")):
        cell.clear()
    return cells


def _span(cell: Tag, name: str) -> int:
    """As HTML reads it: 1 for what is no number, at most 1000; a `rowspan` of 0 reaches to the end."""
    number = whole_number(cell, name)
    span = 1 if number is None or number < 0 else number
    return min(span, _MAX_SPAN) or (1 if name == "colspan" else 0)


def _quotation(element: Tag) -> list[str]:
    return [markup.quotation(_blocks(element))]


_RENDERERS: dict[str, Callable[[Tag], list[str]]] = {
    **dict.fromkeys(HEADINGS, _heading),
    **dict.fromkeys(CODE, _code),
    **dict.fromkeys(LISTS, _list),
    "dl": _definitions,
    "table": _table,
    "blockquote": _quotation,
}
