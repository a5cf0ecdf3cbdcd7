"""A load as the engine does it where it attends to codes: the codec's bytes are kept and not decoded to numbers.

In: a reader's shapes and the encoded segments of a codec. Out: what keeping them takes from memory to memory, buffers
that a load fills, and whether the store gave back the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import numpy as np
import torch

from cag.residency.buffers import CodedBuffers
from cag_store import Codec
from cag_store.codecs import CodedShape, CodedSide, EncodedSegment, Side

SIDES: tuple[Side, Side] = ("keys", "values")
Encoded = Mapping[tuple[int, int, int], bytes]
"""Segments by first token, first layer and side."""


class KeptCodes:
    """Codes of all layers, as the engine keeps them on a CPU."""

    def __init__(
        self, codec: Codec, shapes: Sequence[tuple[CodedShape, CodedShape]], encoded: Encoded, chunk_tokens: int
    ) -> None:
        self._codec, self._num_tokens = codec, shapes[0][0].num_tokens
        self._chunk_tokens = chunk_tokens
        held = CodedBuffers(shapes, torch.bfloat16, torch.device("cpu"), through_host=False)
        self._held = held  # whose memory the views are of
        self.buffers: list[tuple[CodedSide, CodedSide]] = held.views()
        self._chunks = [[self._segment(*item) for item in chunk] for _, chunk in groupby(encoded.items(), _start)]

    def keep(self, num_threads: int) -> None:
        """Move the codes of all chunks into the buffers."""
        with ThreadPoolExecutor(num_threads) as pool:
            for _ in pool.map(self._keep_chunk, self._chunks):
                pass

    def copies(self) -> list[np.ndarray]:
        """What the buffers hold."""
        return [part.copy() for pair in self.buffers for side in pair for part in side]

    def _keep_chunk(self, segments: list[EncodedSegment]) -> None:
        self._codec.keep_codes(segments, min(self._chunk_tokens, self._num_tokens - segments[0].start))

    def _segment(self, place: tuple[int, int, int], data: bytes) -> EncodedSegment:
        start, layer, side = place
        return EncodedSegment(memoryview(data), (self.buffers[layer][side],), SIDES[side], layer, start)


def _start(item: tuple[tuple[int, int, int], bytes]) -> int:
    return item[0][0]
