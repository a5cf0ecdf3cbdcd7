"""`ranks`: bytes of an array as ranks of their differences from their channel's base. Layout: docs/format.md 5.

Made for planes of exponents: within a channel most values have one of three exponents, so that two bits say which, and
what is left says so with two more. Codes lie in planes of bits, 64 codes in as many words as a code has bits, which a
processor with vectors of 64 bytes takes apart without a loop over codes: several times as fast as Huffman codes
of the same bytes, in less space, because those know nothing of channels (docs/design/002-store.md).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops
from cag_store.codecs.base import Config, Packer, Shape, corrupt_segment, refuse_unknown_keys
from cag_store.errors import CorruptEntry

Bytes = NDArray[np.uint8]

LEVEL_BITS = (2, 2, 3)  # of a code; the highest code of a level says that the next level has the value
NUM_RANKED = sum((1 << bits) - 1 for bits in LEVEL_BITS)
GROUP = 64  # codes that share words

_COUNTS = struct.Struct("<III")
_RANKS_OF_LEVEL = [(1 << bits) - 1 for bits in LEVEL_BITS]
_FIRST_OF_LEVEL = [sum(_RANKS_OF_LEVEL[:level]) for level in range(len(LEVEL_BITS))]
_LENGTH_BY_RANK = np.repeat(np.cumsum([*LEVEL_BITS, 8]), [*_RANKS_OF_LEVEL, 256 - NUM_RANKED])  # bits
_VALUES = np.arange(256)
_NEARBY = np.array([0, -1, 1, -2, 2])  # bases that are tried, from the median


class PackedRanks(NamedTuple):
    """The codes of a plane, level by level. counts: how many differences are left behind each level; levels: words;
    rest: the differences that have no rank."""

    counts: tuple[int, int, int]
    levels: list[bytes]
    rest: bytes


class RankedPlane(NamedTuple):
    """What `Ranks` packs, taken apart and of the right sizes; its codes are not looked at yet.

    table: the differences by rank, `[13]`. base: `[num_heads, channels]`. levels: the words of each level, as bytes.
    counts: how many codes level 2 and level 3 have. rest: the differences that have no rank, in order.
    """

    table: Bytes
    base: Bytes
    levels: tuple[Bytes, Bytes, Bytes]
    counts: tuple[int, int]
    rest: Bytes


class Ranks(Packer):
    """Differences by rank, in three levels."""

    codec_id = "ranks"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """No keys."""
        refuse_unknown_keys(cls.codec_id, config, ())
        return cls()

    def config(self) -> Config:
        """The full configuration."""
        return {"id": self.codec_id}

    def pack(self, data: bytes, shape: Shape) -> bytes:
        """See `Packer`; channels are the last axis."""
        plane = np.frombuffer(data, dtype=np.uint8).reshape(shape)
        fast = loops.compiled()
        medians = median_reference if fast is None else fast.around_medians
        base, order, num_bits = _chosen(*medians(plane))
        if num_bits >= 8 * len(data):
            return data
        rank_of = np.empty(256, dtype=np.uint8)
        rank_of[order] = np.arange(256)
        pack = pack_reference if fast is None else fast.pack_ranks
        counts, levels, rest = pack(plane, base.reshape(shape[0], shape[2]), rank_of)
        table = order[:NUM_RANKED].astype(np.uint8).tobytes()
        return b"".join([_COUNTS.pack(*counts), table, base.tobytes(), *levels, rest])

    def unpack(self, data: memoryview, shape: Shape) -> Bytes:
        """See `Packer`."""
        fast = loops.compiled()
        if fast is not None:
            out = np.empty(shape, dtype=np.uint8)
            if fast.unpack_ranks(np.frombuffer(data, dtype=np.uint8), out):
                return out.reshape(-1)
        return unpack_reference(self.parsed(data, shape), shape)  # which says what is wrong

    def parsed(self, data: memoryview, shape: Shape) -> RankedPlane:
        """The parts of what was packed from an array of `shape`. Raises: CorruptEntry unless each has its size."""
        num_heads, num_tokens, channels = shape
        if len(data) < _COUNTS.size:
            raise corrupt_segment("length of ranks", f"at least {_COUNTS.size}", len(data))
        second, third, rest = _COUNTS.unpack_from(data)
        if not rest <= third <= second <= num_heads * num_tokens * channels:
            raise corrupt_segment("numbers of codes", "less in each level", (second, third, rest))
        first = num_heads * -(-num_tokens * channels // GROUP)
        groups = (first, -(-second // GROUP), -(-third // GROUP))
        words = [8 * bits * count for bits, count in zip(LEVEL_BITS, groups, strict=True)]
        sizes = [_COUNTS.size, NUM_RANKED, num_heads * channels, *words, rest]
        if len(data) != sum(sizes):
            raise corrupt_segment("length of ranks", sum(sizes), len(data))
        ends = np.cumsum(sizes).tolist()
        _, table, base, *levels, left = np.split(np.frombuffer(data, dtype=np.uint8), ends[:-1])
        first_level, second_level, third_level = levels
        base = base.reshape(num_heads, channels)
        return RankedPlane(table, base, (first_level, second_level, third_level), (second, third), left)


def pack_reference(plane: Bytes, base: Bytes, rank_of: Bytes) -> PackedRanks:
    """The reference for `Loops.pack_ranks`."""
    differences = (plane - base[:, None]).reshape(plane.shape[0], -1)
    levels, counts = [], []
    for first, bits in zip(_FIRST_OF_LEVEL, LEVEL_BITS, strict=True):
        ranks, last = rank_of[differences], (1 << bits) - 1
        levels.append(_to_words(np.minimum(ranks - np.uint8(first), np.uint8(last)), bits))
        differences = differences[ranks >= first + last][None]
        counts.append(differences.size)
    return PackedRanks((counts[0], counts[1], counts[2]), levels, differences.tobytes())


def unpack_reference(plane: RankedPlane, shape: Shape) -> Bytes:
    """The flat bytes: the reference for `Loops.unpack_ranks`. Raises: CorruptEntry."""
    num_heads, num_tokens, channels = shape
    rank = np.zeros((num_heads, num_tokens * channels), dtype=np.uint8)
    coded = np.ones(rank.shape, dtype=bool)
    for words, bits, first, count in zip(
        plane.levels, LEVEL_BITS, _FIRST_OF_LEVEL, (rank.size, *plane.counts), strict=True
    ):
        if np.count_nonzero(coded) != count:
            raise _inconsistent()
        rank[coded] = first + _from_words(words, bits, num_heads if first == 0 else 1, count)
        coded = rank == first + (1 << bits) - 1
    if np.count_nonzero(coded) != plane.rest.size:
        raise _inconsistent()
    differences = np.append(plane.table, np.uint8(0))[rank]
    differences[coded] = plane.rest
    return (differences.reshape(shape) + plane.base[:, None]).reshape(-1)


def median_reference(plane: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The reference for `Loops.around_medians`."""
    num_heads, num_tokens, channels = plane.shape
    channel = 256 * np.arange(num_heads * channels)
    index = channel.reshape(num_heads, 1, channels) + plane
    histogram = np.bincount(index.reshape(-1), minlength=256 * channel.size).reshape(-1, 256)
    median = (2 * np.cumsum(histogram, axis=1) < num_tokens).sum(axis=1)
    return median, np.take_along_axis(histogram, (_VALUES + median[:, None]) % 256, axis=1)


