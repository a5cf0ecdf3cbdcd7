"""One side of a group of layers at one step: the static part of coding a segment, computed once and shared by all
threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops as store_loops
from cag_store.codecs.transform import loops, rans, symbols
from cag_store.codecs.transform.basis import FULL_SHRINK, Basis, GroupBasis
from cag_store.codecs.transform.product import PANEL, ROWS, finish_reference, pack_rows, product_reference
from cag_store.dtypes import Array

Angles = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]] | None

_BLOCK_TOKENS = 32 * ROWS  # sums of these stay in a core's cache
_LEAST_METRIC = 1e-2
CENTER = np.float32(64)
_NO_PAIRS = np.empty((0, 2), np.int64)


@dataclass(frozen=True, eq=False)
class PreparedSide:
    """shapes: (num_kv_heads, head_dim) of each layer; scale: step * unit; rows: int16 [kept components,
    num_channels], shrunk."""

    layers: range
    shapes: tuple[tuple[int, int], ...]
    classes: NDArray[np.uint8]
    shifts: NDArray[np.uint8]
    tables: rans.Tables
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    rows: NDArray[np.int16]
    group: GroupBasis
    step: float

    def code_buffer(self, num_tokens: int) -> NDArray[np.int16]:
        """Zeros for the codes of `num_tokens` tokens, with the spare rows and column that the compiled product
        reads."""
        num_components = len(self.rows)
        return np.zeros((num_tokens + ROWS, num_components + num_components % 2), np.int16)

    def center_of(self, values: NDArray[np.float32], codes: NDArray[np.int16]) -> NDArray[np.int8]:
        """What the mean of `values` `[num_tokens, num_channels]` has beyond that of their codes, in units of
        `CENTER * scale`. An error that all tokens share does not average out in attention."""
        decoded = codes.astype(np.float32).mean(axis=0) @ self.rows.astype(np.float32)
        left = (values.mean(axis=0, dtype=np.float64) - self.mean) / self.scale - decoded
        center: NDArray[np.int8] = np.clip(np.rint(left / CENTER), -127, 127).astype(np.int8)
        return center

    def centered_mean(self, center: NDArray[np.int8]) -> NDArray[np.float32]:
        """The mean of a segment with this center, or with none."""
        if not center.size:
            return self.mean
        shift: NDArray[np.float32] = center.astype(np.float32) * CENTER * self.scale
        return self.mean + shift

    def decode(
        self,
        codes: NDArray[np.int16],
        first: int,
        last: int,
        mean: NDArray[np.float32],
        outs: Sequence[Array],
        angles: Sequence[Angles],
    ) -> None:
        """Rows [first, last) of `codes` (a `code_buffer`) into `outs`, one array a layer, with the angles of these
        tokens."""
        for begin in range(first, last, _BLOCK_TOKENS):
            end = min(begin + _BLOCK_TOKENS, last)
            sums = self._sums(codes, begin, end)
            span = slice(begin - first, end - first)
            channel = 0
            for out, angle in zip(outs, angles, strict=True):
                width = out.shape[0] * out.shape[2]
                channels = slice(channel, channel + width)
                turned = None if angle is None else (angle[0], angle[1][span], angle[2][span])
                _finish(sums[:, channels], self.scale[channels], mean[channels], turned, out[:, span])
                channel += width

    def _sums(self, codes: NDArray[np.int16], begin: int, end: int) -> NDArray[np.int32]:
        fast = loops.compiled()
        if fast is None:
            return product_reference(codes[begin:end, : len(self.rows)], self.rows)
        num_rows = -(-(end - begin) // ROWS) * ROWS
        sums = np.empty((num_rows, -(-len(self.mean) // PANEL) * PANEL), np.int32)
        fast.integer_product(codes[begin : begin + num_rows], self._packed_rows, sums)
        return sums[: end - begin]

    @cached_property
    def _packed_rows(self) -> NDArray[np.int16]:
        return pack_rows(self.rows)

    @cached_property
    def forward(self) -> NDArray[np.float32]:
        """float32 [num_channels, kept components]: `(values - mean) @ forward` are the codes before rounding.

        The nearest point, in the basis' metric, of the span of the components that are kept.
        """
        directions = self.group.rows[: len(self.rows)] * self.group.unit.astype(np.float64)
        weighted = directions @ self._metric
        gram = weighted @ directions.T
        solved = np.linalg.solve(gram, weighted)
        return np.ascontiguousarray((solved / self.step).T.astype(np.float32))

    @property
    def _metric(self) -> NDArray[np.float64]:
        metric = np.zeros((len(self.mean), len(self.mean)))
        first = 0
        for layer in self.group.correlations:
            for block in layer:
                span = slice(first, first + len(block))
                scale = self.group.metric_scale[span].astype(np.float64)
                found, vectors = np.linalg.eigh((block.astype(np.float64) + block.T) / 254)
                values = np.maximum(found, _LEAST_METRIC)
                metric[span, span] = (vectors * values @ vectors.T) * np.outer(scale, scale)
                first += len(block)
        return metric


def prepare_side(basis: Basis, index: int, side: int, step: int, tables: rans.Tables) -> PreparedSide:
    """Group `index` of a basis, keys (0) or values (1), at a step of `2 ** (step / 64)`."""
    group = basis.groups[index][side]
    first, last = basis.spans[index]
    classes = symbols.component_classes(group.log_deviation, step, len(basis.frequencies))
    shifts = np.array([symbols.class_shift(int(number)) for number in classes], np.uint8)
    shrunk = (group.rows[: len(classes)] * basis.shrink[classes][:, None].astype(np.int32) + FULL_SHRINK // 2) >> 15
    width = np.float32(2.0 ** (step / 64))
    return PreparedSide(
        range(first, last),
        tuple(zip(basis.num_kv_heads[first:last], basis.head_dim[first:last], strict=True)),
        classes,
        shifts,
        tables,
        group.mean.astype(np.float32),
        (group.unit * width).astype(np.float32),
        shrunk.astype(np.int16),
        group,
        float(width),
    )


def _finish(
    sums: NDArray[np.int32], scale: NDArray[np.float32], mean: NDArray[np.float32], angle: Angles, out: Array
) -> None:
    if angle is None:
        none = np.empty((len(sums), 0), np.float32)
        angle = (_NO_PAIRS, none, none)
    fast = None if out.dtype == np.float16 or store_loops.compiled_for(out) is None else loops.compiled()
    finish = finish_reference if fast is None else fast.finish
    finish(sums, scale, mean, angle[1], angle[2], angle[0], out)
