"""`lossless`: bit patterns rotated, split into byte planes, each plane packed when it helps. Layout:
docs/format.md 5.1.

Source: byte planes of floats as in Blosc's shuffle filter and "ZipNN" (arXiv:2411.05239):
exponents compress, mantissas do not.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, repeat
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops
from cag_store.codecs.base import (
    BulkDecoder,
    Codec,
    Config,
    EncodedSegment,
    Packer,
    Shape,
    Side,
    Target,
    Transform,
    checked_array,
    corrupt_segment,
    left_over,
    native_scratch,
    refuse_unknown_keys,
    tokens_of,
)
from cag_store.codecs.packers import Zstd
from cag_store.codecs.ranks import Ranks
from cag_store.codecs.transforms import Rotate
from cag_store.dtypes import Array, bit_patterns
from cag_store.errors import UnknownCodec

_PLANE = struct.Struct("<BI")
_WORTH_PACKING = 0.01  # of the size of a plane must be saved, for it to be packed
_WORTH = 0.02  # and for it to be packed otherwise than by the packer before

DEFAULT_PACKERS: tuple[Packer, ...] = (Ranks(), Zstd(1, min_match=7, hash_log=6), Zstd(1, min_match=7))


class Lossless(Codec):
    """Exact for every bit pattern, NaN and infinities included."""

    codec_id = "lossless"
    lossless = True

    def __init__(self, transform: Transform | None = None, packers: Sequence[Packer] = DEFAULT_PACKERS) -> None:
        self.transform = transform or Rotate(1)
        self.packers = tuple(packers)
        self._compilable = self.transform == Rotate(1)
        self._ranks = next((kind for kind, packer in enumerate(packers, start=1) if isinstance(packer, Ranks)), 0)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Keys: `transform` (configuration), `packers` (list of configurations, at most 8)."""
        from cag_store.codecs import packer_from_config, transform_from_config

        refuse_unknown_keys(cls.codec_id, config, ("transform", "packers"))
        packers = config.get("packers", [packer.config() for packer in DEFAULT_PACKERS])
        if not isinstance(packers, (list, tuple)) or len(packers) > 8:
            raise UnknownCodec(
                f"codec 'lossless': packers must be a list of at most 8 configurations, found {packers!r}"
            )
        transform = transform_from_config(config.get("transform", Rotate(1).config()))
        return cls(transform, [packer_from_config(packer) for packer in packers])

    def config(self) -> Config:
        """The full configuration."""
        packers = [packer.config() for packer in self.packers]
        return {"id": self.codec_id, "transform": self.transform.config(), "packers": packers}

    def encode(self, array: Array, dtype: str, side: Side = "keys", start: int = 0) -> bytes:  # noqa: ARG002
        """See `Codec`; `side` and `start` make no difference."""
        bits = self.transform.forward(bit_patterns(checked_array(array, dtype)))
        itemsize = bits.dtype.itemsize
        low_first = bits.astype(f"<u{itemsize}", copy=False).view(np.uint8).reshape(-1, itemsize)
        shape = array.shape
        planes = [self._packed(low_first[:, index].tobytes(), shape) for index in reversed(range(itemsize))]
        head = b"".join(_PLANE.pack(kind, len(plane)) for kind, plane in planes)
        return b"".join([bytes([itemsize]), head, *(plane for _, plane in planes)])

    def decode_into(self, data: bytes | memoryview, out: Array) -> None:
        """See `Codec`."""
        target = bit_patterns(out)
        planes = self._planes(memoryview(data), target)
        fast = loops.compiled_for(target) if self._compilable else None
        if fast is None:
            self._join_planes(planes, target)
        else:
            fast.join_planes(planes, target)

    def decode_segments(self, segments: Sequence[EncodedSegment]) -> None:
        """See `Codec`. What nearly all segments of 16-bit floats are, ranks and raw bytes, is decoded in one compiled
        step, without planes in between and without the interpreter's lock."""
        fast = self._ranked_loops()
        for num_tokens, same in groupby(segments, key=tokens_of):
            left = list(same)
            if fast is not None and all(loops.has_whole_heads(segment.outs[0]) for segment in left):
                pieces, rows = loops.addresses(part.data for part in left), _rows(part.outs[0] for part in left)
                span = loops.ChunkSpan(0, num_tokens)
                left = left_over(left, fast.decode_ranked(pieces, loops.UNVERIFIED, rows, span, self._ranks))
            super().decode_segments(left)

    def bulk_decoder(self, buffers: Sequence[Sequence[Target]], first_tokens: Sequence[int]) -> BulkDecoder | None:
        """See `Codec`."""
        fast, outs = self._ranked_loops(), [out for sides in buffers for out in sides]
        if fast is None or not all(map(loops.has_whole_heads, outs)):
            return None
        kept_from = [first for first, sides in zip(first_tokens, buffers, strict=True) for _ in sides]
        return BulkDecoder(loops.Loop(loops.RANKED, self._ranks), _rows(outs, kept_from))

    def _ranked_loops(self) -> loops.Loops | None:
        return loops.compiled() if self._ranks and self._compilable else None

    def _join_planes(self, planes: list[NDArray[np.uint8]], target: Array) -> None:
        """The reference for `Loops.join_planes`, for any transform."""
        bits = planes[0].astype(native_scratch((0,), target.dtype.itemsize).dtype)
        for plane in planes[1:]:
            bits <<= bits.dtype.type(8)
            bits |= plane
        self.transform.inverse_into(bits.reshape(target.shape), target)

    def _packed(self, plane: bytes, shape: Shape) -> tuple[int, bytes]:
        """By the packer that makes it smallest; a later one only if it saves much, as the first decodes fastest."""
        best = (0, plane)
        for kind, packer in enumerate(self.packers, start=1):
            packed = packer.pack(plane, shape)
            if len(packed) < len(best[1]) - (_WORTH if best[0] else _WORTH_PACKING) * len(plane):
                best = (kind, packed)
        return best

    def _planes(self, view: memoryview, target: Array) -> list[NDArray[np.uint8]]:
        """The unpacked planes, the most significant first, each flat."""
        itemsize, shape = target.dtype.itemsize, target.shape
        offset = 1 + itemsize * _PLANE.size
        if len(view) < offset or view[0] != itemsize:
            raise corrupt_segment("number of planes", itemsize, view[0] if len(view) else "no bytes")
        table = [_PLANE.unpack_from(view, 1 + index * _PLANE.size) for index in range(itemsize)]
        if len(view) != offset + sum(length for _, length in table):
            raise corrupt_segment("length", offset + sum(length for _, length in table), len(view))
        planes = []
        for kind, length in table:
            planes.append(self._plane(kind, view[offset : offset + length], shape))
            offset += length
        return planes

    def _plane(self, kind: int, data: memoryview, shape: Shape) -> NDArray[np.uint8]:
        if kind > len(self.packers):
            raise corrupt_segment("packer of a plane", f"at most {len(self.packers)}", kind)
        if kind:
            return self.packers[kind - 1].unpack(data, shape)
        if len(data) != math.prod(shape):
            raise corrupt_segment("length of a raw plane", math.prod(shape), len(data))
        return np.frombuffer(data, dtype=np.uint8)


def _rows(outs: Iterable[object], kept_from: Iterable[int] = repeat(0)) -> NDArray[np.int64]:
    """What `Loops.decode_ranked` takes: of arrays that begin with these tokens, where token 0 would lie."""
    arrays = [out for out in outs if isinstance(out, np.ndarray)]
    return np.array(
        [
            (out.shape[0], out.shape[2], out.ctypes.data - first * out.strides[1], out.strides[0])
            for out, first in zip(arrays, kept_from, strict=False)
        ],
        np.int64,
    )
