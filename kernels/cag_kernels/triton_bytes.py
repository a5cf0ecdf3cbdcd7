"""16-bit integers as signed bytes, for products of matrices of bytes: what `triton_inverse` multiplies.

No processor multiplies matrices of 16-bit integers. `number = 256 upper + lower + 128` of two signed bytes always
holds; codes that are signed bytes themselves need no upper one, and nearly all of them are: only tiles of codes that
have others are wide, and each block of tokens has a list of those.
Both matrices are turned so that what is summed over lies side by side, which products of bytes ask for.
Grids: `(blocks of tokens or of columns, blocks of components)`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 128  # tokens, columns or components of a tile


class ByteCodes(NamedTuple):
    """Codes of some tokens.

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
    """Rows, turned: each block of columns has the first channels of `BLOCK / 2` pairs, then their second ones.

    low, high: int8 `[blocks * BLOCK, padded components]`, 0 behind the last channel.
    sums: int32 `[component blocks, blocks * BLOCK]`, of the rows of a block of components.
    """

    low: Tensor
    high: Tensor
    sums: Tensor


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
    codes, low, high, sums, num_wide, wide, num_tokens, num_components, token_stride, component_stride, padded,
    block: tl.constexpr,
):  # fmt: skip
    """A tile of codes."""
    token_block, component_block = tl.program_id(0), tl.program_id(1)
    first_token, first_component, places = token_block * block, component_block * block, tl.arange(0, block)
    tokens = first_token + places
    is_token, is_component = tokens < num_tokens, first_component + places < num_components
    codes += first_token.to(tl.int64) * token_stride + first_component.to(tl.int64) * component_stride
    is_code = is_token[:, None] & is_component[None, :]
    at = places[:, None] * token_stride + places[None, :] * component_stride
    tile = tl.load(codes + at, mask=is_code, other=0).to(tl.int32)
    is_wide = tl.max(tl.max(tl.maximum(tile, -1 - tile), 1), 0) > 127
    low += first_token.to(tl.int64) * padded + first_component
    high += first_token.to(tl.int64) * padded + first_component
    place = places[:, None] * padded + places[None, :]
    if is_wide:
        tl.store(low + place, ((tile & 0xFF) - 128).to(tl.int8), mask=is_token[:, None])
        tl.store(high + place, (tile >> 8).to(tl.int8), mask=is_token[:, None])
        tile = tl.where(is_code, tile - 128, 0)
        before = tl.atomic_add(num_wide + token_block, 1)
        tl.store(wide + token_block * tl.num_programs(1) + before, component_block)
    else:
        tl.store(low + place, tile.to(tl.int8), mask=is_token[:, None])
    tl.atomic_add(sums + tokens, tl.sum(tile, 1), mask=is_token)


@triton.jit
def split_rows_tile(
    rows, low, high, sums, num_components, num_channels, row_stride, padded,
    half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile of rows: first channels of some pairs, or second ones; bytes of rows that are not there are 0."""
    side: tl.constexpr = block // 2
    column_block, is_second = tl.program_id(0) // 2, tl.program_id(0) % 2
    first_component, places = tl.program_id(1) * block, tl.arange(0, block)
    pairs = column_block * side + tl.arange(0, side)
    is_pair = 2 * pairs < num_channels
    is_row = is_pair[:, None] & (first_component + places < num_components)[None, :]
    channels = channel_of(pairs, is_second, half, num_pairs, adjacent)
    rows += first_component.to(tl.int64) * row_stride
    tile = tl.load(rows + channels[:, None] + places[None, :] * row_stride, mask=is_row, other=0).to(tl.int32)
    columns = tl.program_id(0) * side + tl.arange(0, side)
    place = columns.to(tl.int64)[:, None] * padded + (first_component + places)[None, :]
    tl.store(low + place, tl.where(is_row, (tile & 0xFF) - 128, 0).to(tl.int8))
    tl.store(high + place, (tile >> 8).to(tl.int8))
    tl.store(sums + tl.program_id(1) * (tl.num_programs(0) * side) + columns, tl.sum(tile, 1))


def split_codes(codes: Tensor) -> ByteCodes:
    """Bytes of `codes`, int16 `[num_tokens, num_components]`, any strides."""
    (num_tokens, num_components), device = codes.shape, codes.device
    grid = triton.cdiv(num_tokens, BLOCK), triton.cdiv(num_components, BLOCK)
    low = torch.empty(num_tokens, grid[1] * BLOCK, dtype=torch.int8, device=device)
    parts = ByteCodes(
        low=low,
        high=torch.empty_like(low),
        sums=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        num_wide=torch.zeros(grid[0], dtype=torch.int32, device=device),
        wide=torch.empty(grid, dtype=torch.int32, device=device),
    )
    split_codes_tile[grid](
        codes, *parts, num_tokens, num_components, *codes.stride(), low.shape[1], block=BLOCK, num_warps=8
    )
    return parts


def split_rows(rows: Tensor, half: int, num_pairs: int, adjacent: bool) -> ByteRows:
    """Bytes of `rows`, int16 `[num_components, num_channels]`, channels side by side."""
    (num_components, num_channels), device = rows.shape, rows.device
    column_blocks, component_blocks = triton.cdiv(num_channels, BLOCK), triton.cdiv(num_components, BLOCK)
    low = torch.empty(column_blocks * BLOCK, component_blocks * BLOCK, dtype=torch.int8, device=device)
    sums = torch.empty(component_blocks, column_blocks * BLOCK, dtype=torch.int32, device=device)
    parts = ByteRows(low, torch.empty_like(low), sums)
    split_rows_tile[(2 * column_blocks, component_blocks)](
        rows, *parts, num_components, num_channels, rows.stride(0), low.shape[1],
        half=half, num_pairs=num_pairs, adjacent=adjacent, block=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts
