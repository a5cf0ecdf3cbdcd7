"""16-bit integers as signed bytes, for products of matrices of bytes: what `triton.inverse` multiplies.

No processor multiplies matrices of 16-bit integers. `number = 256 upper + lower + 128` of two signed bytes always
holds; codes that are signed bytes themselves need no upper one, and nearly all of them are: only tiles of codes that
have others are wide, and each block of tokens has a list of those.
Both matrices are turned so that what is summed over lies side by side, which products of bytes ask for.
Grids: `(blocks of tokens or of columns, blocks of components)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.rans import CodeBlocks

BLOCK = 128  # tokens, columns or components of a tile
MAX_REGISTERS = 104  # of 512 threads: five segments of the entropy decoder find room beside them


class ByteCodes(NamedTuple):
    """Codes, a row for each place that a token can have; in wide tiles `256 high + low + 128`.

    low, high: int8 `[num_rows, padded components]`; of a tile that is not wide `low` is the codes, `high` anything.
    sums: int32 `[num_rows]`, of the codes, of those in wide tiles less 128 each.
    num_wide: int32 `[row blocks]`.
    wide: int32 `[row blocks, component blocks]`, each block's wide blocks of components, in any order.
    tokens: int32 `[num_rows]`, the token of each row, -1 where there is none; None where row `i` is token `i`.
    num_tokens: that have a row.
    """

    low: Tensor
    high: Tensor
    sums: Tensor
    num_wide: Tensor
    wide: Tensor
    tokens: Tensor | None
    num_tokens: int


class ByteRows(NamedTuple):
    """Rows, turned: each block of columns has the first channels of some pairs, then their second ones.

    both: int8 `[2 * padded channels, padded components]`, 0 behind the last channel: `high` of a block of columns, then
        its `low`, so that one product takes both.
    sums: int32 `[component blocks, padded channels]`, of the rows of a block of components.
    num_channels: without those that pad them.
    pairs: half of the head_dim, pairs of a head that are turned, whether these are neighbours.
    """

    both: Tensor
    sums: Tensor
    num_channels: int
    pairs: tuple[int, int, bool]


@triton.jit
def channel_of(pairs, is_second, half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr):
    """The first or second channel of pairs: `i` and `i + num_pairs`, or `2 i` and `2 i + 1`, of a head of `2 * half`
    channels. Channels behind the pairs are not turned and pair up in the same way."""
    place = pairs % half
    if adjacent:
        channel = 2 * place + is_second
    elif num_pairs == half:
        channel = place + is_second * half
    else:
        first = tl.where(place < num_pairs, place, num_pairs + place)
        channel = first + is_second * tl.where(place < num_pairs, num_pairs, half - num_pairs)
    return pairs // half * (2 * half) + channel


@triton.jit
def split_codes_tile(
    codes, low, high, sums, num_wide, wide, num_rows, num_components, row_stride, component_stride, padded,
    side_by_side: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile of codes, of which groups of `side_by_side` rows lie side by side; `row_stride` is that of the groups."""
    row_block, component_block = tl.program_id(0), tl.program_id(1)
    first_row, first_component, numbers = row_block * block, component_block * block, tl.arange(0, block)
    rows = first_row + numbers
    is_row, is_component = rows < num_rows, first_component + numbers < num_components
    codes += (first_row // side_by_side).to(tl.int64) * row_stride + first_component.to(tl.int64) * component_stride
    row_at = numbers // side_by_side * row_stride + numbers % side_by_side
    at = numbers[:, None] * component_stride + row_at[None, :]
    turned = tl.load(codes + at, mask=is_component[:, None] & is_row[None, :], other=0)
    tile = tl.trans(turned).to(tl.int32)
    is_wide = tl.max(tl.max(tl.maximum(tile, -1 - tile), 1), 0) > 127
    low += first_row.to(tl.int64) * padded + first_component
    high += first_row.to(tl.int64) * padded + first_component
    at = numbers[:, None] * padded + numbers[None, :]
    if is_wide:
        tl.store(low + at, ((tile & 0xFF) - 128).to(tl.int8), mask=is_row[:, None])
        tl.store(high + at, (tile >> 8).to(tl.int8), mask=is_row[:, None])
        tile = tl.where(is_component[None, :], tile - 128, 0)
        before = tl.atomic_add(num_wide + row_block, 1)
        tl.store(wide + row_block * tl.num_programs(1) + before, component_block)
    else:
        tl.store(low + at, tile.to(tl.int8), mask=is_row[:, None])
    tl.atomic_add(sums + rows, tl.sum(tile, 1), mask=is_row)


@triton.jit
def split_rows_tile(
    rows, both, sums, num_components, num_channels, row_stride, padded,
    half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile of rows: first channels of some pairs, or second ones; bytes of rows that are not there are 0."""
    side: tl.constexpr = block // 2
    column_block, is_second = tl.program_id(0) // 2, tl.program_id(0) % 2
    first_component, places = tl.program_id(1) * block, tl.arange(0, block)
    pairs = column_block * side + tl.arange(0, side)
    is_pair = pairs < num_channels // 2
    is_row = is_pair[:, None] & (first_component + places < num_components)[None, :]
    channels = channel_of(pairs, is_second, half, num_pairs, adjacent)
    rows += first_component.to(tl.int64) * row_stride
    tile = tl.load(rows + channels[:, None] + places[None, :] * row_stride, mask=is_row, other=0).to(tl.int32)
    columns = is_second * side + tl.arange(0, side)
    both += column_block.to(tl.int64) * (2 * block) * padded + first_component
    place = columns[:, None] * padded + places[None, :]
    tl.store(both + place, (tile >> 8).to(tl.int8))
    tl.store(both + block * padded + place, tl.where(is_row, (tile & 0xFF) - 128, 0).to(tl.int8))
    tl.store(sums + tl.program_id(1) * (tl.num_programs(0) * side) + column_block * block + columns, tl.sum(tile, 1))


def split_codes(codes: Tensor) -> ByteCodes:
    """Bytes of `codes`, int16 `[num_tokens, num_components]`, any strides."""
    return _split(codes, None, len(codes), codes.shape, codes.stride(), 1)


def split_blocks(codes: CodeBlocks) -> ByteCodes:
    """Bytes of codes that lie as they were decoded."""
    num_blocks, num_components, lanes = codes.blocks.shape
    shape = num_blocks * lanes, num_components
    return _split(codes.blocks, codes.tokens, codes.num_tokens, shape, codes.blocks.stride()[:2], lanes)


def _split(
    codes: Tensor,
    tokens: Tensor | None,
    num_tokens: int,
    shape: Sequence[int],
    strides: Sequence[int],
    side_by_side: int,
) -> ByteCodes:
    """Of rows and components; see `split_codes_tile`."""
    device, grid = codes.device, (triton.cdiv(shape[0], BLOCK), triton.cdiv(shape[1], BLOCK))
    low = torch.empty(shape[0], grid[1] * BLOCK, dtype=torch.int8, device=device)
    parts = ByteCodes(
        low=low,
        high=torch.empty_like(low),
        sums=torch.zeros(shape[0], dtype=torch.int32, device=device),
        num_wide=torch.zeros(grid[0], dtype=torch.int32, device=device),
        wide=torch.empty(grid, dtype=torch.int32, device=device),
        tokens=tokens,
        num_tokens=num_tokens,
    )
    if shape[0]:
        split_codes_tile[grid](
            codes,
            *parts[:5],
            *shape,
            *strides,
            low.shape[1],
            side_by_side=side_by_side,
            block=BLOCK,
            num_warps=16,
            maxnreg=MAX_REGISTERS,
        )
    return parts


def split_rows(rows: Tensor, pairs: tuple[int, int, bool]) -> ByteRows:
    """Bytes of `rows`, int16 `[num_components, num_channels]`; for `pairs` see `ByteRows`."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (num_components, num_channels), device, (half, num_pairs, adjacent) = rows.shape, rows.device, pairs
    column_blocks, component_blocks = triton.cdiv(num_channels, BLOCK), triton.cdiv(num_components, BLOCK)
    both = torch.empty(2 * column_blocks * BLOCK, component_blocks * BLOCK, dtype=torch.int8, device=device)
    sums = torch.empty(component_blocks, column_blocks * BLOCK, dtype=torch.int32, device=device)
    parts = ByteRows(both, sums, num_channels, pairs)
    split_rows_tile[(2 * column_blocks, component_blocks)](
        rows, both, sums, num_components, num_channels, rows.stride(0), both.shape[1],
        half=half, num_pairs=num_pairs, adjacent=adjacent, block=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts
