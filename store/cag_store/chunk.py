"""A chunk file: the strict header of a safetensors container of encoded segments (docs/format.md section 3).

In: the facts of a chunk and its segment table. Out: header bytes, and back. Knows neither codecs' bytes nor backends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import Any, NamedTuple

from cag_store.codecs import config_joint_layers, config_resources, layer_groups
from cag_store.dtypes import STORAGE_DTYPES
from cag_store.errors import CorruptEntry, UnknownCodec, UnsupportedFormat
from cag_store.jsontext import Fields, canonical_bytes, parse_first_object, parse_object, parse_shallow_object
from cag_store.keys import FORMAT_VERSION, MAX_CHUNK_TOKENS, ChunkContext

MAX_HEADER_BYTES = 8 << 20
MAX_LAYERS = 999
MAX_OVERHEAD_BYTES = 1 << 16
MAX_HEADS = MAX_HEAD_DIM = 1 << 16
MAX_SIDE_BYTES = 1 << 30

_FORMAT = "cag-chunk"
_OPENING = b'{"__metadata__":'
_ALIGNMENT = 8
_SIDES = ("keys", "values")


class Segment(NamedTuple):
    """One row of the segment table: id of its codec, sizes in bytes, xxh3-128 of the encoded bytes."""

    codec: str
    raw_bytes: int
    encoded_bytes: int
    xxh3: str


@dataclass(frozen=True)
class ChunkHeader:
    """What a chunk is: its place in the chain, its geometry (one entry a layer), and what its bytes depend on."""

    key: str
    parent: str
    start: int
    num_tokens: int
    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    context: ChunkContext

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.num_kv_heads)

    @property
    def raw_bytes(self) -> int:
        """Size of all keys and values in the storage dtype."""
        per_token = sum(heads * dim for heads, dim in zip(self.num_kv_heads, self.head_dim, strict=True))
        return 2 * per_token * self.num_tokens * STORAGE_DTYPES[self.context.dtype].itemsize

    def side_bytes(self, layer: int) -> int:
        """Size of the keys (or the values) of one layer in the storage dtype."""
        itemsize = STORAGE_DTYPES[self.context.dtype].itemsize
        return self.num_kv_heads[layer] * self.num_tokens * self.head_dim[layer] * itemsize

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Spans [first, last) of the layers that share a segment, as the codec's configuration says."""
        return layer_groups(self.num_layers, config_joint_layers(self.context.codec))

    def group_bytes(self, first: int, last: int) -> int:
        """Size of the keys (or the values) of layers [first, last) in the storage dtype."""
        return sum(self.side_bytes(layer) for layer in range(first, last))

    def side_shape(self, layer: int) -> tuple[int, int, int]:
        """`[num_kv_heads, num_tokens, head_dim]` of one layer."""
        return self.num_kv_heads[layer], self.num_tokens, self.head_dim[layer]


@dataclass(frozen=True)
class ChunkEntry:
    """A stored chunk as a manifest pins it: size and checksum of what must lie at its key."""

    key: str
    start: int
    num_tokens: int
    stored_bytes: int
    raw_bytes: int
    header_bytes: int
    header_checksum: str

    @classmethod
    def from_json(cls, value: object, where: str) -> ChunkEntry:
        """Raises: CorruptEntry."""
        fields = Fields(value, where)
        entry = cls(
            key=fields.digest("key"),
            start=fields.integer("start", 0),
            num_tokens=fields.integer("num_tokens", 1, MAX_CHUNK_TOKENS),
            stored_bytes=fields.integer("stored_bytes", 1),
            raw_bytes=fields.integer("raw_bytes", 1),
            header_bytes=fields.integer("header_bytes", 16, MAX_HEADER_BYTES),
            header_checksum=fields.digest("header_checksum"),
        )
        fields.done()
        return entry