def _chosen(median: NDArray[np.int64], around: NDArray[np.int64]) -> tuple[Bytes, NDArray[np.intp], int]:
    """A base for each channel, flat; all differences, the commonest first; bits that codes take.

    From the medians one step of descent: with codes as long as the medians make them, each channel takes the base
    under which its own are shortest.
    """
    length = _lengths(around.sum(axis=0))
    costs = around.astype(np.float64) @ length[(_VALUES[:, None] - _NEARBY) % 256].astype(np.float64)
    chosen = costs.argmin(axis=1)
    counts = np.zeros(256, dtype=np.int64)
    for step, nearby in enumerate(_NEARBY):
        counts += np.roll(around[chosen == step].sum(axis=0), -nearby)
    order = np.argsort(-counts, kind="stable")
    return (median + _NEARBY[chosen]).astype(np.uint8), order, int(counts[order] @ _LENGTH_BY_RANK)


def _lengths(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bits that the code of each difference takes if they are ranked by `counts`."""
    lengths = np.empty_like(_LENGTH_BY_RANK)
    lengths[np.argsort(-counts, kind="stable")] = _LENGTH_BY_RANK
    return lengths


def _to_words(codes: Bytes, bits: int) -> bytes:
    """The words of `codes` `[num_runs, length]`; each run begins a group."""
    num_runs, length = codes.shape
    padded = np.zeros((num_runs, -(-length // GROUP) * GROUP), dtype=np.uint8)
    padded[:, :length] = codes
    planes = (padded.reshape(-1, 1, GROUP) >> np.arange(bits, dtype=np.uint8)[:, None]) & 1
    return np.packbits(planes, axis=-1, bitorder="little").tobytes()


def _from_words(words: Bytes, bits: int, num_runs: int, count: int) -> Bytes:
    """Undo `_to_words`: `count` codes of all runs, flat. Raises: CorruptEntry unless the padding is 0."""
    planes = np.unpackbits(words.reshape(-1, bits, GROUP // 8), axis=-1, bitorder="little")
    weighted = planes << np.arange(bits, dtype=np.uint8)[:, None]
    codes: Bytes = weighted.sum(axis=1, dtype=np.uint8).reshape(num_runs, -1)
    length = count // num_runs
    if codes[:, length:].any():
        raise _inconsistent()
    return codes[:, :length].reshape(-1)


def _inconsistent() -> CorruptEntry:
    return corrupt_segment("ranks", "as many codes in each level as the one before leaves", "others")
