"""The basis of the codec `transform`: everything static, as one immutable binary object (docs/format.md 5.4).

In: means, integer bases, metrics, rotations, frequency tables. Out: bytes, and back, with every size, number and
table checked. Knows neither
segments nor blobs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.base import MAX_JOINT_LAYERS, layer_groups
from cag_store.codecs.transform.rans import TOTAL
from cag_store.codecs.transform.symbols import ESCAPE, NUM_SYMBOLS
from cag_store.errors import CorruptEntry
from cag_store.jsontext import Fields, canonical_bytes, parse_object
from cag_store.scratch import mapped_array

MAGIC = b"cag-transform-basis 1\n"
MAX_TABLES = 64
MAX_LAYERS = 999
MAX_CHANNELS = 1 << 16
MAX_DEVIATION = 1 << 13
MAX_ROW = (1 << 15) - 1

_PAIRINGS = ("halves", "adjacent")
_LENGTH_BYTES = 4


@dataclass(frozen=True)
class Rotation:
    """Which channels of a head a position turns, and how fast: `inverse_frequencies` in radians a token, one a pair.

    pairing: "halves" turns channel `i` with `i + num_pairs`, "adjacent" `2 i` with `2 i + 1`.
    """

    pairing: str
    inverse_frequencies: tuple[float, ...]

    @property
    def pairs(self) -> NDArray[np.int64]:
        """`[num_pairs, 2]`: the channels of each pair."""
        index = np.arange(len(self.inverse_frequencies), dtype=np.int64)
        if self.pairing == "halves":
            return np.stack([index, index + len(index)], axis=1)
        return np.stack([2 * index, 2 * index + 1], axis=1)

    def angles(self, start: int, num_tokens: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Cosines and sines `[num_tokens, num_pairs]` of positions from `start` on, computed in float64."""
        positions = np.arange(start, start + num_tokens, dtype=np.float64)
        turned = positions[:, None] * np.asarray(self.inverse_frequencies, np.float64)
        return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


@dataclass(frozen=True, eq=False)
class GroupBasis:
    """One side of a group of layers: `num_components` directions in the `num_channels` channels of all its heads.

    mean, unit: float32 [num_channels]; decoded values are `mean + step * unit * (codes @ rows)`.
    log_deviation: int16 [num_components], falling: log2 of each component's standard deviation, in 64ths.
    mantissas: int16 [num_components, num_channels]; row_shifts: uint8 [num_components]; `rows` = mantissas <<
    row_shifts.
    num_wide: the first rows, whose mantissas need 16 bits; those of all others have 8.
    metric_scale: float32 [num_channels]; correlations: int8 [num_channels, head_dim], each row of a head's metric in
    127ths: only an
    encoder needs them.
    """

    mean: NDArray[np.float32]
    unit: NDArray[np.float32]
    log_deviation: NDArray[np.int16]
    row_shifts: NDArray[np.uint8]
    num_wide: int
    mantissas: NDArray[np.int16]
    metric_scale: NDArray[np.float32]
    correlations: tuple[NDArray[np.int8], ...]

    @property
    def num_channels(self) -> int:
        """Channels of all heads of all layers."""
        return len(self.mean)

    @property
    def rows(self) -> NDArray[np.int32]:
        """The integer directions."""
        return self.mantissas.astype(np.int32) << self.row_shifts[:, None].astype(np.int32)


