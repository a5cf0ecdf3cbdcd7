"""16-bit codes and rows as signed bytes, made once for several products of `inverse.inverse_transform` on a GPU.

Elsewhere there is nothing to make: the codes and rows themselves are what is multiplied.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cag_kernels.device import triton_runs_on
from cag_kernels.rans import CodeBlocks


class ByteCodes(NamedTuple):
    """Codes of some tokens, `256 high + low`, or `256 high + low + 128` in wide tiles (`triton_bytes`).

    low, high: int8 `[num_tokens, padded components]`; of a tile that is not wide `low` is the codes, `high` anything.
    sums: int32 `[num_tokens]`, of the codes, of those in wide tiles less 128 each.
    num_wide: int32 `[token blocks]`.
    wide: int32 `[token blocks, component blocks]`, each block's wide blocks of components, in any order.
    """

    low: Tensor
    high: Tensor
    sums: Tensor
    num_wide: Tensor
    wide: Tensor


class ByteRows(NamedTuple):
    """Rows, turned: each block of columns has the first channels of some pairs, then their second ones.

    low, high: int8 `[padded channels, padded components]`, 0 behind the last channel.
    sums: int32 `[component blocks, padded channels]`, of the rows of a block of components.
    num_channels: without those that pad them.
    pairs: half of the head_dim, pairs of a head that are turned, whether these are neighbours.
    """

    low: Tensor
    high: Tensor
    sums: Tensor
    num_channels: int
    pairs: tuple[int, int, bool]


def prepare_codes(codes: Tensor | CodeBlocks) -> Tensor | ByteCodes:
    """What `inverse_transform` takes for `codes`, int16 `[num_tokens, num_components]` of any strides, or blocks."""
    places = codes.places if isinstance(codes, CodeBlocks) else codes
    if not triton_runs_on(places.device):
        return codes.by_token() if isinstance(codes, CodeBlocks) else codes
    from cag_kernels.triton_bytes import split_blocks, split_codes

    return split_blocks(codes) if isinstance(codes, CodeBlocks) else split_codes(codes)


def prepare_rows(rows: Tensor, *, head_dim: int, num_pairs: int = 0, pairing: str = "halves") -> Tensor | ByteRows:
    """What `inverse_transform` takes for `rows`, int16 `[num_components, num_channels]`, where angles have `num_pairs`
    (0 without angles)."""
    if not triton_runs_on(rows.device):
        return rows
    from cag_kernels.triton_bytes import split_rows

    return split_rows(rows, (head_dim // 2, num_pairs, pairing == "adjacent"))
