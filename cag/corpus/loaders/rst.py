"""reStructuredText through docutils, Sphinx flavour included, as light Markdown.

The document is parsed but not transformed: what docutils does not know (Sphinx directives and roles) is still in the
tree as an error with its source, and is read from there by `rst_directives`, so no text is lost and nothing has to be
registered. Roles that a document defines hold in that document only. Includes and raw output are off. Left out:
comments, tables of contents, link targets, pictures without a text.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import cache
from itertools import count
from threading import Lock

from docutils import frontend, nodes, utils
from docutils.parsers.rst import Parser, roles

from cag.corpus.loaders import markup, rst_directives
from cag.corpus.loaders.base import Extract, Source
from cag.corpus.loaders.formulas import superscript
from cag.corpus.loaders.numerals import numeral
from cag.corpus.loaders.rst_marks import mark_reader
from cag.corpus.loaders.tables import Cell, table
from cag.corpus.loaders.text import read_text

_ERROR_LEVEL = 3
_LEFT_OUT = (
    *(nodes.comment, nodes.substitution_definition, nodes.raw, nodes.pending, nodes.meta, nodes.decoration),
    *(nodes.target, nodes.label),
)
# Sphinx fills these in from its configuration, which a document does not hold.
_SPHINX_VARIABLES = ("version", "release", "today")
_ROLE = re.compile(r":(?P<role>[\w:+.-]+):`(?P<content>.*)`", re.DOTALL)
_ROLE_TITLE = re.compile(r"(?P<title>.+?)(?P<space>\s*)<[^<>]*>", re.DOTALL)
# Roles whose content is never code: there a target may follow its title without a space.
_PROSE_ROLES = ("ref", "numref", "doc", "term", "download", "any")
_NUMERALS = {"loweralpha": "a", "upperalpha": "A", "lowerroman": "i", "upperroman": "I"}
_ROLES_LOCK = Lock()


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for binary data and for encodings that are not certain."""
    text = read_text(source)
    with _own_roles():
        document = _parse(text)
        renderer = _Renderer(document.substitution_defs)
        return [Extract(markup.join_blocks(renderer.blocks(document)), renderer.title)]


@contextmanager
def _own_roles() -> Iterator[None]:
    """One document at a time: docutils keeps the roles that documents define in a dictionary of the process."""
    with _ROLES_LOCK:
        kept = roles._roles
        roles._roles = {}
        try:
            yield
        finally:
            roles._roles = kept


@cache
def _settings() -> frontend.Values:
    """Those of every parse; docutils makes them by a parser of command lines, in milliseconds."""
    settings = frontend.get_default_settings(Parser)
    settings.file_insertion_enabled = False
    settings.raw_enabled = False
    settings.report_level = settings.halt_level = 5
    settings.warning_stream = io.StringIO()
    settings.syntax_highlight = "none"
    return settings


def _parse(text: str) -> nodes.document:
    settings = copy(_settings())
    # docutils drops a whole document for one line over this limit; the size of the file is bounded already.
    settings.line_length_limit = len(text) + 1
    document = utils.new_document("document", settings)
    Parser(inliner=mark_reader(settings)).parse(text, document)
    return document


