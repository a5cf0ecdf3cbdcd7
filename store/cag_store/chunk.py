"""A chunk file: the strict header of a safetensors container of encoded segments (docs/format.md section 3).

In: the facts of a chunk and its segment table. Out: header bytes, and back. Knows neither codecs' bytes nor backends.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from cag_store.codecs import config_joint_layers, config_resources, layer_groups
from cag_store.dtypes import STORAGE_DTYPES
from cag_store.errors import CorruptEntry, UnknownCodec, UnsupportedFormat
from cag_store.header_text import ALIGNMENT, FORMAT, OPENING, found_rows, header_form
from cag_store.jsontext import Fields, canonical_bytes, parse_first_object, parse_object, parse_shallow_object
from cag_store.keys import FORMAT_VERSION, MAX_CHUNK_TOKENS, ONE_SIDED_VERSION, ChunkContext

MAX_HEADER_BYTES = 8 << 20
MAX_LAYERS = 999
MAX_OVERHEAD_BYTES = 1 << 16
MAX_HEADS = MAX_HEAD_DIM = 1 << 16
MAX_SIDE_BYTES = 1 << 30


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
    def ids_bytes(self) -> int:
        """Size of the token ids, which follow the header in the file."""
        return 4 * self.num_tokens

    @property
    def raw_bytes(self) -> int:
        """Size of all keys and values in the storage dtype."""
        return sum(self.segment_bytes)

    @property
    def sides(self) -> int:
        """Segments of a layer, or of a group of layers: keys and values, or one that is both."""
        return self.context.sides

    def side_bytes(self, layer: int) -> int:
        """Size of the keys (or the values) of one layer in the storage dtype."""
        itemsize = STORAGE_DTYPES[self.context.dtype].itemsize
        return self.num_kv_heads[layer] * self.num_tokens * self.head_dim[layer] * itemsize

    @property
    def groups(self) -> list[tuple[int, int]]:
        """Spans [first, last) of the layers that share a segment, as the codec's configuration says."""
        return layer_groups(self.num_layers, config_joint_layers(self.context.codec))

    @property
    def segment_bytes(self) -> list[int]:
        """Size of each segment in the storage dtype, in the order of the table. Borrowed."""
        channel_bytes = self.num_tokens * STORAGE_DTYPES[self.context.dtype].itemsize
        joint_layers = config_joint_layers(self.context.codec)
        return _segment_bytes(self.num_kv_heads, self.head_dim, channel_bytes, joint_layers, self.sides)

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
    """A whole chunk header. Of each segment, keys then values (if there are), group of layers by group, `sizes` has the
    encoded bytes and `checksums` their xxh3-128; codec and size of what is encoded follow from the header."""

    header: ChunkHeader
    sizes: tuple[int, ...]
    checksums: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Length prefix and JSON header, as they stand at the beginning of the file."""
        header = self.header
        form = header_form(header.context, header.num_kv_heads, header.head_dim)
        place = header.key, header.num_tokens, header.parent, header.start
        return form.filled(place, header.segment_bytes, self.sizes, self.checksums)

    @property
    def data_bytes(self) -> int:
        """Size of everything behind the header."""
        return self.header.ids_bytes + sum(self.sizes)

    def offsets(self, header_bytes: int) -> list[int]:
        """Offset in the file of each segment, and of the end of the file."""
        return list(accumulate(self.sizes, initial=header_bytes + self.header.ids_bytes))

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


def header_size(prefix: bytes, stored_bytes: int, where: str) -> int:
    """Size of length prefix and header, from the file's first 8 bytes. Raises: CorruptEntry."""
    size = 8 + int.from_bytes(prefix, "little")
    if len(prefix) != 8 or size % ALIGNMENT or size > min(MAX_HEADER_BYTES, stored_bytes):
        limit = min(MAX_HEADER_BYTES, stored_bytes)
        raise CorruptEntry(
            f"{where}: header of {size} bytes, expected at most {limit}", where=where, expected=limit, found=size
        )
    return size


