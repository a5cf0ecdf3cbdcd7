"""The manifest of a cache: an immutable, validated, name-independent description (docs/format.md section 4)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import accumulate
from typing import Any

from cag_store.chunk import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, ChunkEntry, check_codec_config
from cag_store.codecs import config_resources
from cag_store.dtypes import STORAGE_DTYPES
from cag_store.errors import CorruptEntry, UnsupportedFormat
from cag_store.jsontext import Fields, canonical_bytes, parse_object
from cag_store.keys import MAX_CHUNK_TOKENS, ChunkContext, without_two_sides
from cag_store.paths import chunk_path
from cag_store.state_entry import CacheStates

SCHEMA, SCHEMA_WITH_STATES, SCHEMA_ONE_SIDED = 1, 2, 3
MAX_MANIFEST_BYTES = 64 << 20


def utc_text(seconds: float) -> str:
    """A time, given in seconds since 1970, as manifests and refs write it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def utc_now() -> str:
    """Now, as manifests and refs write it."""
    return utc_text(time.time())


def utc_after(ttl_s: float | None) -> str | None:
    """`ttl_s` seconds from now, as refs write it; None stays None. Raises: ValueError beyond the year 9999."""
    if ttl_s is None:
        return None
    try:
        return (datetime.now(UTC) + timedelta(seconds=float(ttl_s))).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError as error:
        raise ValueError(f"{ttl_s} seconds from now is beyond the year 9999: leave the expiry out") from error


@dataclass(frozen=True)
class ModelIdentity:
    """Which model computed a cache; fingerprints are opaque to the store."""

    id: str
    fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str
    adapter_fingerprint: str | None = None


@dataclass(frozen=True)
class KVGeometry:
    """Shape, types and positions of the keys and values; `num_kv_heads` and `head_dim` have one entry a layer. With one
    of `sides` the values are the keys."""

    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    dtype: str
    compute_dtype: str
    rope: Mapping[str, Any]
    chunk_tokens: int
    sides: int = 2

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.num_kv_heads)

    def raw_bytes(self, num_tokens: int) -> int:
        """Size of the keys and values of `num_tokens` tokens in the storage dtype."""
        per_token = sum(heads * dim for heads, dim in zip(self.num_kv_heads, self.head_dim, strict=True))
        return self.sides * per_token * num_tokens * STORAGE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class DocumentEntry:
    """One document: its token span [start, end) in the prefix, and the sha256 of its text, which is its blob's
    address."""

    doc_id: str
    title: str
    path: str
    sha256: str
    start: int
    end: int


