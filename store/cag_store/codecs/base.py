"""The contract of codecs: one side of one chunk, of one layer or of several neighbouring ones <-> bytes.

A codec *is* its JSON configuration: `codec_from_config(codec.config())` gives an equal codec. Three kinds, so that an
illegal chain cannot be written: `Transform` (array -> array), `Codec` (array -> bytes), `Packer` (bytes -> bytes).
Arrays are `[num_kv_heads, num_tokens, head_dim]` in a storage dtype (`cag_store.dtypes`). Implementations are immutable
and safe to call from several threads at once. Knows nothing of files, chunks or checksums.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops
from cag_store.codecs.coded import CodedShape, CodedSide
from cag_store.codecs.streams import StreamChunk, StreamShape, StreamSide
from cag_store.dtypes import Array, storage_dtype
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec

Side = Literal["keys", "values"]
Config = dict[str, Any]
Shape = tuple[int, int, int]
"""`[num_kv_heads, num_tokens, channels]`."""
Target = Array | CodedSide | StreamSide
"""Where one side of a layer is decoded to, or kept in codes or undecoded."""
Resources = Callable[[str], bytes]
"""Gives the verified content of the blob at a sha256. Raises: EntryNotFound, CorruptEntry."""

MAX_JOINT_LAYERS = 64

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Configured(ABC):
    """Something that is its JSON configuration. `codec_id` is the configuration's `id`."""

    codec_id: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The instance of a configuration without its `id`; missing keys take defaults. Raises: UnknownCodec."""

    @abstractmethod
    def config(self) -> Config:
        """The full configuration, `id` first, defaults written out."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Configured) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(repr(self.config()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config()})"


class Transform(Configured):
    """Array -> array of the same shape and element size, on unsigned bit patterns."""

    @abstractmethod
    def forward(self, bits: Array) -> Array:
        """A new array."""

    @abstractmethod
    def inverse_into(self, bits: Array, out: Array) -> None:
        """Undo `forward`. `bits` is destroyed; `out` may be strided."""


class Packer(Configured):
    """Bytes -> bytes, lossless. The bytes are an array of `shape` in C order, one an element, and a packer may make use
    of that."""

    @abstractmethod
    def pack(self, data: bytes, shape: Shape) -> bytes:
        """What `unpack` takes; or anything that is not smaller than `data`, where nothing is gained."""

    @abstractmethod
    def unpack(self, data: memoryview, shape: Shape) -> NDArray[np.uint8]:
        """The bytes that were packed, flat; never allocates much more. Raises:
        CorruptEntry when `data` states another size."""


class EncodedSegment(NamedTuple):
    """A verified segment and where it is decoded to: one writable view for each of its layers; or, of the codes of one
    layer, the arrays for all tokens from `kept_from` on; or where it is kept as it is, with those of all chunks."""

    data: memoryview
    outs: tuple[Target, ...]
    side: Side
    first_layer: int
    start: int
    kept_from: int = 0


class RawSegments(NamedTuple):
    """Neighbouring segments of one chunk in memory, not verified yet. first: place of the first in the chunk's table;
    pieces: int64 `[num_segments, 2]` of address and number of bytes; hashes: uint64 `[num_segments, 2]`, the xxh3-128
    that each must have, the high half first; start and num_tokens: of the chunk."""

    first: int
    pieces: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    start: int
    num_tokens: int


class BulkDecoder:
    """Verifies and decodes segments in one compiled step; returns which are done. The others are damaged or of a form
    that needs more: they are to be verified and decoded by `Codec.decode_segments` or `Codec.keep_codes`."""

    def __init__(
        self, loop: loops.Loop, rows: NDArray[np.int64], span: Callable[[int, int], loops.ChunkSpan] = loops.ChunkSpan
    ) -> None:
        """rows: what `loop` takes, of all segments of a chunk; span: of a chunk's start and its number of tokens."""
        self.loop, self.rows, self.span = loop, rows, span

    def __call__(self, segments: RawSegments) -> NDArray[np.bool_]:
        """Which of `segments` are done."""
        first, pieces, hashes, start, num_tokens = segments
        fast = loops.compiled()
        if fast is None:
            return np.zeros(len(pieces), np.bool_)
        rows, span = self.rows[first : first + len(pieces)], self.span(start, num_tokens)
        if self.loop.number == loops.RANKED:
            return fast.decode_ranked(pieces, hashes, rows, span, self.loop.kind)
        step = fast.decode_grouped if self.loop.number == loops.GROUPED else fast.keep_grouped
        return step(pieces, hashes, rows, span)


