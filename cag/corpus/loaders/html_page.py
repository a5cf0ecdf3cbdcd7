"""The tree of an HTML page, with what is no text of it taken out. It does not know how text is written out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bs4 import BeautifulSoup, Tag

HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
LISTS = ("ul", "ol", "menu", "dir", "dl")
CODE = ("pre", "listing", "xmp", "plaintext")
_CONTAINERS = """
    html head body main article section div header footer aside p address figure center figcaption details summary form
    fieldset legend li dt dd caption tr td th tbody thead tfoot hgroup search dialog"""
BLOCKS = frozenset((*HEADINGS, *LISTS, *CODE, *_CONTAINERS.split(), "table", "blockquote", "hr"))
_DROPPED = ["script", "style", "template", "noscript", "nav", "svg", "iframe", "object", "canvas", "select"]
_NOISE = (
    "[role=navigation], [role=search], [role=contentinfo], a.skip-link, input, textarea, "
    # Of a page without a written body, libxml2 leaves what it does not know in the head.
    ":is(html, head, body) > footer, "
    "[aria-hidden=true]:not([role=tabpanel]), "
    # The heads of folded sections and of columns are buttons, and prose says which to press.
    "button:not([role=tab], :is(h1, h2, h3, h4, h5, h6, summary, dt, p, td, th) button), "
    "td.linenos, td.gutter, pre span.linenos, pre span.lineno"
)
_HIDDEN = "[hidden]:not([role=tabpanel], [hidden=until-found i])"
_ANCHORS = (
    "a.headerlink, a.anchor, a.anchorjs-link, a.hash-link, "
    ":is(h1, h2, h3, h4, h5, h6, dt, caption, figcaption) a[href*='#']"
)
# All that links to the place they stand at say; signs of icon fonts are for private use.
_ANCHOR_SIGNS = re.compile("[\\s\\u200b\\ufeff\\ufe0f\\ue000-\\uf8ff¶#§🔗⚓]*")
# Elements that end where one of their kind begins, unless one of those named last is between the two. libxml2 ends
# them only where nothing is open in them, and no `dd` before a `dd`.
_ITEM_LIMITS = BLOCKS - {"div", "p", "address"}
_ENDED_BY: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    "li": (("li",), _ITEM_LIMITS),
    **dict.fromkeys(("dt", "dd"), (("dt", "dd"), _ITEM_LIMITS)),
    **dict.fromkeys(("td", "th"), (("td", "th"), frozenset({"table"}))),
    "tr": (("tr",), frozenset({"table"})),
    **dict.fromkeys(("rt", "rp"), (("rt", "rp"), frozenset({"ruby"}))),
}
_MAX_DEPTH = 512  # Chromium's


class _Page(BeautifulSoup):
    """A page that is refused while it is read, once its elements nest deeper than browsers let them.

    Elements without an end tag end where browsers end them; lxml tells the end of some of them later.
    """

    def reset(self) -> None:
        """Called before the first element."""
        super().reset()
        self._begun: list[Tag | None] = []  # what lxml has begun and not ended

    def pushTag(self, tag: Tag) -> None:  # noqa: N802  (Beautiful Soup's name)
        """Called for each element that begins. Raises: RecursionError."""
        super().pushTag(tag)
        if len(self.tagStack) > _MAX_DEPTH:
            raise RecursionError

    def handle_starttag(self, name: str, *details: Any, **more: Any) -> Tag | None:
        """Called where lxml begins an element."""
        if name in _ENDED_BY:
            self._end(*_ENDED_BY[name])
        tag = super().handle_starttag(name, *details, **more)
        self._begun.append(tag)
        return tag

    def handle_endtag(self, name: str, nsprefix: str | None = None) -> None:
        """Called where lxml ends an element, also one that has ended before."""
        begun = self._begun.pop()
        if any(tag is begun for tag in reversed(self.tagStack)):
            super().handle_endtag(name, nsprefix)

    def _end(self, names: tuple[str, ...], limits: frozenset[str]) -> None:
        for tag in reversed(self.tagStack):
            if tag.name in names:
                self.endData()
                self._popToTag(tag.name)
                return
            if tag.name in limits:
                return


def read_page(text: str) -> tuple[BeautifulSoup, str]:
    """(what a reader sees of a page, its title or else its first heading). Raises: RecursionError."""
    # Beautiful Soup warns about markup that looks like a file name, an address or XML; line ends prevent that.
    page = _Page(f"\n{text}\n", "lxml")
    # Tabs and folded sections are hidden until a reader opens them.
    folded = {target for opener in page.select("[aria-controls]") for target in str(opener["aria-controls"]).split()}
    _remove(element for element in page.select(_HIDDEN) if element.get("id") not in folded)
    _remove((*page.find_all(_DROPPED), *page.select(_NOISE)))
    _remove(anchor for anchor in page.select(_ANCHORS) if _ANCHOR_SIGNS.fullmatch(anchor.get_text()))
    titles = page.find_all("title")
    candidates = [element.get_text() for element in (*titles[:1], *page.find_all(HEADINGS, limit=1))]
    _remove(titles)
    return page, next(filter(str.strip, candidates), "")


def _remove(elements: Iterable[Tag]) -> None:
    for element in elements:
        element.decompose()
