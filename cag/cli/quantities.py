"""Sizes, durations and codecs as people write them: `20GB`, `512MiB`, `7d`, `90m`, `int8`, `{"id": "int8", ...}`. Knows
no command."""

from __future__ import annotations

import json
import re
from typing import Any

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
    if found is None:
        raise typer.BadParameter(f"{text!r} is not a duration; write it like 90s, 30m, 12h, 7d or 2w.")
    seconds = float(found[1]) * _UNIT_SECONDS[found[2].lower()]
    if not 0 < seconds <= _LONGEST_S:
        raise typer.BadParameter(f"{text!r} is no time ahead; it is more than 0s and at most a hundred years (36525d).")
    return seconds


def codec_choice(text: str) -> str | dict[str, Any]:
    """The id of a codec, or its configuration, written as a JSON object. Raises: typer.BadParameter."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise typer.BadParameter(f"{text!r:.130} is neither the id of a codec nor JSON: {error}.") from error
    assert isinstance(config, dict), "it begins as an object"
    return config


def duration_text(seconds: float) -> str:
    """A duration in its largest unit that gives at least 2."""
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNIT_SECONDS[unit]:
            return f"{seconds / _UNIT_SECONDS[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"
