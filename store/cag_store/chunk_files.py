"""Chunk files on a backend: encode and write one, open one, check one. Knows neither refs nor manifests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from cag_store.backends import Backend, ReadableBackend
from cag_store.chunk import (
    MAX_LAYERS,
    MAX_SIDE_BYTES,
    ChunkEntry,
    ChunkHeader,
    ChunkIndex,
    header_size,
    index_behind,
    parse_index,
)
from cag_store.codecs import Codec, Side, codec_from_config
from cag_store.dtypes import Array, storage_dtype
from cag_store.errors import CorruptEntry, InvalidName, UnencodableArray, UnsupportedFormat
from cag_store.keys import TokenIds, chunk_key, token_bytes
from cag_store.paths import chunk_path
from cag_store.reading import reread

LayerArrays = tuple[Array, ...]
"""Keys and values of a layer, or what is both."""
CodecSource = Callable[[Mapping[str, Any]], Codec]
"""The codec of a configuration, ready to work. Raises: UnknownCodec; EntryNotFound, CorruptEntry for its blobs."""

_RUN_BYTES = 8 << 20


def default_workers() -> int:
    """Threads for encoding and decoding: the cores this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@dataclass(frozen=True, eq=False)
class OpenChunk:
    """A chunk whose header and token ids are verified: `offsets` of its segments in the file, and of the file's end."""

    entry: ChunkEntry
    index: ChunkIndex
    codec: Codec
    offsets: list[int]
    token_ids: NDArray[np.uint32]

    @property
    def path(self) -> str:
        """Where the file lies."""
        return chunk_path(self.entry.key)

    def hashes(self, first: int, last: int) -> NDArray[np.uint64] | None:
        """The checksums of the segments [first, last), `[num_segments, 2]`, the high half first; None when one is no
        number, which no checksum is equal to."""
        text = "".join(self.index.checksums[first:last])
        try:
            found = bytes.fromhex(text)
        except ValueError:
            return None
        return np.frombuffer(found, ">u8").astype(np.uint64).reshape(-1, 2) if found.hex() == text else None


def encode_chunk(
    header: ChunkHeader,
    layers: Iterable[LayerArrays],
    token_ids: TokenIds,
    codec: Codec,
    pool: ThreadPoolExecutor,
    ahead: int,
) -> tuple[ChunkEntry, list[bytes]]:
    """The entry and the parts of the file. `layers` is consumed at most `ahead` groups of layers before they are
    encoded.

    Raises: InvalidName when the key is not that of the tokens; UnencodableArray.
    """
    _check_config(codec, header)
    _check_key(header, token_ids)
    _check_size(header)
    encoded = list(_encoded(codec, header, iter(layers), pool, ahead))
    checksums = tuple(map(xxhash.xxh3_128_hexdigest, encoded))
    index = ChunkIndex(header, tuple(map(len, encoded)), checksums)
    head = index.to_bytes()
    return index.entry(head), [head, token_bytes(token_ids), *encoded]


def open_chunk(
    backend: ReadableBackend,
    entry: ChunkEntry,
    codecs: CodecSource = codec_from_config,
    before: OpenChunk | None = None,
) -> OpenChunk:
    """Read and verify header and token ids against what `entry` pins; `codecs` gives the codec to decode with. Quicker
    for one that follows `before` in a cache.

    Raises: EntryNotFound, CorruptEntry, UnknownCodec.
    """
    return reread(backend, chunk_path(entry.key), lambda: _open_chunk(backend, entry, codecs, before))


