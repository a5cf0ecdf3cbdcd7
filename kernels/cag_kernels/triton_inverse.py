"""Triton kernel of `inverse.inverse_transform`: products of signed bytes, then scales, rotation and rounding.

`sum = codes @ rows modulo 2**32`. With `r = 256 u + l + 128` (`triton_bytes`), `sum c r = 256 sum c u + sum c l +
128 sum c`: two products of bytes, where codes are bytes. Of a tile with codes that are not, `c = 256 h + b + 128`, `b`
is multiplied first, and behind it comes `65536 sum h u + 256 sum h l + 128 sum r`; `128 sum c` becomes
`128 sum (c - 128)`, which holds what `h` and `b` have of it. Sums are int32 and wrap.
Then `sum * scale + mean` and the rotation in float32, nothing fused. Columns are pairs of channels side by side, of
any number of heads and layers. Grid: `(blocks of tokens x blocks of columns)`, those of one block of tokens together.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.triton_bytes import BLOCK, paired_channels, split_codes, split_rows
from cag_kernels.triton_quantize import narrow_to

ROOMY_BYTES = 160 << 10  # of shared memory, for tiles of three steps at once


class Cut(NamedTuple):
    """How a launch is cut."""

    num_warps: int = 8
    num_stages: int = 3


@triton.jit
def add_wide(
    total, high, wide, count, code_at, row_high, row_low, row_at, row_sums, columns, num_channels, depth: tl.constexpr
):
    """The sums with the rest of wide tiles; `code_at`, `row_at` lead to a block's first tile of components."""
    for index in range(count):
        block = tl.load(wide + index)
        tile = tl.load(high + code_at + block * depth)
        upper = tl.dot(tile, tl.load(row_high + row_at + block * depth), out_dtype=tl.int32)
        lower = tl.dot(tile, tl.load(row_low + row_at + block * depth), out_dtype=tl.int32)
        total += (upper << 16) + (lower << 8)
        total += 128 * tl.load(row_sums + block * num_channels + columns)[None, :]
    return total


@triton.jit
def store_turned(
    values, cosines, sines, out, tokens, columns, is_token, is_column, num_tokens,
    half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr,
):  # fmt: skip
    """Turn pairs of columns, round and store them: `out [num_heads, num_tokens, 2 * half]`."""
    tokens_wide, head = tokens.to(tl.int64)[:, None], columns // (2 * half)
    at = (head.to(tl.int64) * (num_tokens * 2 * half))[None, :] + tokens_wide * (2 * half)
    at += (paired_channels(columns, half, num_pairs, adjacent) - head * (2 * half))[None, :]
    mask = is_token[:, None] & is_column[None, :]
    dtype: tl.constexpr = out.dtype.element_ty
    if num_pairs == 0:
        tl.store(out + at, narrow_to(values, dtype), mask=mask)
    else:
        size: tl.constexpr = values.shape[0]
        pairs: tl.constexpr = values.shape[1] // 2
        first, second = tl.split(tl.reshape(values, (size, pairs, 2)))
        _, place = tl.split(tl.reshape(columns // 2 % half, (pairs, 2)))
        angle_at, turns = tokens_wide * num_pairs + place[None, :], is_token[:, None] & (place < num_pairs)[None, :]
        cosine, sine = (
            tl.load(cosines + angle_at, mask=turns, other=1.0),
            tl.load(sines + angle_at, mask=turns, other=0.0),
        )
        turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
        tl.store(out + at, narrow_to(tl.reshape(turned, (size, 2 * pairs)), dtype), mask=mask)


@triton.jit
def invert_tile(
    low, high, code_sums, num_wide, wide, row_low, row_high, row_sums, scale, mean, cosines, sines, out,
    num_tokens, num_channels, padded, half: tl.constexpr, num_pairs: tl.constexpr, adjacent: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """A block of tokens and of columns."""
    num_blocks = (num_channels + block - 1) // block
    token_block = tl.program_id(0) // num_blocks
    tokens = token_block * block + tl.arange(0, block)
    columns = tl.program_id(0) % num_blocks * block + tl.arange(0, block)
    is_token, is_column, depth = tokens < num_tokens, columns < num_channels, tl.arange(0, block)
    code_at = tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * padded + depth[None, :]
    row_at = tl.minimum(columns, num_channels - 1).to(tl.int64)[None, :] * padded + depth[:, None]
    codes, uppers, lowers = low + code_at, row_high + row_at, row_low + row_at
    upper, lower = tl.zeros((block, block), tl.int32), tl.zeros((block, block), tl.int32)
    for _ in range(0, padded, block):
        tile = tl.load(codes)
        upper += tl.dot(tile, tl.load(uppers), out_dtype=tl.int32)
        lower += tl.dot(tile, tl.load(lowers), out_dtype=tl.int32)
        codes += block
        uppers += block
        lowers += block
    total = (upper << 8) + lower + 128 * tl.load(code_sums + tokens, mask=is_token, other=0)[:, None]
    count = tl.load(num_wide + token_block)
    if count > 0:
        wide += token_block * (padded // block)
        safe = tl.minimum(columns, num_channels - 1)
        total = add_wide(
            total, high, wide, count, code_at, row_high, row_low, row_at, row_sums, safe, num_channels, block
        )
    channels = paired_channels(columns, half, num_pairs, adjacent)
    factor, shift = (
        tl.load(scale + channels, mask=is_column, other=0.0),
        tl.load(mean + channels, mask=is_column, other=0.0),
    )
    values = total.to(tl.float32) * factor[None, :] + shift[None, :]
    store_turned(
        values, cosines, sines, out, tokens, columns, is_token, is_column, num_tokens, half, num_pairs, adjacent
    )


@cache
def default_cut(device: torch.device) -> Cut:
    """Fewer tiles at once where they would not fit."""
    if device.type != "cuda":
        return Cut()
    properties = torch.cuda.get_device_properties(device)
    return Cut(num_stages=3 if properties.shared_memory_per_block_optin >= ROOMY_BYTES else 2)


def invert(
    codes: Tensor,
    rows: Tensor,
    scale: Tensor,
    mean: Tensor,
    angles: tuple[Tensor, Tensor] | None,
    head_dim: int,
    dtype: torch.dtype,
    pairing: str,
    cut: Cut | None = None,
) -> Tensor:
    """`[num_heads, num_tokens, head_dim]` as `inverse.inverse_transform_reference` gives it."""
    num_tokens, num_channels, half = codes.shape[0], rows.shape[1], head_dim // 2
    out = torch.empty((num_channels // head_dim, num_tokens, head_dim), dtype=dtype, device=codes.device)
    if not num_tokens:
        return out
    num_pairs, adjacent = 0 if angles is None else angles[0].shape[1], pairing == "adjacent"
    bytes_of_codes = split_codes(codes)
    bytes_of_rows = split_rows(rows if rows.stride(1) == 1 else rows.contiguous(), half, num_pairs, adjacent)
    cosines, sines = (scale, scale) if angles is None else (part.contiguous() for part in angles)
    num_warps, num_stages = cut or default_cut(codes.device)
    invert_tile[(triton.cdiv(num_tokens, BLOCK) * triton.cdiv(num_channels, BLOCK),)](
        *bytes_of_codes, *bytes_of_rows, scale.contiguous(), mean.contiguous(), cosines, sines, out,
        num_tokens, num_channels, bytes_of_codes.low.shape[1], half=half, num_pairs=num_pairs, adjacent=adjacent,
        block=BLOCK, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
