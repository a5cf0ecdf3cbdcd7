"""Ruby: the readings that small print gives to words, rewritten in place as brackets behind the words."""

from __future__ import annotations

import re

from bs4 import Tag

_READINGS = ("rt", "rtc")
_SPACED = re.compile("[A-Za-z]")


def write_ruby(page: Tag) -> None:
    """Put the readings of each `ruby` of `page` behind all of its words, which stay in one piece."""
    for ruby in reversed(page.find_all("ruby")):
        readings: list[str] = []
        # The innermost first: where end tags are left out, brackets may hold a reading.
        for part in reversed(ruby.find_all((*_READINGS, "rp"))):
            if part.name in _READINGS:
                readings.insert(0, " ".join(part.get_text().split()))
            part.decompose()
        text = _joined([reading for reading in readings if reading])
        if text:
            ruby.append(f"({text})")


def _joined(readings: list[str]) -> str:
    return (" " if any(map(_SPACED.search, readings)) else "").join(readings)