def _open_chunk(
    backend: ReadableBackend, entry: ChunkEntry, codecs: CodecSource, before: OpenChunk | None
) -> OpenChunk:
    path = chunk_path(entry.key)
    where = f"{backend.url}/{path}"
    data, found = backend.get_start(path, entry.header_bytes + 4 * entry.num_tokens)
    if found != entry.stored_bytes:
        raise CorruptEntry(
            f"{where}: expected {entry.stored_bytes} bytes, found {found}",
            where=where,
            expected=entry.stored_bytes,
            found=found,
        )
    header = data[: entry.header_bytes]
    checksum = hashlib.sha256(header).hexdigest()
    if checksum != entry.header_checksum:
        raise CorruptEntry(
            f"{where}: the header is not the one this cache was built with",
            where=where,
            expected=entry.header_checksum,
            found=checksum,
        )
    index = None if before is None else index_behind(header, entry, before.index.header)
    index = index or parse_index(header, entry.stored_bytes, where)
    pinned = index.entry(header, checksum)
    if pinned != entry:
        raise CorruptEntry(
            f"{where}: the header does not match the manifest", where=where, expected=entry, found=pinned
        )
    token_ids = _checked_ids(index.header, data[entry.header_bytes :], where)
    same = before is not None and before.index.header.context is index.header.context
    codec = before.codec if before is not None and same else codecs(index.header.context.codec)
    return OpenChunk(entry, index, codec, index.offsets(entry.header_bytes), token_ids)


def read_entry(backend: Backend, key: str) -> ChunkEntry:
    """The entry of a chunk that no manifest pins, from its own header. Raises:
    EntryNotFound, CorruptEntry, UnsupportedFormat."""
    path = chunk_path(key)
    where = f"{backend.url}/{path}"
    stored_bytes = backend.stat(path).size_bytes
    size = header_size(backend.get_range(path, 0, min(8, stored_bytes)), stored_bytes, where)
    header = backend.get_range(path, 0, size)
    try:
        entry = parse_index(header, stored_bytes, where).entry(header)
    except UnsupportedFormat as error:  # the key is of this version, so another one in the file is damage
        raise CorruptEntry(str(error), **error.facts) from error
    if entry.key != key:
        raise CorruptEntry(f"{where} holds chunk {entry.key}", where=where, expected=key, found=entry.key)
    return entry


