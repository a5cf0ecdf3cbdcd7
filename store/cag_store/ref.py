"""Refs: the names of caches, the only objects of a store that change (docs/format.md section 6)."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from typing import Any

from cag_store.errors import InvalidName, UnsupportedFormat
from cag_store.jsontext import Fields, canonical_bytes, parse_object

SCHEMA = 1
MAX_REF_BYTES = 1 << 16

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")


def is_name(name: str) -> bool:
    """Whether a ref can have this name."""
    return _NAME.fullmatch(name) is not None


def checked_name(name: str) -> str:
    """`name` when a ref can have it. Raises: InvalidName."""
    if not isinstance(name, str) or not is_name(name):
        raise InvalidName(
            f"{name!r:.130} cannot name a cache: use 1 to 128 of A-Z a-z 0-9 . _ -, not beginning with . or -",
            found=name,
        )
    return name


@dataclass(frozen=True)
class Ref:
    """A name for a manifest, with what may change about it. Times are UTC, `YYYY-MM-DDThh:mm:ssZ`."""

    name: str
    manifest: str
    pinned: bool
    expires_at: str | None
    updated_at: str

    def expired(self, now: str) -> bool:
        """Whether `expires_at` has passed at `now`; a pinned ref does not expire."""
        return not self.pinned and self.expires_at is not None and self.expires_at <= now

    def to_bytes(self) -> bytes:
        """Canonical bytes with their own checksum."""
        value: dict[str, Any] = {**asdict(self), "schema": SCHEMA}
        return canonical_bytes({**value, "check": _check(value)})

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Ref:
        """The ref that must be called `name`. Raises: CorruptEntry, UnsupportedFormat."""
        where = f"ref {name!r}"
        value = parse_object(data, where)
        if value.get("schema") != SCHEMA:
            raise UnsupportedFormat(
                f"{where} has schema {value.get('schema')!r:.40}; this program reads {SCHEMA}: "
                "use a newer one, or build again",
                expected=SCHEMA,
                found=value.get("schema"),
            )
        fields = Fields(value, where)
        check = fields.digest("check")
        fields.any("schema")
        expected = _check({key: item for key, item in value.items() if key != "check"})
        if check != expected:
            raise fields.wrong("check", expected, check)
        ref = cls(
            name=fields.text("name"),
            manifest=fields.digest("manifest"),
            pinned=fields.flag("pinned"),
            expires_at=fields.optional_time("expires_at"),
            updated_at=fields.time("updated_at"),
        )
        fields.done()
        if ref.name != name:
            raise fields.wrong("name", name, ref.name)
        if ref.to_bytes() != data:
            raise fields.wrong("form", "canonical JSON", "another spelling of it")
        return ref


def _check(value: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_bytes(value)).hexdigest()
