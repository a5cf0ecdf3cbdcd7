"""Snapshots: what recurrent layers know behind a chunk, as files beside the chunks (docs/format.md section 3.1).

In: named arrays. Out: the same, verified. Knows neither refs nor models.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from cag_store.backends import Backend, ReadableBackend
from cag_store.chunk import MAX_OVERHEAD_BYTES, MAX_SIDE_BYTES, header_size
from cag_store.codecs import codec_from_config
from cag_store.codecs.lossless import Lossless
from cag_store.dtypes import STORAGE_DTYPES, Array, storage_dtype
from cag_store.errors import CorruptEntry, UnencodableArray, UnsupportedFormat
from cag_store.header_text import ALIGNMENT, OPENING
from cag_store.jsontext import Fields, canonical_bytes, parse_first_object, parse_object
from cag_store.keys import FORMAT_VERSION, ROOT, TokenIds, chunk_key
from cag_store.paths import chunk_path
from cag_store.reading import reread
from cag_store.state_entry import StateEntry, is_lossless, state_key

if TYPE_CHECKING:
    from cag_store.manifest import Manifest

FORMAT = "cag-state"
MAX_TENSORS = 1 << 14
MAX_DIMENSIONS, MAX_DIMENSION = 8, 1 << 20

_NAME = re.compile(r"[a-z][a-z0-9._]{0,127}", re.ASCII)


class StateArray(NamedTuple):
    """One state: its storage dtype by name, and its numbers as numpy carries them."""

    dtype: str
    array: Array


@dataclass(frozen=True)
class _Row:
    name: str
    dtype: str
    shape: tuple[int, ...]
    encoded_bytes: int
    checksum: str

    @property
    def raw_bytes(self) -> int:
        return math.prod(self.shape) * STORAGE_DTYPES[self.dtype].itemsize

    @property
    def encoded_shape(self) -> tuple[int, int, int]:
        """As the codec sees it."""
        return 1, math.prod(self.shape[:-1]), self.shape[-1]


@dataclass(frozen=True)
class _Index:
    """A whole header."""

    chunk: str
    num_tokens: int
    codec: Mapping[str, Any]
    rows: tuple[_Row, ...]

    def to_bytes(self) -> bytes:
        """Length prefix and JSON header."""
        rows = [[row.name, row.dtype, list(row.shape), row.encoded_bytes, row.checksum] for row in self.rows]
        place = {"chunk": self.chunk, "key": state_key(self.chunk), "num_tokens": self.num_tokens}
        facts = canonical_bytes({**place, "codec": dict(self.codec), "tensors": rows})
        ends = pairwise(accumulate((row.encoded_bytes for row in self.rows), initial=0))
        tensors = {
            row.name: {"data_offsets": list(span), "dtype": "U8", "shape": [row.encoded_bytes]}
            for row, span in zip(self.rows, ends, strict=True)
        }
        metadata = {
            "format": FORMAT,
            "sha256": hashlib.sha256(facts).hexdigest(),
            "state": facts.decode("utf-8"),
            "version": str(FORMAT_VERSION),
        }
        text = canonical_bytes({"__metadata__": metadata, **tensors})
        text += b" " * (-len(text) % ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    def entry(self, header: bytes) -> StateEntry:
        return StateEntry(
            key=state_key(self.chunk),
            chunk=self.chunk,
            num_tokens=self.num_tokens,
            stored_bytes=len(header) + sum(row.encoded_bytes for row in self.rows),
            raw_bytes=sum(row.raw_bytes for row in self.rows),
            header_bytes=len(header),
            header_checksum=hashlib.sha256(header).hexdigest(),
        )


def encode_states(chunk: str, num_tokens: int, states: Mapping[str, StateArray]) -> tuple[StateEntry, list[bytes]]:
    """The entry and the parts of the file. Raises: UnencodableArray."""
    codec, rows, segments = Lossless(), [], []
    if not 1 <= len(states) <= MAX_TENSORS:
        raise UnencodableArray(f"a snapshot has 1 to {MAX_TENSORS} states, found {len(states)}")
    for name, (dtype, array) in sorted(states.items()):
        whole = _Row(name, dtype, array.shape, 1, "")
        if array.dtype != storage_dtype(dtype) or not _is_state(whole):
            raise UnencodableArray(f"{name!r:.40} is no state that can be kept: {array.dtype} {array.shape}")
        segment = codec.encode(np.ascontiguousarray(array).reshape(whole.encoded_shape), dtype)
        rows.append(_Row(name, dtype, array.shape, len(segment), xxhash.xxh3_128_hexdigest(segment)))
        segments.append(segment)
    index = _Index(chunk, num_tokens, codec.config(), tuple(rows))
    header = index.to_bytes()
    return index.entry(header), [header, *segments]


def read_states(backend: ReadableBackend, entry: StateEntry) -> dict[str, StateArray]:
    """The states of a snapshot, every byte of it verified. Raises: EntryNotFound, CorruptEntry, UnsupportedFormat."""
    return reread(backend, entry.path, lambda: _decoded(backend, entry))


def check_states(manifest: Manifest, token_ids: TokenIds) -> None:
    """Raises: CorruptEntry unless the snapshots of a cache stand behind these tokens, `[num_tokens]`, of its model."""
    if manifest.states is None:
        return
    context = replace(manifest.context, codec=manifest.states.codec)
    key, behind = ROOT, {}
    for chunk in manifest.chunks:
        end = chunk.start + chunk.num_tokens
        key = behind[end] = chunk_key(key, token_ids[chunk.start : end], context)
    for entry in manifest.states.snapshots:
        if behind[entry.num_tokens] != entry.chunk:
            raise CorruptEntry(
                f"{entry.path} is the snapshot of another text or model",
                where=entry.path,
                expected=behind[entry.num_tokens],
                found=entry.chunk,
            )


def find_states(backend: Backend, chunk: str) -> StateEntry:
    """The entry of a snapshot that no manifest pins, from its own header, after every byte was verified.

    Raises: EntryNotFound, CorruptEntry.
    """
    path = chunk_path(state_key(chunk))
    stored_bytes = backend.stat(path).size_bytes
    size = header_size(backend.get_range(path, 0, min(8, stored_bytes)), stored_bytes, path)
    header = backend.get_range(path, 0, size)
    try:
        entry = _index(header, path).entry(header)
    except UnsupportedFormat as error:  # the key is of this version, so another one in the file is damage
        raise CorruptEntry(str(error), **error.facts) from error
    if entry.chunk != chunk:
        raise CorruptEntry(f"{path} holds a snapshot behind another chunk", where=path, expected=chunk)
    _decoded(backend, entry)
    return entry


def copied_states(backend: ReadableBackend, entry: StateEntry) -> list[bytes | memoryview]:
    """All bytes of a snapshot's file, every one of them checked. Raises: EntryNotFound, CorruptEntry."""
    header, index = _opened(backend, entry)
    return [header, *(data for _, data in _segments(backend, entry, index))]


