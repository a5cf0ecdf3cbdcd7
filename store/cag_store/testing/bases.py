"""A small basis of any geometry for tests of the codec `transform`, made from seeds."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cag_store.codecs.transform import Basis, GroupBasis, Rotation
from cag_store.codecs.transform.rans import TOTAL
from cag_store.codecs.transform.symbols import ESCAPE, NUM_SYMBOLS

NUM_TABLES = 12


def frequencies() -> NDArray[np.uint16]:
    """Bell-shaped tables; those of the quietest levels lack the farthest symbols."""
    distance = np.abs(np.arange(NUM_SYMBOLS) - NUM_SYMBOLS // 2)
    table = np.array([np.exp(-distance / 1.5 ** (index - 3)) for index in range(NUM_TABLES)])
    found = 1 + np.floor(table / table.sum(axis=1, keepdims=True) * (TOTAL - NUM_SYMBOLS)).astype(int)
    found[: NUM_TABLES // 2, distance > 20] = 0
    found[:, ESCAPE] = 1
    found[:, NUM_SYMBOLS // 2] += TOTAL - found.sum(axis=1)
    tables: NDArray[np.uint16] = found.astype(np.uint16)
    return tables


def sample_side(heads_dims: list[tuple[int, int]], seed: int, kept: int | None = None) -> GroupBasis:
    """Directions that are orthogonal, in units of 1 / 2047."""
    generator = np.random.default_rng(seed)
    num_channels = sum(heads * dim for heads, dim in heads_dims)
    kept = num_channels if kept is None else kept
    directions = np.linalg.qr(generator.normal(size=(num_channels, num_channels)))[0][:kept]
    shifts = np.where(np.arange(kept) < kept // 3, 0, 4).astype(np.uint8)
    mantissas = np.rint(2047 * directions / (1 << shifts.astype(int))[:, None]).astype(np.int16)
    wide = np.flatnonzero(np.abs(mantissas).max(axis=1) > 127)
    return GroupBasis(
        mean=generator.normal(size=num_channels).astype(np.float32),
        unit=np.full(num_channels, 1 / 2047, np.float32),
        log_deviation=np.sort(generator.integers(-64, 300, kept))[::-1].astype(np.int16),
        row_shifts=shifts,
        num_wide=int(wide[-1]) + 1 if wide.size else 0,
        mantissas=mantissas,
        metric_scale=np.ones(num_channels, np.float32),
        correlations=tuple(np.stack([127 * np.eye(dim, dtype=np.int8)] * heads) for heads, dim in heads_dims),
    )


def sample_basis(
    num_kv_heads: tuple[int, ...],
    head_dim: tuple[int, ...],
    joint_layers: int,
    seed: int = 0,
    kept: int | None = None,
    pairing: str = "halves",
    sides: int = 2,
) -> Basis:
    """A basis whose even layers are rotated and whose odd ones are not."""
    num_layers = len(head_dim)
    groups = []
    for first in range(0, num_layers, joint_layers):
        last = min(first + joint_layers, num_layers)
        shape = list(zip(num_kv_heads[first:last], head_dim[first:last], strict=True))
        groups.append(tuple(sample_side(shape, seed + 2 * first + side, kept) for side in range(sides)))
    pairs = min(head_dim) // 2
    rotation = Rotation(pairing, tuple(float(0.5**index) for index in range(pairs)))
    return Basis(
        joint_layers,
        num_kv_heads,
        head_dim,
        (rotation,),
        tuple(-(layer % 2) for layer in range(num_layers)),
        frequencies(),
        tuple(groups),
    )