def check_segments(backend: ReadableBackend, chunk: OpenChunk, decode: bool) -> int:
    """Read all segments of `chunk` and compare their checksums; with `decode`, decode them too. Returns the bytes read.

    Raises: CorruptEntry.
    """
    header = chunk.index.header
    for position, data in enumerate(verified_segments(backend, chunk)):
        if decode:
            first, last = header.groups[position // header.sides]
            outs = [np.empty(header.side_shape(layer), dtype=storage_of(header)) for layer in range(first, last)]
            chunk.codec.decode_layers_into(data, outs, side_of(position, header), first, header.start)
    return chunk.entry.stored_bytes


def verified_segments(backend: ReadableBackend, chunk: OpenChunk) -> Iterator[memoryview]:
    """The segments of `chunk` in their order, compared with their checksums. Neighbours are read at once, up to
    `_RUN_BYTES` of them, or one that is larger. Raises: CorruptEntry."""
    offsets = chunk.offsets
    for first, last in _runs(offsets):
        run = memoryview(backend.get_range(chunk.path, offsets[first], offsets[last] - offsets[first]))
        for position in range(first, last):
            segment = run[offsets[position] - offsets[first] : offsets[position + 1] - offsets[first]]
            check_segment(segment, chunk, position)
            yield segment


def _runs(offsets: list[int]) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring segments of at most `_RUN_BYTES`, at least one segment each."""
    first = 0
    for position in range(1, len(offsets)):
        if position == len(offsets) - 1 or offsets[position + 1] - offsets[first] > _RUN_BYTES:
            yield first, position
            first = position


def check_segment(data: bytes | memoryview, chunk: OpenChunk, position: int) -> None:
    """Raises: CorruptEntry when `data` is not segment `position` of `chunk`."""
    found, expected = xxhash.xxh3_128_hexdigest(data), chunk.index.checksums[position]
    if found != expected:
        header = chunk.index.header
        first, last = header.groups[position // header.sides]
        layers = f"layer {first}" if last == first + 1 else f"layers {first} to {last - 1}"
        where = f"{chunk.path}: {side_of(position, header)} of {layers}"
        raise CorruptEntry(
            f"{where}: checksum {found}, expected {expected}: the file is damaged; build the cache again",
            where=where,
            expected=expected,
            found=found,
        )


def side_of(position: int, header: ChunkHeader) -> Side:
    """The side of the segment at `position` of the table."""
    return "values" if position % header.sides else "keys"


def storage_of(header: ChunkHeader) -> np.dtype[np.generic]:
    """The numpy dtype of the chunk's decoded arrays."""
    return storage_dtype(header.context.dtype)


def _checked_ids(header: ChunkHeader, ids: bytes, where: str) -> NDArray[np.uint32]:
    token_ids = np.frombuffer(ids, dtype="<u4")
    key = chunk_key(header.parent, token_ids, header.context)
    if key != header.key:
        raise CorruptEntry(f"{where}: the token ids give key {key}", where=where, expected=header.key, found=key)
    return token_ids


def _check_config(codec: Codec, header: ChunkHeader) -> None:
    if codec.config() != dict(header.context.codec):
        raise InvalidName(
            f"the context must hold the full codec configuration {codec.config()}, found {dict(header.context.codec)}",
            expected=codec.config(),
        )


def _check_size(header: ChunkHeader) -> None:
    largest = max(map(header.side_bytes, range(header.num_layers)), default=0)
    if largest > MAX_SIDE_BYTES or not 1 <= header.num_layers <= MAX_LAYERS:
        raise UnencodableArray(
            f"a chunk has 1 to {MAX_LAYERS} layers of at most {MAX_SIDE_BYTES} bytes a side, found {header.num_layers} "
            f"of up to {largest}: take fewer tokens a chunk",
            expected=MAX_SIDE_BYTES,
            found=largest,
        )


def _check_key(header: ChunkHeader, token_ids: TokenIds) -> None:
    key = chunk_key(header.parent, token_ids, header.context)
    if key != header.key or len(token_ids) != header.num_tokens:
        raise InvalidName(
            f"{len(token_ids)} token ids with key {key}; the header says {header.num_tokens} with key {header.key}",
            expected=header.key,
            found=key,
        )


def _encoded(
    codec: Codec, header: ChunkHeader, layers: Iterator[LayerArrays], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[bytes]:
    """Encoded segments in order; at most `ahead` groups of layers are in work."""

    def submitted(group: tuple[int, list[LayerArrays]]) -> list[Future[bytes]]:
        first, pairs = group
        return [
            pool.submit(codec.encode_layers, arrays, header.context.dtype, side_of(side, header), first, header.start)
            for side, arrays in enumerate(zip(*pairs, strict=True))
        ]

    groups = _grouped(header, layers)
    waiting = [submitted(group) for group in islice(groups, ahead)]
    while waiting:
        for future in waiting.pop(0):
            yield future.result()
        waiting.extend(submitted(group) for group in islice(groups, 1))


def _grouped(header: ChunkHeader, layers: Iterator[LayerArrays]) -> Iterator[tuple[int, list[LayerArrays]]]:
    """First layer and arrays of each group. Raises: UnencodableArray for what does not fit the header."""
    for first, last in header.groups:
        pairs = list(islice(layers, last - first))
        if len(pairs) != last - first:
            found = first + len(pairs)
            raise UnencodableArray(
                f"expected {header.num_layers} layers, found {found}", expected=header.num_layers, found=found
            )
        for layer, pair in enumerate(pairs, start=first):
            if len(pair) != header.sides:
                raise UnencodableArray(f"layer {layer}: {len(pair)} sides do not fit the header", found=len(pair))
            for array in pair:
                if array.shape != header.side_shape(layer):
                    raise UnencodableArray(f"layer {layer}: {array.shape} does not fit the header", found=array.shape)
        yield first, pairs
    if next(layers, None) is not None:
        raise UnencodableArray(f"more than the {header.num_layers} layers of the header", expected=header.num_layers)
