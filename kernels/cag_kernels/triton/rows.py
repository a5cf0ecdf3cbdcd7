"""Triton kernels of `rows`: what stands between the products of a decoder layer, for few rows.

`residual += update; out = residual * rsqrt(mean(residual ** 2) + epsilon) * weight`, grid `(rows,)`; norm, rotation
`a' = a cos - b sin, b' = b cos + a sin` and storing, grid `(rows, heads)`; `silu(left) * right`, grid `(rows, blocks)`.
All in float32, rounded where they are stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.triton.numbers import converted, rounded
from cag_kernels.triton.overlap import PROGRAM_ROWS, ahead_sizes, call_ahead, launch_options, wait_for_launch

GATE_BLOCK = 1024


@triton.jit
def norm_row(residual, update, weight, out, size, epsilon, has_update: tl.constexpr, block: tl.constexpr):
    """One row, the program's."""
    row, places = tl.program_id(0).to(tl.int64), tl.arange(0, block)
    mask = places < size
    total = tl.load(residual + row * size + places, mask=mask, other=0.0)
    if has_update:
        total += converted(tl.load(update + row * size + places, mask=mask, other=0.0), tl.float32)
        tl.store(residual + row * size + places, total, mask=mask)
    factor = 1.0 / tl.sqrt(tl.sum(total * total, 0) / size + epsilon)
    scaled = total * factor * tl.load(weight + places, mask=mask, other=0.0)
    tl.store(out + row * size + places, rounded(scaled, out.dtype.element_ty), mask=mask)


@triton.jit
def add_norm(
    residual, update, weight, out, ahead, num_rows, size, epsilon, ahead_rows, row_bytes, piece_bytes,
    has_update: tl.constexpr, block: tl.constexpr, has_ahead: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """One row; programs behind the rows call memory ahead."""
    if has_ahead:
        if tl.program_id(0) >= num_rows:
            call_ahead(ahead, tl.program_id(0) - num_rows, ahead_rows, row_bytes, piece_bytes)
            wait_for_launch(overlaps)
        else:
            wait_for_launch(overlaps)
            norm_row(residual, update, weight, out, size, epsilon, has_update, block)
    else:
        wait_for_launch(overlaps)
        norm_row(residual, update, weight, out, size, epsilon, has_update, block)


def add_and_norm_on_device(
    residual: Tensor,
    update: Tensor | None,
    weight: Tensor,
    epsilon: float,
    dtype: torch.dtype,
    ahead: Tensor | None = None,
) -> Tensor:
    """See `rows.add_and_norm`."""
    num_rows, size = residual.shape
    out = torch.empty((num_rows, size), dtype=dtype, device=residual.device)
    if num_rows:
        block = triton.next_power_of_2(size)
        ahead_rows, *sizes = ahead_sizes(ahead)
        add_norm[(num_rows + triton.cdiv(ahead_rows, PROGRAM_ROWS),)](
            residual, residual if update is None else update, weight, out, weight if ahead is None else ahead,
            num_rows, size, epsilon, ahead_rows, *sizes, has_update=update is not None, block=block,
            has_ahead=ahead_rows > 0, num_warps=min(16, max(1, block // 512)), **launch_options(residual.device),
        )  # fmt: skip
    return out


@triton.jit
def rotate_store(
    projected, cosines, sines, query_weight, key_weight, query, keys, values, pages, places, epsilon, num_q_heads,
    num_kv_heads, page_stride, head_stride, place_stride, half: tl.constexpr, block_half: tl.constexpr,
    has_query_norm: tl.constexpr, has_key_norm: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """One head of one row; its channels in two halves."""
    wait_for_launch(overlaps)
    row, head, channels = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, block_half)
    mask = channels < half
    source = projected + (row * tl.num_programs(1) + head) * 2 * half + channels
    low = converted(tl.load(source, mask=mask, other=0.0), tl.float32)
    high = converted(tl.load(source + half, mask=mask, other=0.0), tl.float32)
    is_query, is_value = head < num_q_heads, head >= num_q_heads + num_kv_heads
    if has_query_norm or has_key_norm:
        factor = 1.0 / tl.sqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * half) + epsilon)
        normed = (is_query and has_query_norm) or (not is_query and not is_value and has_key_norm)
        weight = tl.where(is_query, query_weight, key_weight) + channels
        factors_low = factor * tl.load(weight, mask=mask, other=0.0)
        factors_high = factor * tl.load(weight + half, mask=mask, other=0.0)
        low, high = tl.where(normed, low * factors_low, low), tl.where(normed, high * factors_high, high)
    angle = row * 2 * half + channels
    turns = mask & (head < num_q_heads + num_kv_heads)
    cosine, sine = tl.load(cosines + angle, mask=turns, other=1.0), tl.load(sines + angle, mask=turns, other=0.0)
    first, second = low * cosine - high * sine, high * cosine + low * sine
    page, place = tl.load(pages + row), tl.load(places + row)
    kv_head = head - num_q_heads - tl.where(is_value, num_kv_heads, 0)
    at = page * page_stride + kv_head * head_stride + place * place_stride + channels
    dtype: tl.constexpr = keys.dtype.element_ty
    stored, stored_high = rounded(first, dtype), rounded(second, dtype)
    is_key = mask & (not is_query) & (not is_value)
    tl.store(keys + at, stored, mask=is_key)
    tl.store(keys + at + half, stored_high, mask=is_key)
    tl.store(values + at, stored, mask=mask & is_value)
    tl.store(values + at + half, stored_high, mask=mask & is_value)
    target = query + (row * num_q_heads + head) * 2 * half + channels
    asked: tl.constexpr = query.dtype.element_ty
    tl.store(target, rounded(first, asked), mask=mask & is_query)
    tl.store(target + half, rounded(second, asked), mask=mask & is_query)


def rotate_and_store_on_device(
    projected: Tensor,
    rotation: tuple[Tensor, Tensor],
    sides: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor],
    norms: tuple[Tensor | None, Tensor | None],
    epsilon: float,
) -> Tensor:
    """See `rows.rotate_and_store`."""
    num_rows, num_kv_heads, head_dim = projected.shape[0], sides[0].shape[1], sides[0].shape[3]
    num_heads = projected.shape[1] // head_dim
    num_q_heads, half = num_heads - 2 * num_kv_heads, head_dim // 2
    query = torch.empty((num_rows, num_q_heads, head_dim), dtype=projected.dtype, device=projected.device)
    weights = [rotation[0] if weight is None else weight for weight in norms]
    if num_rows:
        rotate_store[(num_rows, num_heads)](
            projected, *rotation, *weights, query, *sides, *places, epsilon, num_q_heads, num_kv_heads,
            *sides[0].stride()[:3], half=half, block_half=triton.next_power_of_2(half),
            has_query_norm=norms[0] is not None, has_key_norm=norms[1] is not None, num_warps=1,
            **launch_options(projected.device),
        )  # fmt: skip
    return query.transpose(0, 1)