@dataclass(frozen=True)
class Manifest:
    """A cache. Sums (`num_tokens`, `raw_bytes`, `stored_bytes`) are derived, and checked when read."""

    model: ModelIdentity
    kv: KVGeometry
    codec: Mapping[str, Any]
    chunks: tuple[ChunkEntry, ...]
    documents: tuple[DocumentEntry, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)
    blob_bytes: int = 0
    fidelity: Mapping[str, Any] | None = None
    versions: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = field(default_factory=utc_now)
    states: CacheStates | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prefix."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def raw_bytes(self) -> int:
        """Size of all keys and values in the storage dtype, and of all states."""
        states_bytes = 0 if self.states is None else self.states.raw_bytes
        return sum(chunk.raw_bytes for chunk in self.chunks) + states_bytes

    @property
    def stored_bytes(self) -> int:
        """Size of all files of chunks, snapshots and blobs."""
        states_bytes = 0 if self.states is None else self.states.stored_bytes
        return self.blob_bytes + sum(chunk.stored_bytes for chunk in self.chunks) + states_bytes

    @property
    def chunk_sizes(self) -> dict[str, int]:
        """Sizes of the files of chunks and snapshots by path."""
        sizes = {chunk_path(chunk.key): chunk.stored_bytes for chunk in self.chunks}
        return sizes | {entry.path: entry.stored_bytes for entry in (self.states.snapshots if self.states else ())}

    @property
    def blob_digests(self) -> tuple[str, ...]:
        """Addresses of all blobs, each once: texts of documents, and what the codec needs."""
        texts = (document.sha256 for document in self.documents)
        return tuple(dict.fromkeys([*texts, *config_resources(self.codec)]))

    @property
    def context(self) -> ChunkContext:
        """What the keys of the chunks depend on, besides their tokens."""
        return ChunkContext(
            model_fingerprint=self.model.fingerprint,
            rope=self.kv.rope,
            dtype=self.kv.dtype,
            compute_dtype=self.kv.compute_dtype,
            codec=self.codec,
            chunk_tokens=self.kv.chunk_tokens,
            adapter_fingerprint=self.model.adapter_fingerprint,
            sides=self.kv.sides,
        )

    def to_json(self) -> dict[str, Any]:
        """The object that is stored."""
        without = asdict(replace(self, states=None))
        del without["states"]
        states = {} if self.states is None else {"states": self.states.to_json()}
        return {
            **without,
            **states,
            "schema": SCHEMA_ONE_SIDED if self.kv.sides == 1 else SCHEMA_WITH_STATES if states else SCHEMA,
            "kv": without_two_sides({**asdict(self.kv), "num_layers": self.kv.num_layers}),
            "num_tokens": self.num_tokens,
            "raw_bytes": self.raw_bytes,
            "stored_bytes": self.stored_bytes,
        }

    def to_bytes(self) -> bytes:
        """Canonical bytes."""
        return canonical_bytes(self.to_json())

    @cached_property
    def digest(self) -> str:
        """The manifest's address."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "manifest") -> Manifest:
        """Raises: CorruptEntry, UnsupportedFormat."""
        value = parse_object(data, where)
        manifest = cls.from_json(value, where)
        if canonical_bytes(value) != data:
            raise CorruptEntry(f"{where} is not in canonical form", where=where, expected="canonical JSON")
        vars(manifest)["digest"] = hashlib.sha256(data).hexdigest()  # of the same bytes, without writing them again
        return manifest

    @classmethod
    def from_json(cls, value: object, where: str = "manifest") -> Manifest:
        """Validate everything that can be validated without other files. Raises: CorruptEntry, UnsupportedFormat."""
        fields = Fields(value, where)
        schema = fields.any("schema")
        if schema not in (SCHEMA, SCHEMA_WITH_STATES, SCHEMA_ONE_SIDED) or type(schema) is not int:
            raise UnsupportedFormat(
                f"{where} has schema {schema!r:.40}; this program reads {SCHEMA} to {SCHEMA_ONE_SIDED}: use a newer "
                "one, or build again",
                expected=SCHEMA_ONE_SIDED,
                found=schema,
            )
        listed, documents = fields.list("chunks"), fields.list("documents")
        chunks = tuple(ChunkEntry.from_json(chunk, f"{where}: chunks[{i}]") for i, chunk in enumerate(listed))
        ends = list(accumulate(chunk.num_tokens for chunk in chunks))
        states = None
        if schema == SCHEMA_WITH_STATES or (schema == SCHEMA_ONE_SIDED and fields.has("states")):
            states = CacheStates.from_json(fields.any("states"), f"{where}: states", ends)
        fidelity = fields.any("fidelity")
        if fidelity is not None and not isinstance(fidelity, dict):
            raise fields.wrong("fidelity", "an object or null", fidelity)
        manifest = cls(
            model=_model(fields.any("model"), f"{where}: model"),
            kv=_geometry(fields.any("kv"), f"{where}: kv", 1 if schema == SCHEMA_ONE_SIDED else 2),
            codec=fields.object("codec"),
            chunks=chunks,
            documents=tuple(_document(document, f"{where}: documents[{i}]") for i, document in enumerate(documents)),
            layout=fields.object("layout"),
            blob_bytes=fields.integer("blob_bytes", 0),
            fidelity=fidelity,
            versions=fields.object("versions"),
            machine=fields.object("machine"),
            build=fields.object("build"),
            created_at=fields.time("created_at"),
            states=states,
        )
        _check_sums(manifest, fields)
        fields.done()
        check_codec_config(manifest.codec, fields)
        _check_chunks(manifest, fields)
        _check_documents(manifest.documents, manifest.num_tokens, fields)
        return manifest


def _model(value: object, where: str) -> ModelIdentity:
    fields = Fields(value, where)
    model = ModelIdentity(
        id=fields.text("id"),
        fingerprint=fields.text("fingerprint"),
        tokenizer_fingerprint=fields.text("tokenizer_fingerprint"),
        template_fingerprint=fields.text("template_fingerprint"),
        adapter_fingerprint=fields.optional_text("adapter_fingerprint"),
    )
    fields.done()
    return model


def _geometry(value: object, where: str, sides: int) -> KVGeometry:
    fields = Fields(value, where)
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    geometry = KVGeometry(
        num_kv_heads=fields.integers("num_kv_heads", 1, MAX_HEADS),
        head_dim=fields.integers("head_dim", 1, MAX_HEAD_DIM),
        dtype=fields.text("dtype"),
        compute_dtype=fields.text("compute_dtype"),
        rope=fields.object("rope"),
        chunk_tokens=fields.integer("chunk_tokens", 1, MAX_CHUNK_TOKENS),
        sides=sides if sides == 2 else fields.integer("sides", 1, 1),
    )
    fields.done()
    if not num_layers == len(geometry.num_kv_heads) == len(geometry.head_dim):
        raise fields.wrong("num_layers", num_layers, (len(geometry.num_kv_heads), len(geometry.head_dim)))
    if geometry.dtype not in STORAGE_DTYPES:
        raise fields.wrong("dtype", " or ".join(STORAGE_DTYPES), geometry.dtype)
    return geometry


def _document(value: object, where: str) -> DocumentEntry:
    fields = Fields(value, where)
    document = DocumentEntry(
        doc_id=fields.text("doc_id"),
        title=fields.text("title"),
        path=fields.text("path"),
        sha256=fields.digest("sha256"),
        start=fields.integer("start", 0),
        end=fields.integer("end", 0),
    )
    fields.done()
    return document


def _check_sums(manifest: Manifest, fields: Fields) -> None:
    for key in ("num_tokens", "raw_bytes", "stored_bytes"):
        found, expected = fields.integer(key, 1), getattr(manifest, key)
        if found != expected:
            raise fields.wrong(key, f"{expected}, the sum over its parts", found)


def _check_chunks(manifest: Manifest, fields: Fields) -> None:
    position = 0
    for index, chunk in enumerate(manifest.chunks):
        where = f"chunks[{index}]"
        if chunk.start != position or chunk.num_tokens > manifest.kv.chunk_tokens:
            raise fields.wrong(where, f"at most {manifest.kv.chunk_tokens} tokens from {position} on", chunk)
        if chunk.raw_bytes != manifest.kv.raw_bytes(chunk.num_tokens):
            raise fields.wrong(where, f"{manifest.kv.raw_bytes(chunk.num_tokens)} raw bytes", chunk.raw_bytes)
        position += chunk.num_tokens
    if len({chunk.key for chunk in manifest.chunks}) != len(manifest.chunks):
        raise fields.wrong("chunks", "keys that occur once", "a key twice")


def _check_documents(documents: Sequence[DocumentEntry], num_tokens: int, fields: Fields) -> None:
    position = 0
    for index, document in enumerate(documents):
        if not position <= document.start <= document.end <= num_tokens:
            raise fields.wrong(f"documents[{index}]", f"an ascending span within [{position}, {num_tokens}]", document)
        position = document.end
    if len({document.doc_id for document in documents}) != len(documents):
        raise fields.wrong("documents", "doc_ids that occur once", "a doc_id twice")
