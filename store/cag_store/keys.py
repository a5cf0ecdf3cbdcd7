"""The chained key of a chunk: what went into its keys and values, and into all before it (docs/format.md section 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.errors import InvalidName
from cag_store.jsontext import Fields, canonical_bytes, is_digest

FORMAT_VERSION, ONE_SIDED_VERSION = 1, 2
ROOT = ""
"""The parent of the first chunk."""

MAX_CHUNK_TOKENS = 1 << 20
TokenIds = Sequence[int] | NDArray[Any]

_DOMAIN = b"cag.chunk.v1\0"
_STORED = np.dtype("<u4")


@dataclass(frozen=True)
class ChunkContext:
    """Everything but the tokens that decides a chunk's bytes.

    `rope` and the fingerprints are opaque to the store; `dtype` is the storage dtype of keys and values,
    `compute_dtype` what the model ran in;
    `codec` is the full configuration (`codec.config()`). `sides` are 2, keys and values, or 1: what is stored as keys
    is the values, too.
    """

    model_fingerprint: str
    rope: Mapping[str, Any]
    dtype: str
    compute_dtype: str
    codec: Mapping[str, Any]
    chunk_tokens: int
    adapter_fingerprint: str | None = None
    sides: int = 2

    def to_json(self) -> dict[str, Any]:
        """The object that enters the key."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return without_two_sides({**found, "rope": dict(self.rope), "codec": dict(self.codec)})

    @cached_property
    def canonical(self) -> bytes:
        """Its canonical JSON."""
        return canonical_bytes(self.to_json())

    @classmethod
    def from_json(cls, value: object, where: str) -> ChunkContext:
        """Raises: CorruptEntry."""
        fields = Fields(value, where)
        context = cls(
            model_fingerprint=fields.text("model_fingerprint"),
            rope=fields.object("rope"),
            dtype=fields.text("dtype"),
            compute_dtype=fields.text("compute_dtype"),
            codec=fields.object("codec"),
            chunk_tokens=fields.integer("chunk_tokens", 1, MAX_CHUNK_TOKENS),
            adapter_fingerprint=fields.optional_text("adapter_fingerprint"),
            sides=fields.integer("sides", 1, 1) if fields.has("sides") else 2,
        )
        fields.done()
        return context


def without_two_sides(value: dict[str, Any]) -> dict[str, Any]:
    """An object as it is written: `sides` is in it only where there is one."""
    return {key: item for key, item in value.items() if key != "sides" or item == 1}


def token_bytes(token_ids: TokenIds) -> bytes:
    """Token ids as they are hashed and stored: uint32, little-endian. Raises: InvalidName for ids outside of it."""
    ids = np.asarray(token_ids)
    if ids.dtype == _STORED and ids.ndim == 1:
        return ids.tobytes()
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and (ids.min() < 0 or ids.max() > 0xFFFFFFFF)):
        raise InvalidName(f"token ids must be one row of integers from 0 to 2**32 - 1, found {ids.dtype} {ids.shape}")
    return ids.astype(_STORED).tobytes()


def chunk_key(parent: str, token_ids: TokenIds, context: ChunkContext) -> str:
    """The key of the chunk with `token_ids` behind chunk `parent` (`ROOT` for the first). Raises: InvalidName."""
    if parent != ROOT and not is_digest(parent):
        raise InvalidName(f"parent must be a chunk key or empty, found {parent!r}")
    digest = hashlib.sha256(_DOMAIN)
    for part in (parent.encode("ascii"), context.canonical, token_bytes(token_ids)):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