def _decoded(backend: ReadableBackend, entry: StateEntry) -> dict[str, StateArray]:
    _, index = _opened(backend, entry)
    codec, found = codec_from_config(index.codec), {}
    for row, data in _segments(backend, entry, index):
        out = np.empty(row.encoded_shape, dtype=storage_dtype(row.dtype))
        codec.decode_into(data, out)
        found[row.name] = StateArray(row.dtype, out.reshape(row.shape))
    return found


def _segments(backend: ReadableBackend, entry: StateEntry, index: _Index) -> list[tuple[_Row, memoryview]]:
    """Raises: CorruptEntry unless all have their checksums."""
    size = entry.stored_bytes - entry.header_bytes
    whole = memoryview(backend.get_range(entry.path, entry.header_bytes, size))
    spans = pairwise(accumulate((row.encoded_bytes for row in index.rows), initial=0))
    found = [(row, whole[begin:end]) for row, (begin, end) in zip(index.rows, spans, strict=True)]
    for row, data in found:
        checksum = xxhash.xxh3_128_hexdigest(data)
        if checksum != row.checksum:
            raise CorruptEntry(
                f"{entry.path}: {row.name}: checksum {checksum}, expected {row.checksum}: the file is damaged; build "
                "the cache again",
                where=f"{entry.path}: {row.name}",
                expected=row.checksum,
                found=checksum,
            )
    return found


