"""Attention inside Triton kernels, tile by tile: loading, an online softmax in powers of 2, storing a part's result.

Inlined into `triton.prefix` and `triton.paged`; none is launched. A tile's channels come in two halves, so that 4-bit
codes that share a byte need not be put beside each other, and a head_dim of 96 is padded to 2 x 64 only.
Source: online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from cag_kernels.triton.numbers import LN_2, LOG2_E, converted, product, rounded

BLOCK_TOKENS = 64  # of a tile of 16-bit numbers
WIDE_BLOCK_TOKENS = {128: 32, 256: 16}  # channels up to which -> of a tile where something is float32


def tile_tokens(query: torch.dtype, keys: torch.dtype, head_dim: int) -> int:
    """Tokens of a tile. Keys and values in float32 take twice the shared memory, and products in float32 have their
    operands in registers: larger tiles do not fit, or spill."""
    if torch.float32 not in (query, keys):
        return BLOCK_TOKENS
    return next(tokens for channels, tokens in WIDE_BLOCK_TOKENS.items() if head_dim <= channels)


@triton.jit
def program_rows(
    query, positions, window, num_tokens, num_queries, split_tokens, query_head_stride, query_stride,
    group_size: tl.constexpr, block_rows: tl.constexpr, has_window: tl.constexpr,
):  # fmt: skip
    """What a program of the grid `(row blocks, key/value heads, splits)` has to do: its head and split, which rows
    there are, where their queries lie and their results go; its first token and the end of its tokens; and of each row
    the last token that is too far back for it, -1 without a window."""
    kv_head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    is_row = rows < num_queries * group_size
    queries, heads = rows // group_size, kv_head * group_size + rows % group_size
    row_query = query + heads * query_head_stride + queries * query_stride
    row_places = (split * tl.num_programs(1) * group_size + heads) * num_queries + queries
    first, last = split * split_tokens, tl.minimum((split + 1) * split_tokens, num_tokens)
    hidden = tl.full((block_rows,), -1, tl.int32)
    if has_window:
        hidden = tl.load(positions + queries, mask=is_row, other=1 << 30) - window
    return kv_head, split, is_row, row_query, row_places, first, last, hidden


@triton.jit
def halves(places, is_token, half: tl.constexpr, block_half: tl.constexpr, bits: tl.constexpr):
    """Both halves of the channels of a tile, `[block_tokens, block_half]`; `places` point to each token's first one.

    With 4 bits a byte holds channel `i` in its low and channel `i + half` in its high nibble.
    """
    channels = tl.arange(0, block_half)
    mask = is_token[:, None] & (channels < half)[None, :]
    low = tl.load(places[:, None] + channels[None, :], mask=mask, other=0)
    if bits == 4:
        high = low >> 4
        low = low & 15
    else:
        high = tl.load(places[:, None] + half + channels[None, :], mask=mask, other=0)
    return low, high


@triton.jit
def capped(scores, softcap, has_cap: tl.constexpr):
    """`softcap * tanh(scores / softcap)` where there is a cap; times log2(e)."""
    if has_cap:
        shrunk = tl.exp2(tl.abs(scores) * (-2.0 * LOG2_E / softcap))
        size = softcap * (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(scores < 0, -size, size)
    return scores * LOG2_E


@triton.jit
def masked(scores, visible, scale, softcap, has_cap: tl.constexpr):
    """Products times the scale, capped, in powers of 2, `-inf` where not `visible`, which may be common to the rows."""
    if has_cap or visible.numel == scores.numel:
        scores = tl.where(visible, capped(scores * scale, softcap, has_cap), float("-inf"))
    else:
        scores = scores * (scale * LOG2_E) + tl.where(visible, 0.0, float("-inf"))  # one instruction a score
    return scores


@triton.jit
def between(tokens, first, last):
    """`first <= tokens < last` in one comparison; `tokens` and `first` are not negative."""
    return (tokens - first).to(tl.uint32) < tl.maximum(last - first, 0).to(tl.uint32)


@triton.jit
def weighed(scores, maximum, denominator):
    """A step of the softmax: weights, factor of the sums so far, new maximum, new denominator."""
    higher = tl.maximum(maximum, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    factor = tl.exp2(maximum - base)
    return weights, factor, higher, denominator * factor + tl.sum(weights, 1)


@triton.jit
def row_scores(low, high, keys_low, keys_high):
    """`query @ keys.T`, float32 `[block_rows, block_tokens]`."""
    scores = tl.zeros((low.shape[0], keys_low.shape[0]), tl.float32)
    scores = product(low, tl.trans(converted(keys_low, low.dtype)), scores)
    return product(high, tl.trans(converted(keys_high, low.dtype)), scores)


@triton.jit
def summed(weights, factor, low_sum, high_sum, values_low, values_high):
    """Both weighted sums with a tile of values taken in; `weights` in the dtype of the product."""
    low_sum = product(weights, converted(values_low, weights.dtype), low_sum * factor[:, None])
    high_sum = product(weights, converted(values_high, weights.dtype), high_sum * factor[:, None])
    return low_sum, high_sum


@triton.jit
def take_plain(
    low, high, keys, values, is_token, visible, scale, softcap, maximum, denominator, low_sum, high_sum,
    half: tl.constexpr, has_cap: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values held as numbers; `keys`, `values` point to its tokens. The new state of the rows."""
    keys_low, keys_high = halves(keys, is_token, half, low.shape[1], 16)
    scores = masked(row_scores(low, high, keys_low, keys_high), visible, scale, softcap, has_cap)
    weights, factor, maximum, denominator = weighed(scores, maximum, denominator)
    values_low, values_high = halves(values, is_token, half, low.shape[1], 16)
    low_sum, high_sum = summed(rounded(weights, low.dtype), factor, low_sum, high_sum, values_low, values_high)
    return maximum, denominator, low_sum, high_sum


@triton.jit
def store_part(
    out, lse, places, is_row, maximum, denominator, low_sum, high_sum, half: tl.constexpr, block_half: tl.constexpr
):
    """Write a part's `out [rows, 2 * half]` and `lse [rows]`, float32; zeros and `-inf` for rows that saw nothing."""
    saw = denominator > 0.0
    divisor = tl.where(saw, denominator, 1.0)
    channels = tl.arange(0, block_half)
    mask = is_row[:, None] & (channels < half)[None, :]
    targets = out + places[:, None] * (2 * half) + channels[None, :]
    tl.store(targets, low_sum / divisor[:, None], mask=mask)
    tl.store(targets + half, high_sum / divisor[:, None], mask=mask)
    logarithm = tl.where(saw, (maximum + tl.log2(divisor)) * LN_2, float("-inf"))
    tl.store(lse + places, logarithm, mask=is_row)
