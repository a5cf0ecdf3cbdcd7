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

from cag.calibration.counting import Counts
from cag.calibration.observe import GroupSamples, LayerSamples
from cag_store.codecs.transform import Basis, GroupBasis, Rotation
from cag_store.codecs.transform import symbols as code

_VALUE_WEIGHT = 2.0  # errors of the values of like tokens add up in attention, which curvature a token does not see
_RIDGE = 0.05  # of a head's mean curvature, added to all of its directions
_ROW_MAGNITUDE = 2047
_ROW_ERROR = 0.15  # of a quantization error, at most, from rounding a row
_ROWS_FOR_TABLES = 4096


class FittedSide(NamedTuple):
    """A side of a group, and coefficients of sample rows in units of a step of 1: `[num_rows, num_components]`."""

    group: GroupBasis
    coefficients: NDArray[np.float32]


def fit_basis(
    samples: Sequence[tuple[GroupSamples, ...]],
    rotations: tuple[Rotation, ...],
    layer_rotation: tuple[int, ...],
    joint_layers: int,
    least_step: int,
) -> Basis:
    """The basis for all steps from `2 ** (least_step / 64)` on."""
    groups, counts = [], Counts()
    for group in samples:
        sides = [_fit_side(side, least_step) for side in group]
        for side in sides:
            for step in range(least_step, least_step + 4 * 64, 64):
                counts.add(side.group.log_deviation, side.coefficients, step)
        groups.append(tuple(side.group for side in sides))
    layers = [layer for keys, *_ in samples for layer in keys.layers]
    return Basis(
        joint_layers,
        tuple(layer.num_kv_heads for layer in layers),
        tuple(layer.head_dim for layer in layers),
        rotations,
        layer_rotation,
        counts.frequencies(),
        tuple(groups),
    )


def _fit_side(samples: GroupSamples, least_step: int) -> FittedSide:
    metric = [block for layer in samples.layers for block in _metric_blocks(layer)]
    roots = [_root(block) for block in metric]
    weighted = _by_blocks(samples.covariance, [root for root, _ in roots])
    variances, vectors = torch.linalg.eigh(_by_blocks(weighted.T.contiguous(), [root for root, _ in roots]))
    vectors = vectors.flip(1)
    deviation = variances.flip(0).double().clamp_min(1e-30).sqrt()
    log_deviation = torch.floor(64 * torch.log2(deviation)).clamp(-4096, 4096).short().numpy()
    kept = len(code.component_levels(log_deviation, least_step))
    directions = _by_blocks(vectors.T.contiguous(), [inverse for _, inverse in roots])[:kept]
    ratio = deviation[:kept] / 2.0 ** (least_step / 64)
    group = _integers(directions, ratio, samples.mean, log_deviation[:kept], samples.layers)
    rows = torch.cat(samples.rows)[:: -(-sum(map(len, samples.rows)) // _ROWS_FOR_TABLES)].float() - samples.mean
    forward = _by_blocks(rows, [root for root, _ in roots]) @ vectors[:, :kept]
    return FittedSide(group, forward.numpy())


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


def _root(block: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric root of a head's metric, and its inverse; float32."""
    values, vectors = torch.linalg.eigh(block)
    values = values.clamp_min(float(values.max()) * 1e-9).sqrt()
    return (vectors * values @ vectors.T).float(), (vectors / values @ vectors.T).float()


def _by_blocks(rows: Tensor, blocks: Sequence[Tensor]) -> Tensor:
    """`rows` times the block-diagonal matrix of `blocks`."""
    parts = torch.split(rows, [len(block) for block in blocks], dim=1)
    return torch.cat([part @ block for part, block in zip(parts, blocks, strict=True)], dim=1)


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
