"""The contract of codecs: one layer and side of one chunk <-> bytes.

A codec *is* its JSON configuration: `codec_from_config(codec.config())` gives an equal codec. Three kinds, so that an
illegal chain cannot be written: `Transform` (array -> array), `Codec` (array -> bytes), `Packer` (bytes -> bytes).
Arrays are `[num_kv_heads, num_tokens, head_dim]` in a storage dtype (`cag_store.dtypes`). Implementations are immutable
and safe to call from several threads at once. Knows nothing of files, chunks or checksums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np

from cag_store.dtypes import Array, storage_dtype
from cag_store.errors import CorruptEntry, UnencodableArray, UnknownCodec

Side = Literal["keys", "values"]
Config = dict[str, Any]


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
    """Bytes -> bytes, lossless."""

    @abstractmethod
    def pack(self, data: bytes) -> bytes:
        """Smaller bytes, or not."""

    @abstractmethod
    def unpack(self, data: memoryview, size: int) -> bytes:
        """The `size` bytes that were packed; never allocates more. Raises:
        CorruptEntry when `data` states another size."""


class Codec(Configured):
    """Array -> bytes: what a segment of a chunk is written with."""

    lossless: ClassVar[bool]

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