@dataclass(frozen=True)
class ChunkIndex:
    """A whole chunk header: `segments` are keys then values, group of layers by group of layers."""

    header: ChunkHeader
    segments: tuple[Segment, ...]

    def to_bytes(self) -> bytes:
        """Length prefix and JSON header, as they stand at the beginning of the file."""
        header = self.header
        chunk = {
            "context": header.context.to_json(),
            "head_dim": header.head_dim,
            "key": header.key,
            "num_kv_heads": header.num_kv_heads,
            "num_layers": header.num_layers,
            "num_tokens": header.num_tokens,
            "parent": header.parent,
            "segments": self.segments,
            "start": header.start,
        }
        facts = canonical_bytes(chunk)
        metadata = {
            "chunk": facts.decode("utf-8"),
            "format": _FORMAT,
            "sha256": hashlib.sha256(facts).hexdigest(),
            "version": str(FORMAT_VERSION),
        }
        text = b"".join([_OPENING, canonical_bytes(metadata), b",", self._tensors().encode("ascii"), b"}"])
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @property
    def ids_bytes(self) -> int:
        """Size of the token ids, which follow the header."""
        return 4 * self.header.num_tokens

    @property
    def data_bytes(self) -> int:
        """Size of everything behind the header."""
        return self.ids_bytes + sum(segment.encoded_bytes for segment in self.segments)

    def offsets(self, header_bytes: int) -> list[int]:
        """Offset in the file of each segment, and of the end of the file."""
        sizes = (segment.encoded_bytes for segment in self.segments)
        return list(accumulate(sizes, initial=header_bytes + self.ids_bytes))

    def entry(self, header: bytes, checksum: str | None = None) -> ChunkEntry:
        """The pinned facts of a file with this index, whose header is `header`, with sha256 `checksum`."""
        return ChunkEntry(
            key=self.header.key,
            start=self.header.start,
            num_tokens=self.header.num_tokens,
            stored_bytes=len(header) + self.data_bytes,
            raw_bytes=self.header.raw_bytes,
            header_bytes=len(header),
            header_checksum=checksum or hashlib.sha256(header).hexdigest(),
        )

    def _tensors(self) -> str:
        """Canonical JSON of the tensor table without its braces; names in their sorted order, the ids last."""
        sizes = [segment.encoded_bytes for segment in self.segments]
        bounds = list(accumulate(sizes, initial=self.ids_bytes))
        numbers = chain.from_iterable(zip(bounds, bounds[1:], sizes, strict=False))
        template = _table_template(config_joint_layers(self.header.context.codec) > 1, *self.header.groups)
        return template % (*numbers, self.ids_bytes, self.header.num_tokens)


@lru_cache(maxsize=16)
def _table_template(joint: bool, *groups: tuple[int, int]) -> str:
    """The tensor table with `%d` for start, end and size of each segment, then for bytes and number of the ids."""
    layers = [f"{first:03d}-{last - 1:03d}" if joint else f"{first:03d}" for first, last in groups]
    names = [f"layers.{name}.{side}" for name in layers for side in _SIDES]
    rows = (f'"{name}":{{"data_offsets":[%d,%d],"dtype":"U8","shape":[%d]}}' for name in names)
    return ",".join([*rows, '"token_ids":{"data_offsets":[0,%d],"dtype":"U32","shape":[%d]}'])


def header_size(prefix: bytes, stored_bytes: int, where: str) -> int:
    """Size of length prefix and header, from the file's first 8 bytes. Raises: CorruptEntry."""
    size = 8 + int.from_bytes(prefix, "little")
    if len(prefix) != 8 or size % _ALIGNMENT or size > min(MAX_HEADER_BYTES, stored_bytes):
        limit = min(MAX_HEADER_BYTES, stored_bytes)
        raise CorruptEntry(
            f"{where}: header of {size} bytes, expected at most {limit}", where=where, expected=limit, found=size
        )
    return size


def parse_index(header: bytes, stored_bytes: int, where: str) -> ChunkIndex:
    """The index in `header` (length prefix included) of a file of `stored_bytes`. Raises:
    CorruptEntry, UnsupportedFormat."""
    if not header.startswith(_OPENING, 8):
        raise CorruptEntry(f"{where} is not a chunk", where=where, expected=_OPENING.decode("ascii"))
    metadata = Fields(parse_first_object(header, 8 + len(_OPENING), where), f"{where}: __metadata__")
    if metadata.text("format") != _FORMAT:
        raise CorruptEntry(f"{where} is not a chunk", where=where, expected=_FORMAT)
    version = metadata.text("version")
    if version != str(FORMAT_VERSION):
        raise UnsupportedFormat(
            f"{where} has chunk format {version!r:.40}, this program reads {FORMAT_VERSION}: use a newer one",
            expected=str(FORMAT_VERSION),
            found=version,
        )
    facts = metadata.text("chunk").encode("utf-8", "surrogatepass")
    index = _index_from_json(parse_shallow_object(facts, where), where)
    if index.to_bytes() != header:  # the checksum of the facts is in both
        raise CorruptEntry(
            f"{where}: the header is damaged, or not what its own segment table says; build the cache again",
            where=where,
        )
    if len(header) + index.data_bytes != stored_bytes:
        expected = len(header) + index.data_bytes
        raise CorruptEntry(
            f"{where}: expected a file of {expected} bytes, found {stored_bytes}",
            where=where,
            expected=expected,
            found=stored_bytes,
        )
    return index