def _opened(backend: ReadableBackend, entry: StateEntry) -> tuple[bytes, _Index]:
    """Header and index of a snapshot, as `entry` pins them."""
    where = f"{backend.url}/{entry.path}"
    header, size = backend.get_start(entry.path, entry.header_bytes)
    checksum = hashlib.sha256(header).hexdigest()
    if (size, checksum) != (entry.stored_bytes, entry.header_checksum):
        raise CorruptEntry(
            f"{where}: the snapshot is not the one this cache was built with",
            where=where,
            expected=(entry.stored_bytes, entry.header_checksum),
            found=(size, checksum),
        )
    index = _index(header, where)
    if index.entry(header) != entry:
        raise CorruptEntry(f"{where}: the header does not match the manifest", where=where, expected=asdict(entry))
    return header, index


def _index(header: bytes, where: str) -> _Index:
    """Raises: CorruptEntry, UnsupportedFormat."""
    if not header.startswith(OPENING, 8):
        raise CorruptEntry(f"{where} is not a snapshot", where=where, expected=OPENING.decode("ascii"))
    metadata = Fields(parse_first_object(header, 8 + len(OPENING), where), f"{where}: __metadata__")
    if metadata.text("format") != FORMAT:
        raise CorruptEntry(f"{where} is not a snapshot", where=where, expected=FORMAT)
    if (version := metadata.text("version")) != str(FORMAT_VERSION):
        raise UnsupportedFormat(
            f"{where} has snapshot format {version!r:.40}, this program reads {FORMAT_VERSION}: use a newer one",
            expected=str(FORMAT_VERSION),
            found=version,
        )
    fields = Fields(parse_object(metadata.text("state").encode("utf-8", "surrogatepass"), where), where)
    chunk, key, num_tokens = fields.digest("chunk"), fields.digest("key"), fields.integer("num_tokens", 1)
    rows = tuple(_row(row, fields) for row in fields.list("tensors"))
    index = _Index(chunk, num_tokens, fields.object("codec"), rows)
    fields.done()
    names = [row.name for row in rows]
    if not 1 <= len(rows) <= MAX_TENSORS or names != sorted(set(names)) or key != state_key(chunk):
        raise fields.wrong("tensors", "states of one chunk in the order of their names", names)
    if not is_lossless(index.codec):
        raise fields.wrong("codec", "a lossless configuration", index.codec)
    if index.to_bytes() != header:
        raise CorruptEntry(f"{where}: the header is damaged; build the cache again", where=where)
    return index


def _row(value: object, fields: Fields) -> _Row:
    if isinstance(value, list) and len(value) == 5:
        name, dtype, shape, size, checksum = value
        texts = all(isinstance(text, str) for text in (name, dtype, checksum))
        if texts and isinstance(shape, list) and all(type(number) is int for number in (*shape, size)):
            row = _Row(name, dtype, tuple(shape), size, checksum)
            if _is_state(row) and len(checksum) == 32 and size <= 2 * row.raw_bytes + MAX_OVERHEAD_BYTES:
                return row
    raise fields.wrong("tensors", "rows [name, dtype, shape, encoded_bytes, xxh3] within their bounds", value)


def _is_state(row: _Row) -> bool:
    """Whether name, type, shape and size are within their bounds."""
    return (
        bool(_NAME.fullmatch(row.name))
        and row.dtype in STORAGE_DTYPES
        and 1 <= len(row.shape) <= MAX_DIMENSIONS
        and all(1 <= number <= MAX_DIMENSION for number in row.shape)
        and row.raw_bytes <= MAX_SIDE_BYTES
        and row.encoded_bytes >= 1
    )
