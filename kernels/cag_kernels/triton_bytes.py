"""16-bit integers as signed bytes, for products of matrices of bytes: what `triton_inverse` multiplies.

No processor multiplies matrices of 16-bit integers. `number = 256 upper + lower + 128` of two signed bytes always
holds; codes that are signed bytes themselves need no upper one, and nearly all of them are: only tiles of codes that
have others are wide, and each block of tokens has a list of those.
Both matrices are turned so that what is summed over lies side by side, which products of bytes ask for.
Grids: `(blocks of tokens or of columns, blocks of components)`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.byte_operands import ByteCodes, ByteRows
from cag_kernels.rans import LANES, CodeBlocks

BLOCK = 128  # tokens, columns or components of a tile


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
    codes, places, low, high, sums, num_wide, wide, num_tokens, num_components, token_stride, component_stride, padded,
    in_blocks: tl.constexpr, lanes: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A tile of codes: `places` of tokens in blocks of `lanes`, or strides."""
    token_block, component_block = tl.program_id(0), tl.program_id(1)
    first_token, first_component, numbers = token_block * block, component_block * block, tl.arange(0, block)
    tokens, components = first_token + numbers, first_component + numbers
    is_token, is_component = tokens < num_tokens, components < num_components
    if in_blocks:
        first_block = tl.load(places + first_token) // lanes
        place = tl.load(places + tokens, mask=is_token, other=first_block * lanes)
        token_at = (place // lanes - first_block) * token_stride + place % lanes
        codes += first_block.to(tl.int64) * token_stride
    else:
        token_at = numbers * token_stride
        codes += first_token.to(tl.int64) * token_stride
    codes += first_component.to(tl.int64) * component_stride
    is_code = is_component[:, None] & is_token[None, :]
    at = numbers[:, None] * component_stride + token_at[None, :]
    tile = tl.trans(tl.load(codes + at, mask=is_code, other=0)).to(tl.int32)
    is_wide = tl.max(tl.max(tl.maximum(tile, -1 - tile), 1), 0) > 127
    low += first_token.to(tl.int64) * padded + first_component
    high += first_token.to(tl.int64) * padded + first_component
    at = numbers[:, None] * padded + numbers[None, :]
    if is_wide:
        tl.store(low + at, ((tile & 0xFF) - 128).to(tl.int8), mask=is_token[:, None])
        tl.store(high + at, (tile >> 8).to(tl.int8), mask=is_token[:, None])
        tile = tl.where(is_component[None, :], tile - 128, 0)
        before = tl.atomic_add(num_wide + token_block, 1)
        tl.store(wide + token_block * tl.num_programs(1) + before, component_block)
    else:
        tl.store(low + at, tile.to(tl.int8), mask=is_token[:, None])
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
    return _split(codes, None, *codes.shape, *codes.stride())


def split_blocks(codes: CodeBlocks) -> ByteCodes:
    """Bytes of codes that lie as they were decoded."""
    _, num_components, lanes = codes.blocks.shape
    return _split(codes.blocks, codes.places, len(codes.places), num_components, num_components * lanes, lanes)


def _split(
    codes: Tensor, places: Tensor | None, num_tokens: int, num_components: int, token_stride: int, component_stride: int
) -> ByteCodes:
    """`token_stride`: of the blocks where there are places."""
    device, grid = codes.device, (triton.cdiv(num_tokens, BLOCK), triton.cdiv(num_components, BLOCK))
    low = torch.empty(num_tokens, grid[1] * BLOCK, dtype=torch.int8, device=device)
    parts = ByteCodes(
        low=low,
        high=torch.empty_like(low),
        sums=torch.zeros(num_tokens, dtype=torch.int32, device=device),
        num_wide=torch.zeros(grid[0], dtype=torch.int32, device=device),
        wide=torch.empty(grid, dtype=torch.int32, device=device),
    )
    if num_tokens:
        split_codes_tile[grid](
            codes, codes if places is None else places, *parts, num_tokens, num_components, token_stride,
            component_stride, low.shape[1], in_blocks=places is not None, lanes=LANES, block=BLOCK, num_warps=8,
        )  # fmt: skip
    return parts


def split_rows(rows: Tensor, pairs: tuple[int, int, bool]) -> ByteRows:
    """Bytes of `rows`, int16 `[num_components, num_channels]`; for `pairs` see `ByteRows`."""
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    (num_components, num_channels), device, (half, num_pairs, adjacent) = rows.shape, rows.device, pairs
    column_blocks, component_blocks = triton.cdiv(num_channels, BLOCK), triton.cdiv(num_components, BLOCK)
    low = torch.empty(column_blocks * BLOCK, component_blocks * BLOCK, dtype=torch.int8, device=device)
    sums = torch.empty(component_blocks, column_blocks * BLOCK, dtype=torch.int32, device=device)
    parts = ByteRows(low, torch.empty_like(low), sums, num_channels, pairs)
    split_rows_tile[(2 * column_blocks, component_blocks)](
        rows, *parts[:3], num_components, num_channels, rows.stride(0), low.shape[1],
        half=half, num_pairs=num_pairs, adjacent=adjacent, block=BLOCK, num_warps=4,
    )  # fmt: skip
    return parts
