"""From samples and metrics to a basis: weighted principal components over a group of layers, as integers.

In: rows and metrics of each layer. Out: a `cag_store` basis. Knows neither models nor stores.
Source: PCA over layers as in KVTC (arXiv:2511.01815); here in the metric of the Fisher information.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cag.calibration.observe import LayerSamples
from cag_store.codecs.transform import Basis, GroupBasis, Rotation
from cag_store.codecs.transform import symbols as code
from cag_store.codecs.transform.basis import FULL_SHRINK
from cag_store.codecs.transform.rans import TOTAL, Tables
from cag_store.codecs.transform.shifts import chosen_shifts
from cag_store.codecs.transform.symbols import NUM_SYMBOLS

NUM_TABLES = 32
_VALUE_WEIGHT = 4.0  # errors of the values of like tokens add up in attention, which curvature a token does not see
_RIDGE = 0.05  # of a head's mean curvature, added to all of its directions
_ROW_MAGNITUDE = 2047
_ROW_ERROR = 0.15  # of a quantization error, at most, from rounding a row
_ROWS_FOR_TABLES = 4096
_SMOOTHING = 0.01
_LEAST_SHARE = 2e-5
_SEGMENT_TOKENS = 512
_ROUNDS = 3  # of choosing shifts and counting with them


class FittedSide(NamedTuple):
    """A side of a group, and its coefficients in units of a step of 1: `[num_rows, num_components]`."""

    group: GroupBasis
    coefficients: Tensor


def fit_basis(
    samples: Sequence[tuple[LayerSamples, LayerSamples]],
    rotations: tuple[Rotation, ...],
    layer_rotation: tuple[int, ...],
    joint_layers: int,
    least_step: int,
) -> Basis:
    """The basis for all steps from `2 ** (least_step / 64)` on."""
    groups, counts = [], _Counts()
    for first in range(0, len(samples), joint_layers):
        layers = samples[first : first + joint_layers]
        sides = [_fit_side([pair[side] for pair in layers], least_step) for side in (0, 1)]
        for side in sides:
            for step in range(least_step, least_step + 4 * 64, 64):
                counts.add(side, step)
        groups.append((sides[0].group, sides[1].group))
    return Basis(
        joint_layers,
        tuple(keys.num_kv_heads for keys, _ in samples),
        tuple(keys.head_dim for keys, _ in samples),
        rotations,
        layer_rotation,
        counts.frequencies(),
        counts.shrink(),
        tuple(groups),
    )


def _fit_side(layers: Sequence[LayerSamples], least_step: int) -> FittedSide:
    rows = torch.cat([torch.cat(layer.rows).float() for layer in layers], dim=1)
    mean = rows.mean(0)
    centered = rows - mean
    root, inverse = _roots([block for layer in layers for block in _metric_blocks(layer)])
    weighted = centered @ root
    variances, vectors = torch.linalg.eigh((weighted.T @ weighted / len(rows)).double())
    vectors = vectors.flip(1).float()
    deviation = variances.flip(0).clamp_min(1e-30).sqrt()
    log_deviation = torch.floor(64 * torch.log2(deviation)).clamp(-4096, 4096).short().numpy()
    kept = len(code.component_levels(log_deviation, least_step))
    directions = (vectors.T @ inverse)[:kept]
    group = _integers(directions, deviation[:kept] / 2.0 ** (least_step / 64), mean, log_deviation[:kept], layers)
    return FittedSide(group, (weighted[:_ROWS_FOR_TABLES] @ vectors[:, :kept]))


def _metric_blocks(layer: LayerSamples) -> list[Tensor]:
    """Each head's metric, with a ridge: the curvature itself for keys; for values the layer's mean curvature, spread
    over
    heads and directions as the output projection reads them."""
    found = layer.metric / max(layer.num_gradients, 1)
    if layer.reading is not None:
        mean = found.diagonal(dim1=1, dim2=2).mean()
        found = layer.reading * (_VALUE_WEIGHT * mean / layer.reading.diagonal(dim1=1, dim2=2).mean())
    level = found.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(layer.head_dim, dtype=torch.float64)
    return [block + _RIDGE * size * eye for block, size in zip(found, level, strict=True)]


def _roots(blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Symmetric root of a block-diagonal metric, and its inverse; float32."""
    roots, inverses = [], []
    for block in blocks:
        values, vectors = torch.linalg.eigh(block)
        values = values.clamp_min(float(values.max()) * 1e-9).sqrt()
        roots.append((vectors * values @ vectors.T).float())
        inverses.append((vectors / values @ vectors.T).float())
    return _block_diagonal(roots), _block_diagonal(inverses)


def _block_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    joined: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return joined


