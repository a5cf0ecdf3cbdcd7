"""The text of a Word paragraph: runs, breaks, marks of notes, superscripts and formulas."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from docx.oxml.ns import qn

from cag.corpus.loaders.formulas import fraction, matrix, over_range, root, superscript

LEFT_OUT = {qn("w:del"), qn("w:moveFrom"), "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"}
BOX = qn("w:txbxContent")
_MATH = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_BREAKS = {qn("w:tab"): " ", qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:noBreakHyphen"): "-"}
_NOTES = {qn("w:footnoteReference"): "", qn("w:endnoteReference"): "e"}
# Around raised text until all of it is known, as Word cuts runs anywhere; XML cannot hold these characters.
_RAISED = re.compile("\x01([^\x01\x02]*)\x02")


def paragraph_text(element: Any, raised_styles: Collection[str]) -> str:
    """The lines of a paragraph, white space collapsed. raised_styles: ids of the styles that raise their text."""
    text = "".join(_pieces(element, raised_styles)).replace("\x02\x01", "")
    text = _RAISED.sub(lambda found: superscript(found.group(1)), text)
    return "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()


def _pieces(element: Any, raised_styles: Collection[str]) -> Iterator[str]:
    for child in element:
        if child.tag == qn("w:t"):
            yield child.text or ""
        elif child.tag == f"{_MATH}oMath":
            yield _formula(child)
        elif child.tag in _BREAKS:
            yield _BREAKS[child.tag]
        elif child.tag in _NOTES:
            yield f"[{_NOTES[child.tag]}{child.get(qn('w:id'))}]"
        elif child.tag == qn("w:r") and _is_raised(child, raised_styles):
            yield f"\x01{''.join(_pieces(child, raised_styles))}\x02"
        elif child.tag not in LEFT_OUT and child.tag != BOX and child.tag != qn("w:pPr"):
            yield from _pieces(child, raised_styles)


def _is_raised(run: Any, raised_styles: Collection[str]) -> bool:
    properties = run.rPr
    if properties is None:
        return False
    of_run = properties.superscript
    return bool(properties.style in raised_styles if of_run is None else of_run)


def _formula(element: Any) -> str:
    if element.tag in LEFT_OUT:
        return ""
    if element.tag in (f"{_MATH}t", qn("w:t")):
        return element.text or ""
    if element.tag in _BREAKS:
        return _BREAKS[element.tag]
    write = _WRITERS.get(str(element.tag).removeprefix(_MATH))
    return write(element) if write else "".join(map(_formula, element))


def _part(element: Any, name: str) -> str:
    return "".join(_parts(element, name))


def _parts(element: Any, name: str) -> list[str]:
    return [_formula(part) for part in element.iterchildren(f"{_MATH}{name}")]


def _setting(element: Any, name: str, default: str) -> str:
    """A property of an element, such as the sign of a bracket; it may be blank."""
    found = next(element.iterfind(f"*/{_MATH}{name}"), None)
    return default if found is None else str(found.get(f"{_MATH}val", ""))


def _brackets(element: Any) -> str:
    inner = _setting(element, "sepChr", "|").join(_parts(element, "e"))
    return _setting(element, "begChr", "(") + inner + _setting(element, "endChr", ")")


def _operator(element: Any) -> str:
    sign = _setting(element, "chr", "\u222b")
    return over_range(sign, _part(element, "sub"), _part(element, "sup")) + _part(element, "e")


# By the name of an element of Office MathML.
_WRITERS: dict[str, Callable[[Any], str]] = {
    "sSup": lambda element: _part(element, "e") + superscript(_part(element, "sup")),
    "sSubSup": lambda element: _part(element, "e") + _part(element, "sub") + superscript(_part(element, "sup")),
    "f": lambda element: fraction(_part(element, "num"), _part(element, "den")),
    "rad": lambda element: root(_part(element, "e"), _part(element, "deg")),
    "func": lambda element: f"{_part(element, 'fName')} {_part(element, 'e')}",
    "d": _brackets,
    "nary": _operator,
    "m": lambda element: matrix([_parts(row, "e") for row in element.iterchildren(f"{_MATH}mr")]),
    "eqArr": lambda element: matrix([[row] for row in _parts(element, "e")]),
}