class Codec(Configured):
    """Arrays -> bytes: what a segment of a chunk is written with.

    A codec of one layer a segment has `encode` and `decode_into`. One that is joint over several layers has
    `joint_layers` in its configuration and `encode_layers` and `decode_layers_into` of its own. A codec that needs data
    besides its configuration names it there as `basis`, and works once `with_resources` has fetched it.
    """

    lossless: ClassVar[bool]

    @property
    def joint_layers(self) -> int:
        """Neighbouring layers that one segment holds; the last group of a chunk may have fewer."""
        return config_joint_layers(self.config())

    def resource_digests(self) -> tuple[str, ...]:
        """Addresses of the blobs without which nothing can be decoded."""
        return config_resources(self.config())

    def with_resources(self, resources: Resources) -> Codec:  # noqa: ARG002
        """This codec, ready to work with the blobs it names. Raises: EntryNotFound, CorruptEntry."""
        return self

    @abstractmethod
    def encode(self, array: Array, dtype: str, side: Side = "keys", start: int = 0) -> bytes:
        """Encode `array` `[num_kv_heads, num_tokens, head_dim]`, any strides;
        `start` = prefix position of its first token.

        Raises: UnencodableArray.
        """

    @abstractmethod
    def decode_into(self, data: bytes | memoryview, out: Array) -> None:
        """Decode into `out`, a writable view of the storage dtype, perhaps not contiguous across heads.

        Every size in `data` is checked against `out` before memory is taken. Raises: CorruptEntry;
        `out` is then undefined.
        """

    def encode_layers(
        self, arrays: Sequence[Array], dtype: str, side: Side, first_layer: int, start: int = 0
    ) -> bytes:  # a joint codec has its own
        """Encode one side of `len(arrays)` neighbouring layers, of which the first is `first_layer`.

        Raises: UnencodableArray.
        """
        (array,) = arrays
        del first_layer
        return self.encode(array, dtype, side, start)

    def decode_layers_into(
        self, data: bytes | memoryview, outs: Sequence[Array], side: Side, first_layer: int, start: int = 0
    ) -> None:
        """Decode into `outs`, each as in `decode_into`. Raises: CorruptEntry; `outs` are then undefined."""
        (out,) = outs
        del side, first_layer, start
        self.decode_into(data, out)

    def decode_segments(self, segments: Sequence[EncodedSegment]) -> None:
        """Decode several segments of one chunk into arrays. A codec may do so in fewer steps; the bits are the same.
        Raises: CorruptEntry; all outs are then undefined."""
        for segment in segments:
            arrays = [out for out in segment.outs if isinstance(out, np.ndarray)]
            self.decode_layers_into(segment.data, arrays, segment.side, segment.first_layer, segment.start)

    def bulk_decoder(
        self,
        buffers: Sequence[Sequence[Target]],  # noqa: ARG002
        first_tokens: Sequence[int],  # noqa: ARG002
    ) -> BulkDecoder | None:
        """A step that loads segments into these keys and values of all layers, which begin with these tokens; None
        where there is none."""
        return None

    def coded_shape(
        self,
        shape: tuple[int, int, int],  # noqa: ARG002
        side: Side,  # noqa: ARG002
        layer: int,  # noqa: ARG002
        chunk_tokens: int,  # noqa: ARG002
    ) -> CodedShape | None:
        """How one side of a layer can be kept in codes, `shape` being `(num_kv_heads, num_tokens, head_dim)` of the
        whole cache; None where it cannot."""
        return None

    def keep_codes(self, segments: Sequence[EncodedSegment], num_tokens: int) -> None:  # noqa: ARG002
        """Put the codes of segments of one chunk of `num_tokens` tokens into their `CodedSide`s. Raises: CorruptEntry;
        the arrays are then undefined."""
        raise UnknownCodec(f"codec {self.codec_id!r} keeps no codes; decode its segments")

    def stream_shape(
        self,
        shapes: Sequence[tuple[int, int]],  # noqa: ARG002
        side: Side,  # noqa: ARG002
        first_layer: int,  # noqa: ARG002
        chunks: Sequence[StreamChunk],  # noqa: ARG002
        itemsize: int,  # noqa: ARG002
    ) -> StreamShape | None:
        """How one side of a group of layers can be kept undecoded, `shapes` being (num_kv_heads, head_dim) of its
        layers; None where it cannot."""
        return None

    def keep_streams(self, segments: Sequence[EncodedSegment], num_tokens: int) -> None:  # noqa: ARG002
        """Put segments of one chunk of `num_tokens` tokens into their `StreamSide`s, undecoded. Raises: CorruptEntry
        for what can be seen without decoding."""
        raise UnknownCodec(f"codec {self.codec_id!r} keeps no streams; decode its segments")


