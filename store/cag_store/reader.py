"""Reading a cache: token ids, and keys and values layer by layer into buffers of the caller."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from cag_store.backends import Lease, ReadableBackend
from cag_store.chunk import ChunkEntry, ChunkHeader
from cag_store.chunk_files import CodecSource, OpenChunk, open_chunk
from cag_store.codecs import CodedShape, CodedSide, Side, StreamChunk, StreamShape, StreamSide
from cag_store.dtypes import storage_dtype
from cag_store.errors import CorruptEntry, UnencodableArray
from cag_store.job_decoding import Buffers
from cag_store.keys import ROOT, ChunkContext
from cag_store.paths import chunk_path
from cag_store.pipeline import LoadTimings, Pipeline

SIDES: tuple[Side, Side] = ("keys", "values")
_TIERS = ("memory", "disk", "object-store")  # the slower the later


class CacheReader:
    """Consecutive chunks from position 0 on, held against `gc` by a lease until `close`. A context manager.

    Opening verifies sizes, headers, token ids and the chain of keys of all chunks; `load` verifies every segment before
    it is used.
    """

    def __init__(
        self,
        backend: ReadableBackend,
        entries: Sequence[ChunkEntry],
        context: ChunkContext,
        lease: Lease | None,
        workers: int,
        codecs: CodecSource,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.timings = LoadTimings()
        self._backend = backend
        self._lease = lease
        self._on_close = on_close
        self._workers = workers
        try:
            self._chunks = _opened(backend, entries, codecs)
            check_chain(self._chunks, context)
        except BaseException:
            self.close()
            raise

    @property
    def header(self) -> ChunkHeader:
        """The header of the first chunk: geometry, types and context are those of all."""
        return self._chunks[0].index.header

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(chunk.entry.num_tokens for chunk in self._chunks)

    @property
    def tier(self) -> str:
        """The slowest tier that `load` has read from, or would read from."""
        found = self.timings.bytes_by_tier
        return max(found, key=_TIERS.index, default=self._backend.tier)

    def token_ids(self) -> NDArray[np.int64]:
        """The token ids, verified by the chain of keys."""
        return np.concatenate([chunk.token_ids for chunk in self._chunks]).astype(np.int64)

    def first_tokens(self, needed: Sequence[int]) -> list[int]:
        """Where layers may begin that need nothing before token `needed[layer]` (`num_tokens`: nothing at all): each at
        the start of a chunk, or at `num_tokens`. Layers that share segments keep what one of them needs."""
        starts = [*(chunk.entry.start for chunk in self._chunks), self.num_tokens]
        firsts: list[int] = []
        for first, last in self.header.groups:
            kept_from = starts[bisect_right(starts, min(needed[first:last])) - 1]
            firsts += [kept_from] * (last - first)
        return firsts

    def load(
        self,
        buffers: Buffers,
        on_layer: Callable[[int], None] | None = None,
        *,
        first_layer_soon: bool = True,
        first_tokens: Sequence[int] | None = None,
    ) -> None:
        """Fill `buffers[layer] = (keys, values)`, each writable `[num_kv_heads, at least num_tokens, head_dim]`; or
        `(keys,)` where the chunks have one side.

        Their dtype is the numpy carrier of the storage dtype; the last axis is contiguous. Or each is a `CodedSide` of
        `coded_shapes`, and codes are kept as they are stored; or a `StreamSide` of `stream_shapes`, the same for all
        layers of a group, and segments are kept undecoded.
        With `first_tokens`, as the method of that name gives them, the buffers of each layer begin with that token, and
        segments before it are neither read nor verified.
        Layers become whole in order;
        `on_layer(i)` is then called on this thread. Who has no use for the first layers before the last ones are there
        is served sooner without `first_layer_soon`. Raises: CorruptEntry, EntryNotFound; the buffers are then
        undefined.
        """
        firsts = self._checked(first_tokens)
        self._check_buffers(buffers, firsts)
        loading = Pipeline(self._backend, self._chunks, buffers, firsts, self._workers, self.timings, first_layer_soon)
        loading.run(on_layer)

    def coded_shapes(self, first_tokens: Sequence[int] | None = None) -> list[tuple[CodedShape, CodedShape]] | None:
        """How keys and values of each layer can be kept in codes, from its first token on; None if the codec cannot do
        that for all, if there is one side, or if a chunk before the last one is not full, as groups of tokens would be
        cut."""
        header, codec, num_tokens = self.header, self._chunks[0].codec, self.num_tokens
        full = (chunk.entry.num_tokens == header.context.chunk_tokens for chunk in self._chunks[:-1])
        if header.sides == 1 or not all(full):
            return None
        sizes = zip(header.num_kv_heads, header.head_dim, self._checked(first_tokens), strict=True)
        shapes: list[CodedShape] = []
        for layer, (num_heads, head_dim, kept_from) in enumerate(sizes):
            for side in SIDES:
                whole = codec.coded_shape((num_heads, num_tokens, head_dim), side, layer, header.context.chunk_tokens)
                if whole is None:
                    return None
                shapes.append(whole.kept_from(kept_from))
        return list(zip(shapes[::2], shapes[1::2], strict=True))

    def stream_shapes(self, first_tokens: Sequence[int] | None = None) -> list[tuple[StreamShape, StreamShape]] | None:
        """How keys and values of each group of layers can be kept undecoded, from its first token on; None if the codec
        cannot do that for all, or if there is one side."""
        if self.header.sides == 1:
            return None
        header, codec, itemsize = self.header, self._chunks[0].codec, storage_dtype(self.header.context.dtype).itemsize
        sizes, groups = list(zip(header.num_kv_heads, header.head_dim, strict=True)), header.groups
        firsts, shapes = self._checked(first_tokens), list[StreamShape]()
        for position in range(2 * len(groups)):
            first, last = groups[position // 2]
            chunks = self._stream_chunks(position, firsts[first])
            shape = codec.stream_shape(sizes[first:last], SIDES[position % 2], first, chunks, itemsize)
            if shape is None:
                return None
            shapes.append(shape)
        return list(zip(shapes[::2], shapes[1::2], strict=True))

    def _stream_chunks(self, position: int, kept_from: int) -> list[StreamChunk]:
        kept = (chunk for chunk in self._chunks if chunk.entry.start >= kept_from)
        return [StreamChunk(c.entry.start, c.entry.num_tokens, c.index.sizes[position]) for c in kept]

    def _checked(self, first_tokens: Sequence[int] | None) -> list[int]:
        """One for each layer, 0 where nothing is said. Raises: UnencodableArray."""
        firsts = [0] * self.header.num_layers if first_tokens is None else list(first_tokens)
        if len(firsts) != self.header.num_layers or self.first_tokens(firsts) != firsts:
            raise UnencodableArray(
                f"first tokens must be starts of chunks, one a layer and alike for layers of a group, found {firsts}",
                found=firsts,
            )
        return firsts

    def close(self) -> None:
        """Give up the lease, after `on_close` was called. Idempotent."""
        on_close, self._on_close = self._on_close, None
        if on_close is not None:
            on_close()
        if self._lease is not None:
            self._lease.release()

    def __enter__(self) -> CacheReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_buffers(self, buffers: Buffers, firsts: Sequence[int]) -> None:
        header, dtype = self.header, storage_dtype(self.header.context.dtype)
        if len(buffers) != header.num_layers:
            raise UnencodableArray(f"expected buffers for {header.num_layers} layers, found {len(buffers)}")
        if isinstance(buffers[0][0], CodedSide):
            self._check_coded(buffers, firsts)
            return
        if isinstance(buffers[0][0], StreamSide):
            self._check_streams(buffers, firsts)
            return
        for layer, (sides, kept_from) in enumerate(zip(buffers, firsts, strict=True)):
            if len(sides) != header.sides:
                raise UnencodableArray(f"layer {layer}: expected {header.sides} buffers, found {len(sides)}")
            for array in sides:
                if not _fits(array, dtype, header, layer, self.num_tokens - kept_from):
                    expected = (header.num_kv_heads[layer], self.num_tokens - kept_from, header.head_dim[layer])
                    raise UnencodableArray(
                        f"layer {layer}: expected a writable buffer {expected} of {dtype}, its last axis contiguous, "
                        f"found {_described(array)}",
                        expected=expected,
                        found=_described(array),
                    )

    def _check_coded(self, buffers: Buffers, firsts: Sequence[int]) -> None:
        dtype, shapes = storage_dtype(self.header.context.dtype), self.coded_shapes(firsts)
        if shapes is not None:
            pairs = zip(chain.from_iterable(buffers), chain.from_iterable(shapes), strict=True)
            if all(isinstance(side, CodedSide) and side.fits(shape, dtype) for side, shape in pairs):
                return
        raise UnencodableArray("arrays for codes that are not those of the cache's `coded_shapes`")

    def _check_streams(self, buffers: Buffers, firsts: Sequence[int]) -> None:
        shapes, groups = self.stream_shapes(firsts), self.header.groups
        pairs = zip(groups, shapes or [], strict=False)
        if shapes is None or not all(
            isinstance(side, StreamSide) and side.fits(shape)
            for (first, last), both in pairs
            for sides in buffers[first:last]
            for side, shape in zip(sides, both, strict=True)
        ):
            raise UnencodableArray("arrays for segments that are not those of the cache's `stream_shapes`")


def _described(side: object) -> str:
    if not isinstance(side, np.ndarray):
        return type(side).__name__
    return f"{side.shape} of {side.dtype}, strides {side.strides}"


def _opened(backend: ReadableBackend, entries: Sequence[ChunkEntry], codecs: CodecSource) -> list[OpenChunk]:
    """All chunks, as many at the same time as the backend is good for."""
    if backend.parallel_reads == 1:
        for entry in entries:
            backend.will_read(chunk_path(entry.key), entry.header_bytes + 4 * entry.num_tokens)
        chunks: list[OpenChunk] = []
        for entry in entries:
            chunks.append(open_chunk(backend, entry, codecs, chunks[-1] if chunks else None))
        return chunks
    with ThreadPoolExecutor(backend.parallel_reads, "cag-open") as pool:
        return list(pool.map(lambda entry: open_chunk(backend, entry, codecs), entries))


def check_chain(chunks: Sequence[OpenChunk], context: ChunkContext) -> None:
    """Raises: CorruptEntry unless each chunk follows the one before, in the same context and geometry, from position
    0 on."""
    parent, start = ROOT, 0
    for chunk in chunks:
        header, first = chunk.index.header, chunks[0].index.header
        expected = (parent, start, context, first.num_kv_heads, first.head_dim)
        found = (header.parent, header.start, header.context, header.num_kv_heads, header.head_dim)
        if found != expected:
            raise CorruptEntry(
                f"{chunk.path} does not follow the chunk before it, or belongs to another cache",
                where=chunk.path,
                expected=expected,
                found=found,
            )
        parent, start = header.key, start + header.num_tokens


def _fits(array: object, dtype: np.dtype[np.generic], header: ChunkHeader, layer: int, num_tokens: int) -> bool:
    return (
        isinstance(array, np.ndarray)
        and array.ndim == 3
        and array.dtype == dtype
        and array.flags.writeable
        and array.shape[0] == header.num_kv_heads[layer]
        and array.shape[1] >= num_tokens
        and array.shape[2] == header.head_dim[layer]
        and (array.strides[2] == dtype.itemsize or not array.size)
    )
