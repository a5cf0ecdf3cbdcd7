"""Word documents through python-docx: paragraphs, headings, lists, tables and notes in order, as light Markdown.

The XML is walked rather than python-docx's paragraph list, which leaves out content controls, inserted revisions and
text boxes. Page headers, footers, comments and deleted revisions are left out. Entities are never resolved.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import docx
from docx.document import Document as WordDocument
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.oxml import parse_xml
from docx.oxml.ns import qn
from docx.oxml.simpletypes import ST_Merge
from docx.text.paragraph import Paragraph

from cag.corpus.loaders import markup
from cag.corpus.loaders.base import Extract, Source, check_text_size, unreadable
from cag.corpus.loaders.docx_numbers import ListMarks
from cag.corpus.loaders.docx_text import BOX, LEFT_OUT, paragraph_text
from cag.corpus.loaders.tables import Cell, table

_TRANSPARENT = {qn(f"w:{name}") for name in ("sdt", "sdtContent", "ins", "moveTo", "customXml", "smartTag")}
_SKIPPED_COLUMNS = f"{qn('w:trPr')}/{qn('w:gridBefore')}"
_NO_LIST = "0"  # takes a paragraph out of the list of its style
_MAX_BASE_STYLES = 11  # Word's; styles may also stand on each other in a circle
_HEADING = re.compile(r"heading ([1-9])", re.IGNORECASE)


def load(source: Source) -> list[Extract]:
    """One text. Raises: UnreadableDocument for other files, for archives over the limits and for XML with a DTD."""
    _check_archive(source)
    document = docx.Document(io.BytesIO(source.content))
    reader = _Reader(document)
    blocks = [*reader.blocks(document.element.body), *reader.notes()]
    declared = document.core_properties.title
    return [Extract(markup.join_blocks(blocks), declared if _is_chosen(declared) else reader.title)]


def _is_chosen(title: str | None) -> bool:
    return bool(title and title.strip()) and title != "Word Document"


def _check_archive(source: Source) -> None:
    """Bound what the archive unpacks to; zipfile itself refuses an entry longer than its declared size."""
    with zipfile.ZipFile(io.BytesIO(source.content)) as archive:
        if any(entry.flag_bits & 1 for entry in archive.infolist()):
            raise unreadable(source.name, "it is encrypted", "Save it without a password.")
        xml = [entry for entry in archive.infolist() if entry.filename.endswith((".xml", ".rels"))]
        check_text_size(source, sum(entry.file_size for entry in xml))
        if sum(entry.file_size for entry in archive.infolist()) > source.limits.max_file_bytes:
            raise unreadable(source.name, f"it unpacks to more than {source.limits.max_file_bytes} bytes")
        if any(b"<!DOCTYPE" in archive.read(entry)[:65_536] for entry in xml):
            raise unreadable(source.name, "its XML declares a document type, which no word processor writes")


@dataclass(frozen=True, slots=True)
class _Style:
    """The name of a style in lower case, and the properties of paragraphs of it and of each that it stands on."""

    name: str
    properties: tuple[Any, ...]


class _Reader:
    """Walks one document. `title` is its first title or heading, once `blocks` has passed it."""

    def __init__(self, document: WordDocument) -> None:
        self.title = ""
        self._document = document
        self._styles: dict[str | None, _Style] = {}
        self._marks = ListMarks(document)
        styles = document.styles.element.style_lst
        self._raised_styles = {style.styleId for style in styles if style.rPr is not None and style.rPr.superscript}

    def blocks(self, parent: Any) -> list[str]:
        """Paragraphs and tables of an element, in order; neighbouring list items make one block."""
        blocks: list[str] = []
        in_list = False
        for child in _children(parent):
            if child.tag == qn("w:p"):
                mark = self._list_mark(child)
                text = self._paragraph(child, mark)
                if mark and in_list and text:
                    blocks[-1] += f"\n{text}"
                elif text:
                    blocks.append(text)
                in_list = bool(mark) if text else in_list
                blocks += [block for box in child.iter(BOX) if not _is_left_out(box) for block in self.blocks(box)]
            elif child.tag == qn("w:tbl"):
                blocks.append(self._table(child))
                in_list = False
        return [block for block in blocks if block]

    def notes(self) -> list[str]:
        """Footnotes and endnotes, each with the mark that stands in the text."""
        blocks = []
        for kind, prefix in ((RELATIONSHIP_TYPE.FOOTNOTES, ""), (RELATIONSHIP_TYPE.ENDNOTES, "e")):
            for relation in self._document.part.rels.values():
                if relation.reltype == kind and not relation.is_external:
                    notes = parse_xml(relation.target_part.blob)
                    blocks += [self._note(note, prefix) for note in notes if note.get(qn("w:type")) is None]
        return blocks

    def _note(self, note: Any, prefix: str) -> str:
        text = " ".join(self.blocks(note)).strip()
        return f"[{prefix}{note.get(qn('w:id'))}] {text}" if text else ""

    def _style(self, element: Any) -> _Style:
        style_id = element.style
        if style_id not in self._styles:
            self._styles[style_id] = _read_style(Paragraph(element, self._document._body).style)
        return self._styles[style_id]

    def _list_mark(self, element: Any) -> str:
        style = self._style(element).name
        if _HEADING.match(style):
            return ""
        list_id, level = self._list_of(element)
        if list_id:
            return "" if list_id == _NO_LIST else f"{self._marks.next(list_id, level)} "
        return "- " if style.startswith(("list number", "list bullet")) or style == "list paragraph" else ""

    def _list_of(self, element: Any) -> tuple[str, int]:
        """(id, level) of the list that a paragraph belongs to by itself or by its style; ("", 0) without one."""
        properties = [element.pPr, *self._style(element).properties]
        numbers = [one.numPr for one in properties if one is not None and one.numPr is not None]
        ids = [str(one.numId.val) for one in numbers if one.numId is not None]
        levels = [int(one.ilvl.val) for one in numbers if one.ilvl is not None]
        return (ids or [""])[0], (levels or [0])[0]

    def _paragraph(self, element: Any, mark: str) -> str:
        text = paragraph_text(element, self._raised_styles)
        style = self._style(element).name
        found = _HEADING.match(style)
        if text and (found or style == "title"):
            self.title = self.title or text
            return markup.heading(int(found.group(1)) if found else 1, text)
        return mark + text if text else ""

    def _table(self, element: Any) -> str:
        above: dict[int, str] = {}
        return table([self._cells(row, above) for row in _children(element) if row.tag == qn("w:tr")])

    def _cells(self, row: Any, above: dict[int, str]) -> list[Cell]:
        """The cells of a row. Those that go on from above take their text from there, by the column they begin in."""
        column = sum(int(skipped.get(qn("w:val"))) for skipped in row.iterfind(_SKIPPED_COLUMNS))
        cells = [Cell("", column)] if column else []
        for element in _children(row):
            if element.tag == qn("w:tc"):
                goes_on = element.vMerge == ST_Merge.CONTINUE
                text = above.get(column, "") if goes_on else " ".join(self.blocks(element))
                above[column] = text
                cells.append(Cell(text, max(element.grid_span, 1)))
                column += cells[-1].num_columns
        return cells


def _read_style(style: Any) -> _Style:
    name = (style.name or "").lower() if style is not None else ""
    properties: list[Any] = []
    while style is not None and len(properties) < _MAX_BASE_STYLES:
        properties.append(style.element.pPr)
        style = style.base_style
    return _Style(name, tuple(properties))


def _children(parent: Any) -> Iterator[Any]:
    """Children of an element, with wrappers that carry no layout of their own opened."""
    for child in parent:
        if child.tag in _TRANSPARENT:
            yield from _children(child)
        elif child.tag not in LEFT_OUT:
            yield child


def _is_left_out(element: Any) -> bool:
    return any(ancestor.tag in LEFT_OUT for ancestor in element.iterancestors())
