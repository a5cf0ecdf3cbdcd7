"""Bytes -> bytes steps: zstd.

Planes of exponents have a skewed distribution but no repetitions worth the name:
the few matches that zstd finds in them
cost more than plain Huffman coding. `hash_log` 6 with `min_match` 7 all but turns matching off (see
docs/design/002-store.md).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import zstandard
from numpy.typing import NDArray

from cag_store.codecs.base import Config, Packer, Shape, checked_int, corrupt_segment, refuse_unknown_keys
from cag_store.errors import CorruptEntry

_local = threading.local()


class Zstd(Packer):
    """One zstd frame that states its content size. `min_match` and `hash_log` None: zstd's own choice for the level."""

    codec_id = "zstd"

    def __init__(self, level: int = 1, min_match: int | None = None, hash_log: int | None = None) -> None:
        self.level = level
        self.min_match = min_match
        self.hash_log = hash_log

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `level` 1 to 19, `min_match` 3 to 7 or null, `hash_log` 6 to 26 or null."""
        refuse_unknown_keys(cls.codec_id, config, ("level", "min_match", "hash_log"))

        def optional(key: str, low: int, high: int) -> int | None:
            return None if config.get(key) is None else checked_int(cls.codec_id, config, key, low, low, high)

        level = checked_int(cls.codec_id, config, "level", 1, 1, 19)
        return cls(level, optional("min_match", 3, 7), optional("hash_log", 6, 26))

    def config(self) -> Config:
        """The full configuration."""
        return {"id": self.codec_id, "level": self.level, "min_match": self.min_match, "hash_log": self.hash_log}

    def pack(self, data: bytes, shape: Shape) -> bytes:  # noqa: ARG002
        """One frame."""
        chosen = {"min_match": self.min_match, "hash_log": self.hash_log}
        overrides = {key: value for key, value in chosen.items() if value is not None}
        parameters = zstandard.ZstdCompressionParameters.from_level(
            self.level, source_size=len(data), write_content_size=1, write_checksum=0, **overrides
        )
        packed: bytes = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
        return packed

    def unpack(self, data: memoryview, shape: Shape) -> NDArray[np.uint8]:
        """The frame's content, which must have the size of `shape`."""
        return np.frombuffer(unpack_frame(data, math.prod(shape)), dtype=np.uint8)


def unpack_frame(data: bytes | memoryview, size: int) -> bytes:
    """The content of one zstd frame of exactly `size` bytes. Raises: CorruptEntry, before `size` is exceeded."""
    try:
        stated = zstandard.get_frame_parameters(data).content_size
        if stated != size:
            raise corrupt_segment("content size of a zstd frame", size, stated)
        content: bytes = _decompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptEntry(
            f"damaged segment: {error}", where="segment", expected="a zstd frame", found=str(error)
        ) from error
    if len(content) != size:
        raise corrupt_segment("content of a zstd frame", size, len(content))
    return content


def _decompressor() -> Any:
    """This thread's decompressor: a context must not be used by two threads at once."""
    found = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found