def tokens_of(segment: EncodedSegment) -> int:
    """How many tokens a segment that is decoded into arrays has."""
    return int(cast(Array, segment.outs[0]).shape[1])


def left_over(segments: Sequence[EncodedSegment], done: NDArray[np.bool_]) -> list[EncodedSegment]:
    """The segments that are not done."""
    return [segment for segment, well in zip(segments, done, strict=True) if not well]


def config_joint_layers(config: Mapping[str, Any]) -> int:
    """How many layers a segment of the codec with this configuration holds; needs no codec. Raises: UnknownCodec."""
    found = config.get("joint_layers", 1)
    if type(found) is not int or not 1 <= found <= MAX_JOINT_LAYERS:
        raise UnknownCodec(f"joint_layers must be an integer from 1 to {MAX_JOINT_LAYERS}, found {found!r}")
    return found


def config_resources(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Addresses of the blobs that a codec of this configuration needs; needs no codec. Raises: UnknownCodec."""
    if "basis" not in config:
        return ()
    found = config["basis"]
    if not isinstance(found, str) or not _DIGEST.fullmatch(found):
        raise UnknownCodec(f"basis must be the sha256 of a blob, found {found!r}")
    return (found,)


def layer_groups(num_layers: int, joint_layers: int) -> list[tuple[int, int]]:
    """Spans [first, last) of the layers that share a segment."""
    return [(first, min(first + joint_layers, num_layers)) for first in range(0, num_layers, joint_layers)]


def checked_array(array: Array, dtype: str) -> Array:
    """`array` when it is a storage array of `dtype` and three dimensions. Raises: UnencodableArray."""
    expected = storage_dtype(dtype)
    if array.dtype != expected or array.ndim != 3 or 0 in array.shape:
        raise UnencodableArray(
            f"expected a non-empty array [num_kv_heads, num_tokens, head_dim] of {expected} for {dtype}, "
            f"found {array.dtype} {array.shape}",
            expected=str(expected),
            found=(str(array.dtype), array.shape),
        )
    return array


def refuse_unknown_keys(codec_id: str, config: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises: UnknownCodec when `config` has a key that is not in `known`."""
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise UnknownCodec(
            f"codec {codec_id!r} does not know {', '.join(unknown)}; it knows {', '.join(known) or 'no key'}"
        )


def checked_int(codec_id: str, config: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """`config[key]` as an integer within [low, high]. Raises: UnknownCodec."""
    value = config.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise UnknownCodec(f"codec {codec_id!r}: {key} must be an integer from {low} to {high}, found {value!r}")
    return value


def corrupt_segment(what: str, expected: object, found: object) -> CorruptEntry:
    """The error for a segment that does not fit the buffer it is decoded into."""
    return CorruptEntry(
        f"damaged segment: {what}: expected {expected}, found {found}", where="segment", expected=expected, found=found
    )


def native_scratch(shape: tuple[int, ...], itemsize: int) -> Array:
    """An uninitialized unsigned array of `itemsize` bytes an element, in the memory order of this machine."""
    return np.empty(shape, dtype=f"u{itemsize}")
