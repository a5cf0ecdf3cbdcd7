"""HTML through Beautiful Soup: the main part of the page as light Markdown.

Kept: headings, paragraphs, lists, tables, code, the alternative text of pictures. Left out: navigation, scripts,
styles, page footers, controls of forms, link targets. With a `main` element (or role) only that is read, as long as it
holds text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import groupby

from bs4 import BeautifulSoup, Tag
from bs4.element import NavigableString, PageElement, PreformattedString

from cag.corpus.loaders import markup
from cag.corpus.loaders.base import Extract, Source
from cag.corpus.loaders.tables import Cell, table
from cag.corpus.loaders.text import read_text

_DROPPED = [
    "script",
    "style",
    "template",
    "noscript",
    "nav",
    "svg",
    "iframe",
    "object",
    "canvas",
    "button",
    "select",
    "head",
]
_NOISE = (
    "[role=navigation], [role=search], [role=contentinfo], [hidden], [aria-hidden=true], a.headerlink, a.anchor, "
    "a.anchorjs-link, a.hash-link, a.skip-link, body > footer, body > div > footer, input, textarea"
)
_MAIN = "main, [role=main]"
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_CONTAINERS = (
    *(
        "html",
        "body",
        "main",
        "article",
        "section",
        "div",
        "header",
        "footer",
        "aside",
        "p",
        "address",
        "figure",
        "center",
    ),
    *("figcaption", "details", "summary", "form", "fieldset", "legend", "li", "dt", "dd", "caption", "tr", "td", "th"),
    *("tbody", "thead", "tfoot", "hgroup", "search", "dialog", "title"),
)
_BLOCKS = frozenset((*_HEADINGS, *_CONTAINERS, "pre", "ul", "ol", "menu", "dl", "table", "blockquote", "hr"))
_LEAVES = ("br", "img")
_MAX_DEPTH = 512  # Chromium's
_MAX_SPAN = 1000
_LANGUAGE = re.compile(r"(?:language|lang|highlight|brush)[-:]([\w+#.-]+)")
_NOT_A_LANGUAGE = ("default", "none", "text", "notranslate")


class _Page(BeautifulSoup):
    """A page that is refused while it is read, once its elements nest deeper than browsers let them."""

    def pushTag(self, tag: Tag) -> None:  # noqa: N802  (Beautiful Soup's name)
        """Called for each element that begins. Raises: RecursionError."""
        super().pushTag(tag)
        if len(self.tagStack) > _MAX_DEPTH:
            raise RecursionError


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain; RecursionError."""
    # Beautiful Soup warns about markup that looks like a file name, an address or XML; line ends prevent that.
    page = _Page(f"\n{read_text(source, allow_declared=True)}\n", "lxml")
    page_title = page.title.get_text() if page.title else ""
    first_heading = page.find(_HEADINGS)
    title = page_title if page_title.strip() else first_heading.get_text() if first_heading else ""
    for element in (*page.find_all(_DROPPED), *page.select(_NOISE)):
        element.decompose()
    mains = (markup.join_blocks(_blocks(element)) for element in page.select(_MAIN)[:1])
    return [Extract(next(filter(None, mains), "") or markup.join_blocks(_blocks(page)), title)]


def _blocks(element: Tag) -> list[str]:
    return _grouped(map(_rendered, element.children))


def _rendered(node: PageElement) -> str | list[str]:
    """Blocks, or the text of what stands within a line."""
    if not isinstance(node, Tag) or node.name in _LEAVES:
        return _inline(node)
    if node.name in _BLOCKS:
        return _RENDERERS.get(node.name, _blocks)(node)
    parts = list(map(_rendered, node.children))
    return _grouped(parts) if any(isinstance(part, list) for part in parts) else "".join(map(str, parts))


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
    return [markup.heading(int(element.name[1]), _paragraph([_inline(element)]))]


def _paragraph(run: list[str]) -> str:
    """Inline text with its white space collapsed; line breaks of the source's `br` kept."""
    lines = "".join(run).split("\n")
    return "\n".join(" ".join(line.split()) for line in lines).strip()


def _inline(node: PageElement) -> str:
    if isinstance(node, Tag):
        if node.name == "br":
            return "\n"
        if node.name == "img":
            return str(node.get("alt") or "")
        return "".join(map(_inline, node.children))
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
    first_number = None
    if element.name == "ol":
        start = str(element.get("start") or "1")
        first_number = int(start) if re.fullmatch(r"[0-9]{1,9}", start) else 1
    items = [
        _blocks(child) if child.name == "li" else _grouped([_rendered(child)])
        for child in element.find_all(True, recursive=False)
    ]
    return [markup.bullets(items, first_number=first_number)]


def _definitions(element: Tag) -> list[str]:
    blocks: list[str] = []
    for child in element.find_all(True, recursive=False):
        if child.name == "dd" and blocks:
            blocks[-1] = markup.definition(blocks[-1], _blocks(child))
        else:
            blocks.append(markup.join_blocks(_definitions(child) if child.name == "div" else _blocks(child)))
    return blocks


def _table(element: Tag) -> list[str]:
    # Tables that lay out a page, or number the lines of code, hold other structure and are no tables of data.
    if element.find(("table", "pre", *_HEADINGS)):
        return _blocks(element)
    caption = element.find("caption")
    groups = [list(group) for _, group in groupby(element.find_all("tr"), lambda row: id(row.parent))]
    rows = [_cells(row, len(group) - index) for group in groups for index, row in enumerate(group)]
    return [_paragraph([_inline(caption)]) if caption else "", table(rows)]


def _cells(row: Tag, num_rows: int) -> list[Cell]:
    """The cells of a row; `num_rows` with those below it in its group, over which no cell reaches."""
    return [
        Cell(" ".join(_blocks(cell)), _span(cell, "colspan"), min(_span(cell, "rowspan") or num_rows, num_rows))
        for cell in row.find_all(("td", "th"))
    ]


def _span(cell: Tag, name: str) -> int:
    """As HTML reads it: 1 for what is no number, at most 1000; a `rowspan` of 0 reaches to the end."""
    found = re.match(r"\s*\+?([0-9]{1,9})", str(cell.get(name) or ""))
    span = int(found.group(1)) if found else 1
    return min(span, _MAX_SPAN) or (1 if name == "colspan" else 0)


def _quotation(element: Tag) -> list[str]:
    return [markup.quotation(_blocks(element))]


_RENDERERS: dict[str, Callable[[Tag], list[str]]] = {
    **dict.fromkeys(_HEADINGS, _heading),
    "pre": _code,
    "ul": _list,
    "ol": _list,
    "menu": _list,
    "dl": _definitions,
    "table": _table,
    "blockquote": _quotation,
}
