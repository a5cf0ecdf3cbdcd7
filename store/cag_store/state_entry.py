"""What a manifest says of snapshots: which there are, and what lies at their keys (docs/format.md sections 3.1 and 4).

A snapshot is what recurrent layers know behind a chunk. Knows no files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cag_store.chunk import MAX_HEADER_BYTES
from cag_store.codecs import codec_from_config
from cag_store.codecs.lossless import Lossless
from cag_store.errors import UnknownCodec
from cag_store.jsontext import Fields
from cag_store.paths import chunk_path

_DOMAIN = b"cag.state.v1\0"


@dataclass(frozen=True)
class StateEntry:
    """A stored snapshot as a manifest pins it: size and checksum of what must lie at its key."""

    key: str
    chunk: str
    num_tokens: int
    stored_bytes: int
    raw_bytes: int
    header_bytes: int
    header_checksum: str

    @classmethod
    def from_json(cls, value: object, where: str) -> StateEntry:
        """Raises: CorruptEntry."""
        fields = Fields(value, where)
        entry = cls(
            key=fields.digest("key"),
            chunk=fields.digest("chunk"),
            num_tokens=fields.integer("num_tokens", 1),
            stored_bytes=fields.integer("stored_bytes", 1),
            raw_bytes=fields.integer("raw_bytes", 1),
            header_bytes=fields.integer("header_bytes", 16, MAX_HEADER_BYTES),
            header_checksum=fields.digest("header_checksum"),
        )
        fields.done()
        if entry.key != state_key(entry.chunk):
            raise fields.wrong("key", state_key(entry.chunk), entry.key)
        return entry

    @property
    def path(self) -> str:
        """Where the file lies."""
        return chunk_path(self.key)


def state_key(chunk: str) -> str:
    """The key of the snapshot behind the chunk with key `chunk`."""
    key = chunk.encode("ascii")
    return hashlib.sha256(_DOMAIN + len(key).to_bytes(8, "little") + key).hexdigest()


def is_lossless(config: Mapping[str, Any]) -> bool:
    """Whether states, and the chunks that they stand behind, may be in this codec."""
    try:
        return config.get("id") == Lossless.codec_id and codec_from_config(config).config() == dict(config)
    except UnknownCodec:
        return False


@dataclass(frozen=True)
class CacheStates:
    """The snapshots of a cache, the last one at the end of its prefix; `codec` is that of the chunks in whose chain
    they stand."""

    codec: Mapping[str, Any]
    snapshots: tuple[StateEntry, ...]

    @property
    def raw_bytes(self) -> int:
        """Size of all states, decoded."""
        return sum(entry.raw_bytes for entry in self.snapshots)

    @property
    def stored_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.stored_bytes for entry in self.snapshots)

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"codec": dict(self.codec), "snapshots": [asdict(entry) for entry in self.snapshots]}

    @classmethod
    def from_json(cls, value: object, where: str, ends: list[int]) -> CacheStates:
        """`ends` are the numbers of tokens behind each chunk of the cache. Raises: CorruptEntry."""
        fields = Fields(value, where)
        codec, entries = fields.object("codec"), fields.list("snapshots")
        fields.done()
        if not is_lossless(codec):
            raise fields.wrong("codec", "a lossless configuration", codec)
        snapshots = tuple(StateEntry.from_json(entry, f"{where}: snapshots[{i}]") for i, entry in enumerate(entries))
        places = [entry.num_tokens for entry in snapshots]
        if places != sorted(set(places) & set(ends)) or places[-1:] != ends[-1:]:
            raise fields.wrong("snapshots", "ascending ends of chunks, the last one of the prefix", places)
        return cls(codec, snapshots)