def _integers(
    directions: Tensor,
    ratio: Tensor,
    mean: Tensor,
    log_deviation: NDArray[np.int16],
    layers: Sequence[LayerSamples],
) -> GroupBasis:
    """Rows as integers, each no finer than its component's codes deserve. ratio: deviation over the least step."""
    values = directions.double().numpy()
    largest = np.abs(values).max(axis=0, initial=0.0)
    unit = (np.where(largest > 0, largest, 1.0) / _ROW_MAGNITUDE).astype(np.float32)
    scaled = values / unit.astype(np.float64)
    level = np.sqrt(np.mean(scaled**2)) if scaled.size else 1.0
    finest = np.floor(np.log2(np.maximum(level * _ROW_ERROR / np.maximum(ratio.numpy(), 0.25), 1)))
    shifts = np.clip(finest, 0, 7).astype(np.uint8)
    mantissas = np.rint(scaled / (1 << shifts.astype(np.int64))[:, None]).astype(np.int16)
    wide = np.flatnonzero(np.abs(mantissas).max(axis=1, initial=0) > 127)
    metric_scale, correlations = _stored_metric(layers)
    return GroupBasis(
        mean.numpy(),
        unit,
        log_deviation,
        shifts,
        int(wide[-1]) + 1 if wide.size else 0,
        mantissas,
        metric_scale,
        correlations,
    )


def _stored_metric(layers: Sequence[LayerSamples]) -> tuple[NDArray[np.float32], tuple[NDArray[np.int8], ...]]:
    scales, correlations = [], []
    for layer in layers:
        blocks = torch.stack(_metric_blocks(layer))
        scale = blocks.diagonal(dim1=1, dim2=2).sqrt()
        scales.append(scale.flatten().float().numpy())
        correlations.append(torch.round(127 * blocks / (scale[:, :, None] * scale[:, None])).to(torch.int8).numpy())
    return np.concatenate(scales), tuple(correlations)


class _Counts:
    """How often each symbol occurs with each table, and how far from its code the middle of what is rounded to it
    lies.

    Which table a code is written with depends on the shifts of its segment, and those on the tables: counted first
    without shifts, then with those that the tables so far make cheapest.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((NUM_TABLES, NUM_SYMBOLS))
        self.product = np.zeros(NUM_TABLES)
        self.square = np.zeros(NUM_TABLES)
        self._coded: list[tuple[NDArray[np.uint8], NDArray[np.int32]]] = []

    def add(self, side: FittedSide, step: int) -> None:
        """Count the coefficients of a side at a step."""
        levels = code.component_levels(side.group.log_deviation, step)
        low, numbers = code.low_bits(levels), code.table_numbers(levels, NUM_TABLES)
        values = side.coefficients[:, : len(levels)].numpy() / np.float32(2.0 ** (step / 64))
        codes = np.clip(np.rint(values), -code.MAX_CODE, code.MAX_CODE)
        for number in np.unique(numbers):
            columns = numbers == number
            self.product[number] += float((values[:, columns] * codes[:, columns]).sum(dtype=np.float64))
            self.square[number] += float((codes[:, columns] ** 2).sum(dtype=np.float64))
        kinds = code.symbols_of(codes.astype(np.int16), low)
        for first in range(0, len(kinds), _SEGMENT_TOKENS):
            self._coded.append((np.ascontiguousarray(kinds[first : first + _SEGMENT_TOKENS]), numbers))

    def frequencies(self) -> NDArray[np.uint16]:
        """Of the tables that the codes agree with."""
        self._count(None)
        for _ in range(_ROUNDS):
            self._count(Tables.of(self._frequencies()))
        return self._frequencies()

    def _count(self, tables: Tables | None) -> None:
        self.counts[:] = 0
        for kinds, numbers in self._coded:
            used = np.broadcast_to(numbers, kinds.shape)
            if tables is not None:
                by_component, by_token = chosen_shifts(kinds, numbers, tables)
                used = np.clip(numbers + by_component + by_token[:, None].astype(np.int32), 0, NUM_TABLES - 1)
            places = (used * NUM_SYMBOLS + kinds).ravel()
            self.counts += np.bincount(places, minlength=self.counts.size).reshape(self.counts.shape)

    def _frequencies(self) -> NDArray[np.uint16]:
        """Counts, mirrored and smoothed, as frequencies that sum to TOTAL. Symbols too far out for a table are left to
        escapes."""
        counts = self.counts.copy()
        counts[:, 1:] += counts[:, :0:-1]
        distance = np.abs(np.arange(NUM_SYMBOLS) - code.MIDDLE)
        spread = 2.0 ** (np.arange(NUM_TABLES) / code.LEVELS_PER_OCTAVE - code.OCTAVES_BELOW)
        model = np.exp(-distance / np.maximum(0.8 * spread, 0.25)[:, None])
        model /= model.sum(axis=1, keepdims=True)
        seen = counts.sum(axis=1, keepdims=True)
        shares = counts + model * (_SMOOTHING * seen + 50)
        shares /= shares.sum(axis=1, keepdims=True)
        found = np.floor(shares * (TOTAL - NUM_SYMBOLS)).astype(np.int64)
        found[(found == 0) & (model > _LEAST_SHARE)] = 1
        found[:, code.ESCAPE] = np.maximum(found[:, code.ESCAPE], 1)
        found[:, code.MIDDLE] += TOTAL - found.sum(axis=1)
        tables: NDArray[np.uint16] = found.astype(np.uint16)
        return tables

    def shrink(self) -> NDArray[np.uint16]:
        """What a code is multiplied by when it is decoded, in units of 2**-15."""
        ratio = np.divide(self.product, self.square, out=np.ones(NUM_TABLES), where=self.square > 50)
        factors: NDArray[np.uint16] = np.rint(np.clip(ratio, 0.6, 1.0) * FULL_SHRINK).astype(np.uint16)
        return factors
