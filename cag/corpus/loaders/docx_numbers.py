"""The marks of list items in a Word document, counted as Word counts them: through the document, for each list."""

from __future__ import annotations

import re
from typing import Any

from docx.document import Document as WordDocument
from docx.opc.constants import RELATIONSHIP_TYPE
from docx.oxml.ns import qn

from cag.corpus.loaders.numerals import numeral

_KINDS = {"lowerLetter": "a", "upperLetter": "A", "lowerRoman": "i", "upperRoman": "I"}
_PLACE = re.compile(r"%([1-9])")
_DASH = "-"


class ListMarks:
    """Asked once for each item, in order. Lists that one definition describes go on from each other."""

    def __init__(self, document: WordDocument) -> None:
        relations = document.part.rels.values()
        parts = [relation.target_part for relation in relations if relation.reltype == RELATIONSHIP_TYPE.NUMBERING]
        root = parts[0].element if parts else []
        self._lists = {element.get(qn("w:numId")): element for element in root if element.tag == qn("w:num")}
        definitions = (element for element in root if element.tag == qn("w:abstractNum"))
        self._definitions = {element.get(qn("w:abstractNumId")): element for element in definitions}
        self._counts: dict[str, dict[int, int]] = {}
        self._begun: set[tuple[str, int]] = set()

    def next(self, list_id: str, level: int) -> str:
        """The mark of the next item of a list at `level` (0 is the outermost): a number, or a dash for any other."""
        definition_id = _value(self._lists.get(list_id), "abstractNumId")
        levels = {int(one.get(qn("w:ilvl"))): one for one in _named(self._definitions.get(definition_id), "lvl")}
        text = _value(levels.get(level), "lvlText")
        if not _PLACE.search(text) or _value(levels[level], "numFmt") in ("bullet", "none"):
            return _DASH
        counts = self._counts.setdefault(definition_id, {})
        starts = {number: int(_value(one, "start") or 1) for number, one in levels.items()}
        restart = self._restart(list_id, level)
        counts[level] = counts.get(level, starts[level] - 1) + 1 if restart is None else restart
        for deeper in [number for number in counts if number > level]:
            del counts[deeper]

        def written(place: re.Match[str]) -> str:
            number = int(place[1]) - 1
            kind = _KINDS.get(_value(levels.get(number), "numFmt"), "1")
            return numeral(counts.get(number, starts.get(number, 1)), kind)

        return _PLACE.sub(written, text).strip()

    def _restart(self, list_id: str, level: int) -> int | None:
        """The number at which a list begins anew at a level, where this is its first item there."""
        if (list_id, level) in self._begun:
            return None
        self._begun.add((list_id, level))
        overrides = [one for one in _named(self._lists[list_id], "lvlOverride") if one.get(qn("w:ilvl")) == str(level)]
        start = _value(overrides[0], "startOverride") if overrides else ""
        return int(start) if start else None


def _named(parent: Any, name: str) -> list[Any]:
    return [] if parent is None else list(parent.iterchildren(qn(f"w:{name}")))


def _value(parent: Any, name: str) -> str:
    """The value of a child of an element; "" without one."""
    return next((child.get(qn("w:val"), "") for child in _named(parent, name)), "")