@triton.jit
def gate_block(projected, out, size, block: tl.constexpr):
    """A block of one row, the program's."""
    row, places = tl.program_id(0).to(tl.int64), tl.program_id(1) * block + tl.arange(0, block)
    mask = places < size
    left = converted(tl.load(projected + row * 2 * size + places, mask=mask, other=0.0), tl.float32)
    right = converted(tl.load(projected + row * 2 * size + size + places, mask=mask, other=0.0), tl.float32)
    gated = left / (1.0 + tl.exp(-left)) * right
    tl.store(out + row * size + places, rounded(gated, out.dtype.element_ty), mask=mask)


@triton.jit
def gate_rows(
    projected, out, ahead, num_rows, size, ahead_rows, row_bytes, piece_bytes,
    block: tl.constexpr, has_ahead: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """A block of one row; programs behind the rows call memory ahead."""
    if has_ahead:
        if tl.program_id(0) >= num_rows:
            program = (tl.program_id(0) - num_rows) * tl.num_programs(1) + tl.program_id(1)
            call_ahead(ahead, program, ahead_rows, row_bytes, piece_bytes)
            wait_for_launch(overlaps)
        else:
            wait_for_launch(overlaps)
            gate_block(projected, out, size, block)
    else:
        wait_for_launch(overlaps)
        gate_block(projected, out, size, block)


def gate_on_device(projected: Tensor, ahead: Tensor | None = None) -> Tensor:
    """See `rows.gate`."""
    num_rows, size = projected.shape[0], projected.shape[1] // 2
    out = torch.empty((num_rows, size), dtype=projected.dtype, device=projected.device)
    if num_rows:
        blocks = triton.cdiv(size, GATE_BLOCK)
        ahead_rows, *sizes = ahead_sizes(ahead)
        gate_rows[(num_rows + triton.cdiv(ahead_rows, PROGRAM_ROWS * blocks), blocks)](
            projected, out, projected if ahead is None else ahead, num_rows, size, ahead_rows, *sizes,
            block=GATE_BLOCK, has_ahead=ahead_rows > 0, num_warps=4, **launch_options(projected.device),
        )  # fmt: skip
    return out
