"""Triton kernel of `inverse.inverse_transform`: products of signed bytes, then scales, rotation and rounding.

`sum = codes @ rows modulo 2**32`. With `r = 256 u + l + 128` (`triton.bytes`), `sum c r = 256 sum c u + sum c l +
128 sum c`: where codes are bytes one product, of the columns of `u` beside those of `l`. A compiler waits for a product
of integers where it is issued, and would wait for two of them twice. Of a tile with codes that are not bytes,
`c = 256 h + b + 128`, `256 (256 sum h u + sum h l) + 128 sum r` comes first, and then `b` is multiplied as any code;
`128 sum c` is `128 sum (c - 128)` there, which holds what `h` and `b` have of it. Sums are int32 and wrap.
Then `sum * scale + mean` and the rotation in float32, nothing fused, by threads that store 16 bytes at once. Columns
are the channels of any number of heads and layers, the two of a pair half a block apart. Grid: `(blocks of tokens x
blocks of columns)`, those of one block of tokens together.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.rans import CodeBlocks
from cag_kernels.triton.bytes import BLOCK, ByteCodes, ByteRows, channel_of, split_blocks, split_codes, split_rows
from cag_kernels.triton.quantize import narrow_to

ROOMY_BYTES = 160 << 10  # of shared memory, for tiles of three steps at once


class Cut(NamedTuple):
    """How a launch is cut. With 216 registers five segments of the entropy decoder find room beside a program."""

    num_warps: int = 8
    num_stages: int = 3
    max_registers: int | None = 216


@triton.jit
def _halves(tile):
    """The two halves of its columns."""
    size: tl.constexpr = tile.shape[0]
    side: tl.constexpr = tile.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(tile, (size, 2, side)), (0, 2, 1)))


@triton.jit
def wide_sums(high, rows, row_sums, wide, count, num_columns, block: tl.constexpr):
    """What wide tiles add to the sums that count 256 times, and beside them to those that count once. `high` and `rows`
    lead to the first tile of components, `row_sums` to the tile's columns."""
    sums, below = tl.zeros((block, 2 * block), tl.int32), tl.zeros((block,), tl.int32)
    for index in tl.range(0, count, num_stages=1):
        number = tl.load(wide + index)
        sums += tl.dot(tl.load(high + number * block), tl.load(rows + number * block), out_dtype=tl.int32)
        below += tl.load(row_sums + number * num_columns)
    upper, lower = _halves(sums)
    upper = (upper << 8) + lower
    both = tl.join(upper, (below * 128)[None, :] + tl.zeros_like(upper))
    return tl.reshape(tl.permute(both, (0, 2, 1)), (block, 2 * block))


@triton.jit
def means_of(mean, channels, is_channel, number, is_token, num_channels, has_means: tl.constexpr):
    """Of each token some channels, or of all tokens."""
    at, mask = channels[None, :], is_channel[None, :]
    if has_means:
        at, mask = number[:, None] * num_channels + at, is_token[:, None] & mask
    return tl.load(mean + at, mask=mask, other=0.0)


@triton.jit
def store_turned(
    first, second, cosines, sines, out, tokens, pairs, firsts, seconds, is_token, is_pair, head_stride,
    half: tl.constexpr, num_pairs: tl.constexpr,
):  # fmt: skip
    """Turn the pairs of a tile, round and store them: `out [num_heads, num_tokens, 2 * half]`, tokens side by side."""
    dtype: tl.constexpr = out.dtype.element_ty
    wide_tokens, place = tokens.to(tl.int64)[:, None], pairs % half
    mask = is_token[:, None] & is_pair[None, :]
    if num_pairs > 0:
        at, turns = wide_tokens * num_pairs + place[None, :], mask & (place < num_pairs)[None, :]
        cosine, sine = tl.load(cosines + at, mask=turns, other=1.0), tl.load(sines + at, mask=turns, other=0.0)
        first, second = first * cosine - second * sine, second * cosine + first * sine
    head = pairs // half
    to_head = wide_tokens * (2 * half) + (head.to(tl.int64) * head_stride - head * (2 * half))[None, :]
    tl.store(out + to_head + firsts[None, :], narrow_to(first, dtype), mask=mask)
    tl.store(out + to_head + seconds[None, :], narrow_to(second, dtype), mask=mask)