@dataclass(frozen=True, eq=False)
class Basis:
    """A whole basis. `groups[g]` holds keys and values, or keys alone where these are the values, too;
    `rotations[layer_rotation[layer]]` is taken off the keys of
    a layer, nothing for -1.

    frequencies: uint16 [num_tables, NUM_SYMBOLS].
    """

    joint_layers: int
    num_kv_heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    rotations: tuple[Rotation, ...]
    layer_rotation: tuple[int, ...]
    frequencies: NDArray[np.uint16]
    groups: tuple[tuple[GroupBasis, ...], ...]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Layers [first, last) of each group."""
        return layer_groups(len(self.head_dim), self.joint_layers)

    def to_bytes(self) -> bytes:
        """The object that is stored."""
        header = {
            "head_dim": list(self.head_dim),
            "joint_layers": self.joint_layers,
            "layer_rotation": list(self.layer_rotation),
            "num_tables": len(self.frequencies),
            "num_components": [[len(side.log_deviation) for side in group] for group in self.groups],
            "num_kv_heads": list(self.num_kv_heads),
            "num_wide": [[side.num_wide for side in group] for group in self.groups],
            "rotations": [
                {"inverse_frequencies": list(r.inverse_frequencies), "pairing": r.pairing} for r in self.rotations
            ],
        }
        text = canonical_bytes(header)
        parts = [MAGIC, len(text).to_bytes(_LENGTH_BYTES, "little"), text, _bytes(self.frequencies, "<u2")]
        for group in self.groups:
            for side in group:
                parts += _side_parts(side)
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "basis") -> Basis:
        """Raises: CorruptEntry."""
        start = len(MAGIC) + _LENGTH_BYTES
        if not data.startswith(MAGIC) or len(data) < start:
            raise CorruptEntry(f"{where} is not a basis of version 1", where=where, expected=MAGIC)
        end = start + int.from_bytes(data[len(MAGIC) : start], "little")
        fields = Fields(parse_object(data[start:end], where), where)
        return _Reader(data, end, where, fields).basis()


def _bytes(array: NDArray[Any], kind: str) -> bytes:
    return np.ascontiguousarray(array, dtype=kind).tobytes()


def _side_parts(side: GroupBasis) -> list[bytes]:
    return [
        _bytes(side.mean, "<f4"),
        _bytes(side.unit, "<f4"),
        _bytes(side.log_deviation, "<i2"),
        _bytes(side.row_shifts, "u1"),
        _bytes(side.mantissas[: side.num_wide], "<i2"),
        _bytes(side.mantissas[side.num_wide :], "i1"),
        _bytes(side.metric_scale, "<f4"),
        *(_bytes(block, "i1") for block in side.correlations),
    ]


class _Reader:
    """Reads the arrays behind a header, each checked before it is used."""

    def __init__(self, data: bytes, offset: int, where: str, fields: Fields) -> None:
        self._data, self._offset, self._where, self._fields = data, offset, where, fields

    def basis(self) -> Basis:
        fields = self._fields
        joint = fields.integer("joint_layers", 1, MAX_JOINT_LAYERS)
        heads, dims = fields.integers("num_kv_heads", 1, 1 << 16), fields.integers("head_dim", 1, 1 << 16)
        rotation_of = fields.integers("layer_rotation", -1, MAX_LAYERS)
        if not 1 <= len(heads) == len(dims) == len(rotation_of) <= MAX_LAYERS:
            raise fields.wrong("head_dim", f"{len(heads)} layers, at most {MAX_LAYERS}", len(dims))
        rotations = tuple(self._rotation(value) for value in fields.list("rotations"))
        for layer, index in enumerate(rotation_of):
            pairs = 2 * len(rotations[index].inverse_frequencies) if 0 <= index < len(rotations) else 0
            if index >= len(rotations) or pairs > dims[layer]:
                raise fields.wrong("layer_rotation", "a rotation that fits the layer", index)
        num_tables = fields.integer("num_tables", 1, MAX_TABLES)
        spans = layer_groups(len(dims), joint)
        counts, wide = self._by_sides("num_components", len(spans)), self._by_sides("num_wide", len(spans))
        if len({len(row) for row in (*counts, *wide)}) != 1:
            raise fields.wrong("num_wide", "as many sides in all groups", wide)
        fields.done()
        frequencies = self._take("<u2", num_tables, NUM_SYMBOLS)
        sums = frequencies.sum(axis=1, dtype=np.int64)
        if np.any(sums != TOTAL) or np.any(frequencies >= TOTAL) or np.any(frequencies[:, ESCAPE] == 0):
            raise self._wrong("frequencies", f"rows that sum to {TOTAL}, each below it, with one for escapes")
        groups = []
        for (first, last), sizes, widths in zip(spans, counts, wide, strict=True):
            shape = [(h, d) for h, d in zip(heads[first:last], dims[first:last], strict=True)]
            groups.append(tuple(self._side(shape, *side) for side in zip(sizes, widths, strict=True)))
        if self._offset != len(self._data):
            raise self._wrong("length", f"{self._offset} bytes")
        return Basis(joint, heads, dims, rotations, rotation_of, frequencies, tuple(groups))

    def _side(self, shape: list[tuple[int, int]], num_components: int, num_wide: int) -> GroupBasis:
        num_channels = sum(heads * dim for heads, dim in shape)
        if num_channels > MAX_CHANNELS or not 0 <= num_wide <= num_components <= num_channels:
            raise self._wrong("num_components", f"at most {num_channels} of at most {MAX_CHANNELS} channels")
        mean, unit = self._take("<f4", num_channels), self._take("<f4", num_channels)
        deviation = self._take("<i2", num_components)
        shifts = self._take("u1", num_components)
        wide = self._take("<i2", num_wide, num_channels)
        narrow = self._take("i1", num_components - num_wide, num_channels)
        scale = self._take("<f4", num_channels)
        correlations = tuple(self._take("i1", heads, dim, dim) for heads, dim in shape)
        mantissas = mapped_array((num_components, num_channels), np.int16)
        np.concatenate([wide, narrow], out=mantissas)
        if not all(np.all(np.isfinite(array)) for array in (mean, unit, scale)):
            raise self._wrong("numbers", "finite ones")
        if np.any(np.diff(deviation.astype(np.int32)) > 0) or np.any(
            np.abs(deviation.astype(np.int32)) > MAX_DEVIATION
        ):
            raise self._wrong("deviations", f"falling ones of magnitude up to {MAX_DEVIATION}")
        if np.any(shifts > 15) or np.any(
            np.abs(mantissas.astype(np.int32)) << shifts[:, None].astype(np.int32) > MAX_ROW
        ):
            raise self._wrong("rows", f"magnitudes up to {MAX_ROW}")
        return GroupBasis(mean, unit, deviation, shifts, num_wide, mantissas, scale, correlations)

    def _rotation(self, value: object) -> Rotation:
        fields = Fields(value, f"{self._where}: rotations")
        pairing, found = fields.text("pairing"), fields.list("inverse_frequencies")
        fields.done()
        if pairing not in _PAIRINGS:
            raise fields.wrong("pairing", " or ".join(_PAIRINGS), pairing)
        if not all(type(number) is float and math.isfinite(number) and abs(number) <= 8 for number in found):
            raise fields.wrong("inverse_frequencies", "numbers with a decimal point, of magnitude up to 8", found)
        return Rotation(pairing, tuple(float(number) for number in found))

    def _by_sides(self, key: str, count: int) -> list[tuple[int, ...]]:
        rows = self._fields.list(key)
        good = len(rows) == count and all(
            isinstance(row, list) and len(row) in (1, 2) and all(type(n) is int and 0 <= n <= MAX_CHANNELS for n in row)
            for row in rows
        )
        if not good:
            raise self._fields.wrong(key, f"{count} rows of counts, one a side", rows)
        return [tuple(row) for row in rows]

    def _take(self, kind: str, *shape: int) -> NDArray[Any]:
        size = math.prod(shape) * np.dtype(kind).itemsize
        if self._offset + size > len(self._data):
            raise self._wrong("length", f"{self._offset + size} bytes at least")
        array = np.frombuffer(self._data, kind, math.prod(shape), self._offset).reshape(shape)
        self._offset += size
        return array.copy()  # so that the bytes need not be kept

    def _wrong(self, what: str, expected: object) -> CorruptEntry:
        return CorruptEntry(f"{self._where}: {what}: expected {expected}", where=self._where, expected=expected)
