"""Powers, fractions and roots in one line, for formats in which only the place of their parts tells them from `106`.

Subscripts stay as they stand, as in H2O.
"""

from __future__ import annotations

import re

_SIMPLE = re.compile(r"[+\-\u2212\u2013]?[\w.,]+[+\-\u2212]?")
_FACTOR = re.compile(r"[\w.]*")
# Marks of notes, signs such as degrees, ordinals, trade marks: what reads right on the line.
_READS_ALIKE = re.compile(
    r"\[.*\]|[\W_]*|st|nd|rd|th|er|re|\u00e8re|e|\u00e8me|eme|tm|sm|\((?:r|c|tm)\)", re.DOTALL | re.IGNORECASE
)
_WORD = re.compile(r"[^\W\d_]{2,}")


def superscript(text: str) -> str:
    """Raised text, to follow what it belongs to: `^6`, `^(n+1)`; several words are small print, and stay."""
    text = _stripped(text)
    if _READS_ALIKE.fullmatch(text) or len(_WORD.findall(text)) > 1:
        return text
    return f"^{text}" if _SIMPLE.fullmatch(text) else f"^({text})"


def fraction(numerator: str, denominator: str) -> str:
    """`1/2` or `(a + b)/(2 c)`, with space around, as 3 and 1/2 are not 31/2."""
    return f" {_factor(numerator)}/{_factor(denominator)} "


def root(radicand: str, degree: str = "") -> str:
    """A square root, or the root of another degree as a power."""
    radicand, degree = _stripped(radicand), _stripped(degree)
    return f"({radicand})^(1/{_factor(degree)})" if degree else f"\u221a({radicand})"


def over_range(sign: str, start: str, end: str) -> str:
    """A sum, product or integral sign with its limits, either of which may be blank."""
    lower = f"_{_factor(start)}" if start.strip() else ""
    return f"{sign}{lower}{superscript(end)} "


def matrix(rows: list[list[str]]) -> str:
    """Rows on one line."""
    return "; ".join(", ".join(map(_stripped, row)) for row in rows)


def _factor(text: str) -> str:
    text = _stripped(text)
    return text if _FACTOR.fullmatch(text) else f"({text})"


def _stripped(text: str) -> str:
    return " ".join(text.split())