def _index_from_json(value: dict[str, Any], where: str) -> ChunkIndex:
    fields = Fields(value, where)
    context = _context(fields.any("context"), f"{where}: context")
    if context.dtype not in STORAGE_DTYPES:
        raise fields.wrong("dtype", " or ".join(STORAGE_DTYPES), context.dtype)
    check_codec_config(context.codec, fields)
    header = ChunkHeader(
        key=fields.digest("key"),
        parent=fields.digest("parent", empty=True),
        start=fields.integer("start", 0),
        num_tokens=fields.integer("num_tokens", 1, MAX_CHUNK_TOKENS),
        num_kv_heads=fields.integers("num_kv_heads", 1, MAX_HEADS),
        head_dim=fields.integers("head_dim", 1, MAX_HEAD_DIM),
        context=context,
    )
    num_layers = fields.integer("num_layers", 1, MAX_LAYERS)
    if not num_layers == header.num_layers == len(header.head_dim):
        raise fields.wrong("num_layers", num_layers, (header.num_layers, len(header.head_dim)))
    side_bytes = tuple(map(header.side_bytes, range(num_layers)))
    if max(side_bytes) > MAX_SIDE_BYTES:
        raise fields.wrong("num_kv_heads", f"at most {MAX_SIDE_BYTES} bytes a layer and side", header.num_kv_heads)
    rows = fields.list("segments")
    sizes = _segment_sizes(side_bytes, config_joint_layers(context.codec))
    if len(rows) != len(sizes):
        raise fields.wrong("segments", f"{len(sizes)} rows", len(rows))
    codec_id = context.codec.get("id")
    if not _are_segments(rows, sizes, codec_id):
        for row, raw_bytes in zip(rows, sizes, strict=True):
            _segment(row, raw_bytes, codec_id, fields)
    fields.done()
    return ChunkIndex(header, tuple(map(Segment._make, rows)))


@lru_cache(maxsize=64)
def _segment_sizes(side_bytes: tuple[int, ...], joint_layers: int) -> list[int]:
    """Raw bytes of each segment, from those of each layer's side; the chunks of a cache have few geometries."""
    groups = layer_groups(len(side_bytes), joint_layers)
    return [sum(side_bytes[first:last]) for first, last in groups for _ in range(2)]


def _context(value: object, where: str) -> ChunkContext:
    """The chunks of a cache have one context, which is validated once."""
    try:
        return _validated_context(canonical_bytes(value))
    except (CorruptEntry, ValueError, RecursionError) as error:
        raise CorruptEntry(f"{where}: {error}", where=where) from error


@lru_cache(maxsize=64)
def _validated_context(text: bytes) -> ChunkContext:
    return ChunkContext.from_json(parse_object(text, "context"), "context")


def _are_segments(rows: list[Any], side_bytes: list[int], codec_id: object) -> bool:
    """What `_segment` checks row by row, column by column, which is ten times as fast."""
    if set(map(type, rows)) != {list} or set(map(len, rows)) != {4}:
        return False
    codecs, raw, encoded, checksums = zip(*rows, strict=True)
    return (
        set(map(type, codecs)) == set(map(type, checksums)) == {str}
        and set(map(type, raw)) == set(map(type, encoded)) == {int}
        and codecs.count(codec_id) == len(codecs)
        and list(raw) == side_bytes
        and min(encoded) >= 1
        and all(size <= 2 * raw_bytes + MAX_OVERHEAD_BYTES for size, raw_bytes in zip(encoded, raw, strict=True))
        and set(map(len, checksums)) == {32}
    )


def check_codec_config(config: Mapping[str, Any], fields: Fields) -> None:
    """Raises: CorruptEntry for what every codec's configuration means alike, and this one has wrong."""
    try:
        config_joint_layers(config)
        config_resources(config)
    except UnknownCodec as error:
        raise fields.wrong("codec", "a configuration", str(error)) from error


def _segment(row: object, raw_bytes: int, codec_id: object, fields: Fields) -> None:
    """Raises: CorruptEntry that says what is wrong with one row."""
    if not isinstance(row, list) or len(row) != 4 or not (type(row[1]) is type(row[2]) is int):
        raise fields.wrong("segments", "rows [codec, raw_bytes, encoded_bytes, xxh3]", row)
    segment = Segment(*row)
    fits = segment.codec == codec_id and 1 <= segment.encoded_bytes <= 2 * raw_bytes + MAX_OVERHEAD_BYTES
    if not fits or segment.raw_bytes != raw_bytes:
        raise fields.wrong("segments", f"codec {codec_id}, {raw_bytes} raw bytes, at most twice as many encoded", row)
    if not isinstance(segment.xxh3, str) or len(segment.xxh3) != 32:
        raise fields.wrong("segments", "a checksum of 32 digits", row)