@triton.jit
def invert_tile(
    low, high, code_sums, num_wide, wide, row_tokens, row_bytes, row_sums, scale, mean, mean_of, cosines, sines, out,
    num_rows, num_channels, padded, head_stride, half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr,
    has_means: tl.constexpr, has_tokens: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A block of tokens and of columns."""
    num_blocks, side = (num_channels + block - 1) // block, block // 2
    row_block, column_block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    places, columns = tl.arange(0, block), column_block * (2 * block) + tl.arange(0, 2 * block)
    rows = row_block * block + places
    is_row = rows < num_rows
    # asked for ahead of the products: what follows them waits for one thing behind the other otherwise
    tokens = tl.load(row_tokens + rows, mask=is_row, other=-1) if has_tokens else tl.where(is_row, rows, -1)
    is_token = tokens >= 0
    number = tl.load(mean_of + tokens, mask=is_token, other=0) if has_means else tokens
    code_at = tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * padded + places[None, :]
    codes, uppers_lowers = low + code_at, row_bytes + columns.to(tl.int64)[None, :] * padded + places[:, None]
    sums = wide_sums(
        high + code_at, uppers_lowers, row_sums + column_block * block + places, wide + row_block * (padded // block),
        tl.load(num_wide + row_block), num_blocks * block, block,
    )  # fmt: skip
    for _ in range(0, padded, block):
        sums += tl.dot(tl.load(codes), tl.load(uppers_lowers), out_dtype=tl.int32)
        codes += block
        uppers_lowers += block
    upper, lower = _halves(sums)
    first, second = _halves((upper << 8) + lower + 128 * tl.load(code_sums + rows, mask=is_row, other=0)[:, None])
    pairs = column_block * side + tl.arange(0, block // 2)
    is_pair = pairs < num_channels // 2  # alike for as many neighbours as one access takes, which a compiler must see
    firsts = channel_of(pairs, 0, half, num_pairs, adjacent)
    seconds = channel_of(pairs, 1, half, num_pairs, adjacent)
    first_scale = tl.load(scale + firsts, mask=is_pair, other=0.0)[None, :]
    second_scale = tl.load(scale + seconds, mask=is_pair, other=0.0)[None, :]
    first_mean = means_of(mean, firsts, is_pair, number, is_token, num_channels, has_means)
    second_mean = means_of(mean, seconds, is_pair, number, is_token, num_channels, has_means)
    first = first.to(tl.float32) * first_scale + first_mean
    second = second.to(tl.float32) * second_scale + second_mean
    store_turned(
        first, second, cosines, sines, out, tokens, pairs, firsts, seconds, is_token, is_pair, head_stride,
        half, num_pairs,
    )  # fmt: skip


@cache
def default_cut(device: torch.device) -> Cut:
    """Fewer tiles at once where they would not fit."""
    if device.type != "cuda":
        return Cut()
    properties = torch.cuda.get_device_properties(device)
    return Cut(num_stages=3 if properties.shared_memory_per_block_optin >= ROOMY_BYTES else 2)


def operands(
    codes: Tensor | CodeBlocks, rows: Tensor, angles: tuple[Tensor, Tensor] | None, head_dim: int, pairing: str
) -> tuple[ByteCodes, ByteRows]:
    """What `invert` multiplies."""
    num_pairs = 0 if angles is None else angles[0].shape[1]
    split = split_blocks(codes) if isinstance(codes, CodeBlocks) else split_codes(codes)
    return split, split_rows(rows, (head_dim // 2, num_pairs, pairing == "adjacent"))


def invert(
    codes: ByteCodes,
    rows: ByteRows,
    scale: Tensor,
    mean: Tensor,
    mean_of: Tensor | None,
    angles: tuple[Tensor, Tensor] | None,
    out: Tensor,
    cut: Cut | None = None,
) -> Tensor:
    """Into `out` `[num_heads, num_tokens, head_dim]` what `inverse.inverse_transform_reference` gives."""
    (num_rows, padded), (half, num_pairs, adjacent) = codes.low.shape, rows.pairs
    cosines, sines = (scale, scale) if angles is None else (part.contiguous() for part in angles)
    num_warps, num_stages, max_registers = cut or default_cut(scale.device)
    tokens, numbers = (scale if part is None else part for part in (codes.tokens, mean_of))
    if num_rows:
        invert_tile[(triton.cdiv(num_rows, BLOCK) * triton.cdiv(rows.num_channels, BLOCK),)](
            *codes[:5], tokens, *rows[:2], scale.contiguous(), mean.contiguous(), numbers, cosines, sines, out,
            num_rows, rows.num_channels, padded, out.stride(0), half=half, num_pairs=num_pairs, adjacent=adjacent,
            has_means=mean_of is not None, has_tokens=codes.tokens is not None, block=BLOCK, num_warps=num_warps,
            num_stages=num_stages, maxnreg=max_registers, enable_fp_fusion=False,
        )  # fmt: skip
    return out
