"""JSON in and out: canonical bytes, and strict reading of untrusted objects.

Every defect of a file that is read is a `CorruptEntry` that names the place; a wrong type never reaches other code.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from cag_store.errors import CorruptEntry

_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", re.ASCII)
MAX_DEPTH = 64


def canonical_bytes(value: object) -> bytes:
    """Canonical JSON (docs/format.md). Raises: ValueError or TypeError for what JSON cannot hold."""
    return _ENCODER.encode(value).encode("utf-8")


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`: no duplicate names, no NaN. Raises: CorruptEntry."""
    return _parsed(data, where, lambda text: _DECODER.decode(text))


def parse_first_object(data: bytes, offset: int, where: str) -> dict[str, Any]:
    """The JSON object that begins at `offset`; what follows it is not looked at. Raises: CorruptEntry.

    How deep it is nested is not checked: only for objects whose values are then read one by one.
    """
    return _parsed(data[offset:], where, lambda text: _DECODER.raw_decode(text)[0], shallow=True)


def parse_shallow_object(data: bytes, where: str) -> dict[str, Any]:
    """`parse_object` without the check of how deep it is nested; see `parse_first_object`. Raises: CorruptEntry."""
    return _parsed(data, where, lambda text: _DECODER.decode(text), shallow=True)


def _parsed(data: bytes, where: str, decode: Callable[[str], Any], shallow: bool = False) -> dict[str, Any]:
    try:
        value = decode(data.decode("utf-8"))
        if not shallow and isinstance(value, (dict, list)):
            _check_depth(value)
        if b"\\ud" in data.lower():  # perhaps half of a surrogate pair, which no canonical text holds
            canonical_bytes(value)
    except (ValueError, RecursionError) as error:
        raise CorruptEntry(f"{where} is not JSON: {error}", where=where, expected="JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise CorruptEntry(f"{where}: expected an object, found {type(value).__name__}", where=where)
    return value


def _check_depth(value: Any) -> None:
    """Raises: ValueError for what is nested so deeply that code which walks it would run out of stack."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            item
            for outer in level
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"more than {MAX_DEPTH} objects and lists within each other")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is out of range")
    return value


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)


_SHORT = reprlib.Repr()  # not as deep as what it shows
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100


class Fields:
    """Reads an untrusted object field by field; `done` refuses what nobody asked for."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise CorruptEntry(f"{where}: expected an object, found {type(value).__name__}", where=where)
        self._left = dict(value)
        self.where = where

    def done(self) -> None:
        """Raises: CorruptEntry when fields are left that nothing has read."""
        if self._left:
            raise self.wrong(", ".join(sorted(map(str, self._left))), "no such field", "unknown field")

    def wrong(self, key: str, expected: object, found: object) -> CorruptEntry:
        """The error for one field."""
        message = f"{self.where}: {key}: expected {expected}, found {_SHORT.repr(found)}"
        return CorruptEntry(message, where=self.where, expected=expected, found=found)

    def has(self, key: str) -> bool:
        """Whether there is such a field that nothing has read."""
        return key in self._left

    def any(self, key: str) -> Any:
        """The field's value, unchecked."""
        if key not in self._left:
            raise self.wrong(key, "a value", "nothing")
        return self._left.pop(key)

    def integer(self, key: str, low: int, high: int = (1 << 63) - 1) -> int:
        """An integer within [low, high]."""
        value = self.any(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}", value)
        return value

    def flag(self, key: str) -> bool:
        """true or false."""
        value = self.any(key)
        if type(value) is not bool:
            raise self.wrong(key, "true or false", value)
        return value

    def text(self, key: str) -> str:
        """A string."""
        value = self.any(key)
        if not isinstance(value, str):
            raise self.wrong(key, "a string", value)
        return value

    def optional_text(self, key: str) -> str | None:
        """A string or null."""
        value = self.any(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string or null", value)
        return value

    def digest(self, key: str, empty: bool = False) -> str:
        """64 hexadecimal digits; "" too when `empty`."""
        value = self.text(key)
        if not (_DIGEST.fullmatch(value) or (empty and value == "")):
            raise self.wrong(key, "64 lower-case hexadecimal digits", value)
        return value

    def time(self, key: str) -> str:
        """A UTC time, `YYYY-MM-DDThh:mm:ssZ`."""
        value = self.text(key)
        if not _TIME.fullmatch(value):
            raise self.wrong(key, "YYYY-MM-DDThh:mm:ssZ", value)
        return value

    def optional_time(self, key: str) -> str | None:
        """A UTC time or null."""
        value = self.optional_text(key)
        if value is not None and not _TIME.fullmatch(value):
            raise self.wrong(key, "YYYY-MM-DDThh:mm:ssZ or null", value)
        return value

    def object(self, key: str) -> dict[str, Any]:
        """An object, opaque."""
        value = self.any(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object", value)
        return value

    def list(self, key: str) -> list[Any]:
        """A list, its items unchecked."""
        value = self.any(key)
        if not isinstance(value, list):
            raise self.wrong(key, "a list", value)
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers within [low, high]."""
        values = self.list(key)
        for value in values:
            if type(value) is not int or not low <= value <= high:
                raise self.wrong(key, f"integers from {low} to {high}", value)
        return tuple(values)


def is_digest(text: str) -> bool:
    """Whether `text` is 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None
