"""A `transform` cache of any size from random numbers: a basis, and segments written as the codec writes them.

Sizes in; a codec and the bytes of every segment out. What a segment holds does not depend on its place but for the
exact first tokens, so those of one length are made once; encoding real numbers of such sizes would take minutes.
"""

from __future__ import annotations

import struct
from functools import cached_property, lru_cache
from typing import cast

import numpy as np
from numpy.typing import NDArray

from cag_bench.gpu.shapes import GpuOptions
from cag_bench.gpu.transform import CHUNK_TOKENS, CODED_SHARE, geometric_slots
from cag_store.codecs import JointTransform, StreamChunk, StreamShape, codec_from_config, layer_groups
from cag_store.codecs.base import Side
from cag_store.codecs.transform import Basis, GroupBasis, Rotation
from cag_store.codecs.transform.rans import Layout, Tables, encode_codes
from cag_store.codecs.transform.shifts import pack_shifts

SIDES: tuple[Side, Side] = ("keys", "values")
EXACT_TOKENS = 4
ITEMSIZE = 2  # bfloat16
WIDE_SHARE = 0.3  # of the components, those whose rows need 16 bits
UNIT = 1e-5  # values have a deviation of about 1


class RandomCache:
    """The segments of a prefix of `options.prefix_tokens` tokens of `options.network`.

    Attributes:
        spans: layers [first, last) of each group.
        chunks: (start, num_tokens) of each chunk.
    """

    def __init__(self, options: GpuOptions) -> None:
        self._network, self._generator = options.network, np.random.default_rng(options.seed)
        self.spans = layer_groups(options.network.num_layers, options.joint_layers)
        starts = range(0, options.prefix_tokens, CHUNK_TOKENS)
        self.chunks = [(start, min(CHUNK_TOKENS, options.prefix_tokens - start)) for start in starts]
        self._tables = Tables.of(frequencies())
        self._made = lru_cache(maxsize=None)(self._segment)

    @cached_property
    def codec(self) -> JointTransform:
        """Ready to decode."""
        network, joint = self._network, self.spans[0][1]
        sides = {last - first: (self._side(last - first), self._side(last - first)) for first, last in self.spans}
        exponents = np.arange(network.head_dim // 2) * 2 / network.head_dim
        rotation = Rotation("halves", tuple((500_000.0**-exponents).tolist()))
        heads, dims = (network.num_layers * (size,) for size in (network.num_kv_heads, network.head_dim))
        groups = tuple(sides[last - first] for first, last in self.spans)
        basis = Basis(joint, heads, dims, (rotation,), network.num_layers * (0,), frequencies(), groups).to_bytes()
        config = {"id": "transform", "basis": "0" * 64, "joint_layers": joint, "step": 0}
        return cast(JointTransform, codec_from_config(config, lambda _digest: basis))

    def shape(self, group: int, side: Side) -> StreamShape:
        """Sizes of one side of a group."""
        first, last = self.spans[group]
        heads = (last - first) * [(self._network.num_kv_heads, self._network.head_dim)]
        chunks = [
            StreamChunk(*chunk, len(self.segment(group, side, number))) for number, chunk in enumerate(self.chunks)
        ]
        shape = self.codec.stream_shape(heads, side, first, chunks, ITEMSIZE)
        assert shape is not None
        return shape

    def segment(self, group: int, side: Side, chunk: int) -> bytes:
        """The bytes of a segment."""
        first, last = self.spans[group]
        return self._made(side, last - first, self.chunks[chunk][1], EXACT_TOKENS if chunk == 0 else 0)

    def _side(self, num_layers: int) -> GroupBasis:
        """Directions of which all are coded, with one table and no low bits at step 0."""
        heads, dim = self._network.num_kv_heads, self._network.head_dim
        num_channels = num_layers * heads * dim
        count = round(CODED_SHARE * num_channels)
        num_wide = round(WIDE_SHARE * count)
        mantissas = self._generator.integers(-127, 128, (count, num_channels), np.int16)
        mantissas[:num_wide] *= 16
        return GroupBasis(
            mean=self._generator.normal(size=num_channels).astype(np.float32),
            unit=np.full(num_channels, UNIT, np.float32),
            log_deviation=np.zeros(count, np.int16),
            row_shifts=np.zeros(count, np.uint8),
            num_wide=num_wide,
            mantissas=mantissas,
            metric_scale=np.ones(num_channels, np.float32),
            correlations=num_layers * (np.zeros((heads, dim, dim), np.int8),),
        )

    def _segment(self, side: Side, num_layers: int, num_tokens: int, num_exact: int) -> bytes:
        """As docs/format.md 5.4 lays it out: a center, exact tokens first, codes of the table's distribution."""
        num_channels = num_layers * self._network.num_kv_heads * self._network.head_dim
        count, num_exact = round(CODED_SHARE * num_channels), min(num_exact, num_tokens)
        random = self._generator
        shares = frequencies()[0] / frequencies().sum()
        size = (num_tokens - num_exact, count)
        codes = (random.choice(len(shares), size, p=shares) - len(shares) // 2).astype(np.int16)
        codes[codes == -(len(shares) // 2)] = 4711  # no symbol reaches it
        layout = Layout(np.zeros(count, np.int32), np.zeros(count, np.uint8), np.zeros(len(codes), np.int32))
        stream = encode_codes(codes, layout, self._tables)
        counts = num_exact, stream.num_escapes, stream.num_words
        parts = [
            struct.pack("<BBHIII", SIDES.index(side), 1, 0, *counts),
            random.integers(-9, 10, num_channels, np.int8).tobytes(),
            np.arange(num_exact, dtype="<u4").tobytes(),
            random.integers(0x3F00, 0x4000, (num_exact, num_channels), np.uint16).tobytes(),
            pack_shifts(np.zeros(count, np.int8)),
            pack_shifts(np.zeros(len(codes), np.int8)),
            *(part.tobytes() for part in (stream.escapes, stream.states, stream.words)),
        ]
        return b"".join(parts)


def frequencies() -> NDArray[np.uint16]:
    """One table, that of `transform.geometric_slots` with a slot for escapes."""
    counts = np.bincount(geometric_slots()[0].numpy() >> 24, minlength=128)
    counts[[0, len(counts) // 2]] += (1, -1)
    found: NDArray[np.uint16] = counts.astype(np.uint16)[None]
    return found
