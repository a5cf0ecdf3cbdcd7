"""From codes back to keys and values: an exact integer product, then one float32 scale and mean, rotation and rounding
(docs/format.md 5.4).

The product is defined modulo 2**32, so it has the same bits in whatever order it is summed. Here in numpy, as the
reference of the compiled loops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cag_store.dtypes import Array, narrow_into

PANEL = 64
ROWS = 6
TILE = 16
DIGIT_STEP = 64  # components of a tile


def code_buffer(num_tokens: int, num_components: int) -> NDArray[np.int16]:
    """Zeros for codes `[:num_tokens, :num_components]`, with the spare rows and columns that the compiled loops use."""
    return np.zeros((num_tokens + ROWS, -(-num_components // DIGIT_STEP) * DIGIT_STEP), np.int16)


def product_reference(codes: NDArray[np.int16], rows: NDArray[np.int16]) -> NDArray[np.int32]:
    """`codes @ rows` modulo 2**32: `[num_tokens, num_channels]`. float64 holds each sum exactly."""
    sums = codes.astype(np.float64) @ rows.astype(np.float64)
    return sums.astype(np.int64).astype(np.int32)


def pack_rows(rows: NDArray[np.int16]) -> NDArray[np.int16]:
    """Rows as the compiled product reads them: `[panels of PANEL channels, pairs of components, PANEL, 2]`, padded
    by zeros."""
    num_components, num_channels = rows.shape
    pairs, panels = -(-num_components // 2), -(-num_channels // PANEL)
    padded = np.zeros((pairs * 2, panels * PANEL), np.int16)
    padded[:num_components, :num_channels] = rows
    return np.ascontiguousarray(padded.reshape(pairs, 2, panels, PANEL).transpose(2, 0, 3, 1))


def pack_digits(rows: NDArray[np.int16]) -> NDArray[np.int8] | None:
    """Rows as `256 * high + low`, each of 8 bits with sign: `[blocks of TILE channels, steps of DIGIT_STEP components,
    2, DIGIT_STEP / 4, 4 * TILE]`, high digits first, padded by zeros. None where a high digit has more bits."""
    num_components, num_channels = rows.shape
    shape = -(-num_components // DIGIT_STEP) * DIGIT_STEP, -(-num_channels // TILE) * TILE
    padded = np.zeros(shape, np.int32)
    padded[:num_components, :num_channels] = rows
    low = padded.astype(np.int8)
    high = (padded - low) >> 8
    if np.any(high > np.iinfo(np.int8).max):
        return None
    digits = np.stack([high.astype(np.int8), low])
    tiles = digits.reshape(2, -1, DIGIT_STEP // 4, 4, shape[1] // TILE, TILE).transpose(4, 1, 0, 2, 5, 3)
    return np.ascontiguousarray(tiles).reshape(*tiles.shape[:4], 4 * TILE)


def finish_reference(
    sums: NDArray[np.int32],
    scale: NDArray[np.float32],
    mean: NDArray[np.float32],
    cosines: NDArray[np.float32],
    sines: NDArray[np.float32],
    pairs: Sequence[tuple[int, int]] | NDArray[np.int64],
    out: Array,
) -> None:
    """One layer of `sums`, `[num_tokens, num_kv_heads * head_dim]`, into `out` `[num_kv_heads, num_tokens, head_dim]`.

    cosines, sines: `[num_tokens, len(pairs)]`; pairs: the two channels of a head that one angle turns, none for values.
    """
    values = sums.astype(np.float32)
    values *= scale
    values += mean
    heads = values.reshape(len(values), out.shape[0], out.shape[2]).transpose(1, 0, 2)
    if len(pairs):
        heads = rotated(heads, cosines, sines, np.asarray(pairs))
    narrow_into(np.ascontiguousarray(heads), out)


def rotated(
    heads: NDArray[np.float32], cosines: NDArray[np.float32], sines: NDArray[np.float32], pairs: NDArray[np.int64]
) -> NDArray[np.float32]:
    """`[num_kv_heads, num_tokens, head_dim]` with each pair of channels turned by its angle; two products and one
    sum, each rounded."""
    first, second = heads[..., pairs[:, 0]], heads[..., pairs[:, 1]]
    turned = heads.copy()
    turned[..., pairs[:, 0]] = first * cosines - second * sines
    turned[..., pairs[:, 1]] = second * cosines + first * sines
    return turned
