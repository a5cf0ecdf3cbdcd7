"""A basis at one step: the static part of coding a segment, computed once and shared by all threads.

Nothing here refers to a codec, so it goes as soon as the last codec does that uses it: it may be larger than a cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs import loops as store_loops
from cag_store.codecs.transform import loops, rans, symbols
from cag_store.codecs.transform.basis import Basis, GroupBasis, Rotation
from cag_store.codecs.transform.product import code_buffer, finish_reference, product_reference
from cag_store.codecs.transform.solving import solve_positive
from cag_store.dtypes import Array
from cag_store.scratch import Scratch, mapped_array

Angles = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]] | None

_LEAST_METRIC = 1e-2
CENTER = np.float32(64)
_NO_PAIRS = np.empty((0, 2), np.int64)
_one_at_a_time = threading.Lock()
_rows_once = threading.Lock()


@dataclass(frozen=True, eq=False)
class PreparedSide:
    """shapes: (num_kv_heads, head_dim) of each layer; table_numbers, low: int32 and uint8 [kept components]
    (`rans.Layout`); scale: step * unit."""

    layers: range
    shapes: tuple[tuple[int, int], ...]
    table_numbers: NDArray[np.int32]
    low: NDArray[np.uint8]
    tables: rans.Tables
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    group: GroupBasis
    step: float

    @property
    def num_components(self) -> int:
        """Components that are coded."""
        return len(self.low)

    @property
    def rows(self) -> NDArray[np.int16]:
        """`[kept components, num_channels]`; made when they are first asked for, by one thread: whoever decodes on a
        device makes them there."""
        with _rows_once:
            return self._rows

    @cached_property
    def _rows(self) -> NDArray[np.int16]:
        mantissas = self.group.mantissas[: self.num_components]
        shifts = self.group.row_shifts[: len(mantissas), None].astype(np.int16)
        rows: NDArray[np.int16] = mapped_array(mantissas.shape, np.int16)
        return np.left_shift(mantissas, shifts, out=rows)

    @cached_property
    def spans(self) -> list[slice]:
        """The channels of each layer."""
        ends = np.cumsum([heads * dim for heads, dim in self.shapes]).tolist()
        return [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]

    def code_buffer(self, num_tokens: int) -> NDArray[np.int16]:
        """Zeros for the codes of `num_tokens` tokens; see `product.code_buffer`."""
        return code_buffer(num_tokens, self.num_components)

    def center_of(self, values: NDArray[np.float32], codes: NDArray[np.int16]) -> NDArray[np.int8]:
        """What the mean of `values` `[num_tokens, num_channels]` has beyond that of their codes, in units of
        `CENTER * scale`. An error that all tokens share does not average out in attention."""
        mean_code = codes.mean(axis=0, dtype=np.float32)
        decoded = np.concatenate([mean_code @ self.rows[:, span].astype(np.float32) for span in self.spans])
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
        runs: Sequence[tuple[int, int, int]],
        mean: NDArray[np.float32],
        outs: Sequence[Array],
        angles: Sequence[Angles],
    ) -> None:
        """Rows of `codes` (a `code_buffer`) into `outs`, one array a layer, with the angles of all tokens: for each run
        (first, last, token) rows [first, last) into the tokens from `token` on."""
        num_coded = runs[-1][1] if runs else 0
        fast = loops.compiled()
        operand = fast and fast.Operand(codes, num_coded, self.num_components)
        for number, (out, angle, span) in enumerate(zip(outs, angles, self.spans, strict=True)):
            if fast is None:
                sums = product_reference(codes[:num_coded, : self.num_components], self.rows[:, span])
            else:
                sums = fast.integer_product(operand, self._packed[number])
            for first, last, token in runs:
                tokens = slice(token, token + last - first)
                turned = None if angle is None else (angle[0], angle[1][tokens], angle[2][tokens])
                _finish(sums[first:last], self.scale[span], mean[span], turned, out[:, tokens])

    @cached_property
    def _packed(self) -> list[Any]:
        """The rows of each layer as the compiled product reads them."""
        fast = loops.compiled()
        assert fast is not None
        return [fast.PackedRows(self.rows[:, span]) for span in self.spans]

    @cached_property
    def forward(self) -> NDArray[np.float32]:
        """float32 [num_channels, kept components]: `(values - mean) @ forward` are the codes before rounding.

        The nearest point, in the basis' metric, of the span of the components that are kept. Computed for one side at a
        time, as it takes twice the memory of its result.
        """
        with _one_at_a_time:
            gram, weighted = self._normal_equations()
            try:
                solve_positive(gram, weighted)
            except np.linalg.LinAlgError:  # components nearly depend on each other
                gram, weighted = self._normal_equations()
                weighted = np.linalg.solve(gram.astype(np.float64), weighted.astype(np.float64)).astype(np.float32)
            del gram
            weighted /= np.float32(self.step)
            forward = mapped_array(weighted.shape[::-1], np.float32)
            np.copyto(forward, weighted.T)
            return forward

    def _normal_equations(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """The components' products in the metric, and the components times the metric."""
        directions, weighted = (mapped_array(self.rows.shape, np.float32) for _ in range(2))
        np.multiply(self.rows, self.group.unit, out=directions)
        for span, block in self._metric_blocks():
            weighted[:, span] = directions[:, span] @ block
        gram = mapped_array((len(directions), len(directions)), np.float32)
        return np.matmul(weighted, directions.T, out=gram), weighted

    def _metric_blocks(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The metric of each head, and its channels."""
        first = 0
        for block in (block for layer in self.group.correlations for block in layer):
            span = slice(first, first + len(block))
            scale = self.group.metric_scale[span].astype(np.float64)
            found, vectors = np.linalg.eigh((block.astype(np.float64) + block.T) / 254)
            values = np.maximum(found, _LEAST_METRIC)
            yield span, ((vectors * values @ vectors.T) * np.outer(scale, scale)).astype(np.float32)
            first += len(block)


class PreparedBasis:
    """A basis at a step of `2 ** (step / 64)`."""

    def __init__(self, basis: Basis, step: int) -> None:
        self._basis = basis
        self._step = step
        self._tables = rans.Tables.of(basis.frequencies)
        self._sides: dict[tuple[int, int], PreparedSide] = {}
        self._guard = threading.Lock()
        self.scratch = Scratch()  # of who encodes
        self._turned = lru_cache(maxsize=64)(partial(_turned, basis.rotations))

    @property
    def num_groups(self) -> int:
        """Groups of layers."""
        return len(self._basis.groups)

    @property
    def num_sides(self) -> int:
        """Of each group."""
        return len(self._basis.groups[0])

    def side(self, index: int, side: int) -> PreparedSide:
        """Group `index`, keys (0) or values (1)."""
        with self._guard:
            if (index, side) not in self._sides:
                self._sides[index, side] = prepare_side(self._basis, index, side, self._step, self._tables)
            return self._sides[index, side]

    def rotation(self, layer: int) -> Rotation | None:
        """What turns a layer's keys; None where nothing does."""
        index = self._basis.layer_rotation[layer]
        return self._basis.rotations[index] if index >= 0 else None

    def angles(self, layer: int, start: int, num_tokens: int) -> Angles:
        """By what positions turn a layer's keys; None where they do not."""
        index = self._basis.layer_rotation[layer]
        return self._turned(index, start, num_tokens) if index >= 0 else None


def _turned(rotations: Sequence[Rotation], index: int, start: int, num_tokens: int) -> Angles:
    return (rotations[index].pairs, *rotations[index].angles(start, num_tokens))


def prepare_side(basis: Basis, index: int, side: int, step: int, tables: rans.Tables) -> PreparedSide:
    """Group `index` of a basis, keys (0) or values (1), at a step of `2 ** (step / 64)`."""
    group = basis.groups[index][side]
    first, last = basis.spans[index]
    levels = symbols.component_levels(group.log_deviation, step)
    numbers = symbols.table_numbers(levels, len(basis.frequencies))
    width = np.float32(2.0 ** (step / 64))
    return PreparedSide(
        range(first, last),
        tuple(zip(basis.num_kv_heads[first:last], basis.head_dim[first:last], strict=True)),
        numbers,
        symbols.low_bits(levels),
        tables,
        group.mean.astype(np.float32),
        (group.unit * width).astype(np.float32),
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