class _Renderer:
    """Turns a docutils tree into blocks. `title` is the first section title, once `blocks` has passed it."""

    def __init__(self, substitutions: dict[str, nodes.Element], level: int = 0) -> None:
        self.title = ""
        self._substitutions = substitutions
        self._names = {name.lower(): name for name in substitutions}
        self._level = level

    def blocks(self, node: nodes.Node) -> list[str]:
        """The blocks of a node's children, in order."""
        return [block for child in node.children for block in self._block(child) if block.strip()]

    def _block(self, node: nodes.Node) -> Iterable[str]:
        if isinstance(node, _LEFT_OUT):
            return []
        render = getattr(self, f"_render_{type(node).__name__}", None)
        if render is not None:
            return list(render(node))
        if isinstance(node, nodes.Admonition) and not isinstance(node, nodes.system_message):
            return self._labelled(type(node).__name__.capitalize(), self.blocks(node))
        if isinstance(node, nodes.Text | nodes.TextElement):
            return [self._line(node)]
        return self.blocks(node)

    def _inline(self, node: nodes.Node) -> str:
        if isinstance(node, nodes.Text):
            return str(node.astext())
        if isinstance(node, nodes.substitution_reference):
            return self._substituted(node)
        if isinstance(node, nodes.problematic):
            return _role_text(node.astext())
        if isinstance(node, nodes.superscript):
            return superscript(node.astext())
        if isinstance(node, nodes.footnote_reference | nodes.citation_reference):
            return f"[{node.astext() or '#'}]"
        if isinstance(node, nodes.image):
            return str(node.get("alt", ""))
        if isinstance(node, nodes.system_message | nodes.raw):
            return ""
        return "".join(map(self._inline, node.children))

    def _line(self, node: nodes.Node) -> str:
        return " ".join(self._inline(node).split())

    def _substituted(self, node: nodes.substitution_reference) -> str:
        name = node["refname"]
        definition = self._substitutions.get(self._names.get(name.lower(), name))
        if name in _SPHINX_VARIABLES and definition is None:
            return ""
        # A date would change the text, and with it the cache, from day to day.
        if definition is None or "date::" in definition.rawsource:
            return f"|{node.astext()}|"
        return "".join(self._inline(child) for child in definition.children if not list(child.findall(nodes.image)))

    def _render_section(self, node: nodes.section) -> list[str]:
        self._level += 1
        blocks = self.blocks(node)
        self._level -= 1
        return blocks

    def _render_title(self, node: nodes.title) -> list[str]:
        text = self._line(node)
        if not isinstance(node.parent, nodes.section):
            return [text]
        self.title = self.title or text
        return [markup.heading(self._level, text)]

    def _render_literal_block(self, node: nodes.literal_block) -> list[str]:
        languages = [name for name in node.get("classes", []) if name != "code"]
        # Numbers of lines, where docutils has added them, are elements of the class "ln".
        code = "".join(
            child.astext() for child in node.children if "ln" not in getattr(child, "attributes", {}).get("classes", [])
        )
        return [markup.fence(code, languages[0] if languages else "")]

    _render_doctest_block = _render_math_block = _render_literal_block

    def _render_bullet_list(self, node: nodes.Element) -> list[str]:
        return [markup.bullets(self.blocks(item) for item in node.children)]

    def _render_enumerated_list(self, node: nodes.Element) -> list[str]:
        kind = _NUMERALS.get(node["enumtype"], "1")
        numbers = count(node.get("start", 1))
        marks = (f"{node['prefix']}{numeral(number, kind)}{node['suffix']}" for number in numbers)
        return [markup.bullets(map(self.blocks, node.children), marks)]

    def _render_definition_list_item(self, node: nodes.Element) -> list[str]:
        *terms, body = node.children
        return [markup.definition(" : ".join(map(self._line, terms)), self.blocks(body))]

    def _render_field(self, node: nodes.Element) -> list[str]:
        name, body = node.children
        return self._labelled(self._line(name), self.blocks(body))

    def _render_option_list_item(self, node: nodes.Element) -> list[str]:
        group, description = node.children
        options = ", ".join(option.astext() for option in group.children)
        return [markup.definition(options, self.blocks(description))]

    def _render_line_block(self, node: nodes.Element) -> list[str]:
        lines = (line for child in node.children for line in self._block(child))
        is_inner = isinstance(node.parent, nodes.line_block)
        return [textwrap.indent("\n".join(lines), "  " if is_inner else "")]

    def _render_block_quote(self, node: nodes.Element) -> list[str]:
        return [markup.quotation(self.blocks(node))]

    def _render_footnote(self, node: nodes.Element) -> list[str]:
        label = next((child.astext() for child in node.children if isinstance(child, nodes.label)), "#")
        return [f"[{label}] {' '.join(self.blocks(node))}"]

    _render_citation = _render_footnote

    def _render_image(self, node: nodes.Element) -> list[str]:
        return [str(node.get("alt", ""))]

    def _render_admonition(self, node: nodes.Element) -> list[str]:
        title, *body = self.blocks(node) or [""]
        return self._labelled(title, body)

    def _render_table(self, node: nodes.Element) -> list[str]:
        caption = [self._line(child) for child in node.children if isinstance(child, nodes.title)]
        parts = [part for group in node.findall(nodes.tgroup) if group.parent is node for part in group.children]
        rows = [
            self._cells(row) for part in parts if isinstance(part, nodes.thead | nodes.tbody) for row in part.children
        ]
        return [*caption, table(rows)]

    def _cells(self, row: nodes.Element) -> list[Cell]:
        return [
            Cell(" ".join(self.blocks(entry)), entry.get("morecols", 0) + 1, entry.get("morerows", 0) + 1)
            for entry in row.children
        ]

    def _labelled(self, label: str, blocks: list[str]) -> list[str]:
        first, *rest = blocks or [""]
        return [f"{label}: {first}".rstrip(), *rest]

    def _render_system_message(self, node: nodes.system_message) -> list[str]:
        """Source that docutils refused: an unknown directive is read, anything else is kept as it stands."""
        if node["level"] < _ERROR_LEVEL:
            return []
        return [block for refused in node.findall(nodes.literal_block) for block in self._refused(refused.astext())]

    def _refused(self, source: str) -> list[str]:
        directive = rst_directives.read_directive(source)
        if directive is None:
            return [] if source.startswith("..") else [markup.fence(source)]
        blocks = list(directive.lead_blocks())
        if directive.is_code:
            return [*blocks, markup.fence(directive.body, directive.language)]
        if directive.inline_lead:
            blocks = self._labelled_text(directive.label, directive.inline_lead) + blocks
        if directive.body:
            blocks += _Renderer(self._substitutions, self._level).blocks(_parse(directive.body))
        return blocks

    def _labelled_text(self, label: str, text: str) -> list[str]:
        line = " ".join(_Renderer(self._substitutions).blocks(_parse(text)))
        return [f"{label} {line}".strip()]


def _role_text(source: str) -> str:
    """The readable part of a role that docutils does not know; other source as it stands."""
    found = _ROLE.fullmatch(source)
    if found is None:
        return source
    content = found.group("content")
    titled = _ROLE_TITLE.fullmatch(content)
    if titled and (titled.group("space") or found.group("role").rpartition(":")[2] in _PROSE_ROLES):
        return titled.group("title")
    return content.rsplit(".", 1)[-1].lstrip("~") if content.startswith("~") else content.lstrip("!")
