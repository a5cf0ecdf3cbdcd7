"""The numbers of list items as pages show them: 7, g, G, vii or VII."""

from __future__ import annotations

_ROMAN = (
    *((1000, "m"), (900, "cm"), (500, "d"), (400, "cd"), (100, "c"), (90, "xc"), (50, "l"), (40, "xl")),
    *((10, "x"), (9, "ix"), (5, "v"), (4, "iv"), (1, "i")),
)
_MAX_ROMAN = 3999


def numeral(number: int, kind: str) -> str:
    """`number` as letters (kind "a" or "A"), in Roman figures ("i" or "I") where there are such, or else in digits."""
    is_written = number > 0 and (kind in "aA" or (kind in "iI" and number <= _MAX_ROMAN))
    if not is_written:
        return str(number)
    text = _letters(number) if kind in "aA" else _roman(number)
    return text.upper() if kind.isupper() else text


def _letters(number: int) -> str:
    """a to z, then aa, ab and so on."""
    text = ""
    while number:
        number, index = divmod(number - 1, 26)
        text = chr(ord("a") + index) + text
    return text


def _roman(number: int) -> str:
    text = ""
    for value, figures in _ROMAN:
        count, number = divmod(number, value)
        text += figures * count
    return text
