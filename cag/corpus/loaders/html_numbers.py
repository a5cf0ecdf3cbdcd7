"""Whole numbers in attributes of HTML, and the marks of ordered lists that they lead to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from bs4 import Tag

from cag.corpus.loaders.numerals import numeral

_WHOLE_NUMBER = re.compile(r"\s*([-+]?[0-9]{1,9})")
_KINDS = ("1", "a", "A", "i", "I")


def whole_number(element: Tag, name: str) -> int | None:
    """An attribute as HTML reads it: what follows the number does not count."""
    found = _WHOLE_NUMBER.match(str(element.get(name) or ""))
    return int(found.group(1)) if found else None


def list_marks(ordered_list: Tag, items: Sequence[Tag]) -> Iterator[str]:
    """What browsers show before each item of an `ol`."""
    is_reversed = ordered_list.has_attr("reversed")
    start = whole_number(ordered_list, "start")
    number = start if start is not None else len(items) if is_reversed else 1
    for item in items:
        value = whole_number(item, "value")
        number = number if value is None else value
        kind = next((tag["type"] for tag in (item, ordered_list) if tag.get("type") in _KINDS), "1")
        yield f"{numeral(number, str(kind))}."
        number += -1 if is_reversed else 1
