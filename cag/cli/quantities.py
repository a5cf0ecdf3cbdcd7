"""Sizes and durations as people write them: `20GB`, `512MiB`, `7d`, `90m`. Knows no command."""

from __future__ import annotations

import re

import typer

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE | re.ASCII)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdw])", re.IGNORECASE | re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_S = 100 * 365.25 * 86_400


def size_bytes(text: str) -> int:
    """Bytes of `20GB` (decimal units), `20GiB` (binary ones) or a bare number. Raises: typer.BadParameter."""
    found = _SIZE.fullmatch(text.strip())
    if not found or (found[3] and not found[2]):
        raise typer.BadParameter(f"{text!r} is not a size; write it like 20GB, 512MiB or 1000000.")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].lower()])


def duration_s(text: str) -> float:
    """Seconds of `90s`, `30m`, `12h`, `7d` or `2w`, at most a hundred years. Raises: typer.BadParameter."""
    found = _DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * _UNIT_SECONDS[found[2].lower()] if found else 0.0
    if not 0 < seconds <= _LONGEST_S:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 90s, 30m, 12h, 7d or 2w.")
    return seconds


def duration_text(seconds: float) -> str:
    """A duration in its largest unit that gives at least 2."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNIT_SECONDS[unit]:
            return f"{seconds / _UNIT_SECONDS[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"