def parse_index(header: bytes, stored_bytes: int, where: str) -> ChunkIndex:
    """The index in `header` (length prefix included) of a file of `stored_bytes`. Raises:
    CorruptEntry, UnsupportedFormat."""
    if not header.startswith(OPENING, 8):
        raise CorruptEntry(f"{where} is not a chunk", where=where, expected=OPENING.decode("ascii"))
    metadata = Fields(parse_first_object(header, 8 + len(OPENING), where), f"{where}: __metadata__")
    if metadata.text("format") != FORMAT:
        raise CorruptEntry(f"{where} is not a chunk", where=where, expected=FORMAT)
    version = metadata.text("version")
    if version not in (str(FORMAT_VERSION), str(ONE_SIDED_VERSION)):
        raise UnsupportedFormat(
            f"{where} has chunk format {version!r:.40}, this program reads {FORMAT_VERSION} and {ONE_SIDED_VERSION}: "
            "use a newer one",
            expected=str(ONE_SIDED_VERSION),
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


def index_behind(header: bytes, entry: ChunkEntry, before: ChunkHeader) -> ChunkIndex | None:
    """The index in `header` (length prefix included) where it is what `entry` and the chunk before it lead to expect:
    of the same context and geometry, and no longer. None: `parse_index` says what it is.

    Sizes and checksums are all that is taken from the bytes. That nothing else differs is seen when the header is
    written again.
    """
    expected = replace(before, key=entry.key, parent=before.key, start=entry.start, num_tokens=entry.num_tokens)
    rows, raw = found_rows(header), expected.segment_bytes
    if len(rows) != len(raw) or entry.num_tokens > before.num_tokens:
        return None
    sizes, checksums = zip(*rows, strict=True)
    index = ChunkIndex(expected, tuple(map(int, sizes)), checksums)
    fits = all(map(_is_size, index.sizes, raw)) and len(header) + index.data_bytes == entry.stored_bytes
    return index if fits and index.to_bytes() == header else None


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
    sizes = header.segment_bytes
    if len(rows) != len(sizes):
        raise fields.wrong("segments", f"{len(sizes)} rows", len(rows))
    codec_id = context.codec.get("id")
    if not _are_segments(rows, sizes, codec_id):
        for row, raw_bytes in zip(rows, sizes, strict=True):
            _segment(row, raw_bytes, codec_id, fields)
    fields.done()
    _, _, encoded, checksums = zip(*rows, strict=True)
    return ChunkIndex(header, encoded, checksums)


@lru_cache(maxsize=64)
def _segment_bytes(
    num_kv_heads: tuple[int, ...], head_dim: tuple[int, ...], channel_bytes: int, joint_layers: int, num_sides: int
) -> list[int]:
    """See `ChunkHeader.segment_bytes`; the chunks of a cache have few geometries."""
    sides = [heads * dim * channel_bytes for heads, dim in zip(num_kv_heads, head_dim, strict=True)]
    groups = layer_groups(len(sides), joint_layers)
    return [sum(sides[first:last]) for first, last in groups for _ in range(num_sides)]


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
        and all(map(_is_size, encoded, raw))
        and set(map(len, checksums)) == {32}
    )


def _is_size(encoded_bytes: int, raw_bytes: int) -> bool:
    """Whether a segment of `raw_bytes` may have so many encoded bytes."""
    return 1 <= encoded_bytes <= 2 * raw_bytes + MAX_OVERHEAD_BYTES


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
    codec, raw, encoded, checksum = row
    if codec != codec_id or raw != raw_bytes or not _is_size(encoded, raw_bytes):
        raise fields.wrong("segments", f"codec {codec_id}, {raw_bytes} raw bytes, at most twice as many encoded", row)
    if not isinstance(checksum, str) or len(checksum) != 32:
        raise fields.wrong("segments", "a checksum of 32 digits", row)
