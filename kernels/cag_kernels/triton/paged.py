"""Triton kernel of `prefix.paged_attention`: each session's queries over its own tail, which lies in pages of a pool.

As `triton.prefix`, for the tokens `j` of session `s` with `j <= length_s - n_s + i` for its query `i` of `n_s`.
Grid: `(row blocks of the longest question * sessions, key/value heads, splits)`; splits behind a session's tail write
zeros and `-inf`. Accumulates in float32.
Source: paged attention, arXiv:2309.06180.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cag_kernels.prefixes import PagedTails
from cag_kernels.triton.overlap import launch_options, wait_for_launch
from cag_kernels.triton.tiles import halves, store_part, take_plain, tile_tokens

SPLIT_TOKENS = 512  # of a long conversation; most tails are shorter


@triton.jit
def attend_tail(
    query, keys, values, pages, lengths, query_starts, part_out, part_lse, scale, softcap, window, num_queries,
    query_head_stride, query_stride, key_page_stride, key_head_stride, key_stride, value_page_stride,
    value_head_stride, value_stride, pages_stride, session, rows, kv_head, split,
    group_size: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr, block_rows: tl.constexpr,
    block_tokens: tl.constexpr, split_tokens: tl.constexpr, page_tokens: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr,
):  # fmt: skip
    """One split of one session's tail for some of its rows of one key/value head."""
    begin, length = tl.load(query_starts + session), tl.load(lengths + session)
    count = tl.load(query_starts + session + 1) - begin
    is_row = rows < count * group_size
    queries, heads = begin + rows // group_size, kv_head * group_size + rows % group_size
    low, high = halves(query + heads * query_head_stride + queries * query_stride, is_row, half, block_half, 16)
    places = length - count + rows // group_size  # of the queries, within the tail
    first, last = split * split_tokens, tl.minimum((split + 1) * split_tokens, length)
    last = tl.where(count > 0, last, 0)
    hidden = tl.full((block_rows,), -1, tl.int32)  # the last token that is too far back for a row
    if has_window:
        hidden = tl.maximum(places - window, -1)
        first = tl.maximum(first, (tl.min(hidden) + 1) // block_tokens * block_tokens)
    maximum = tl.full((block_rows,), float("-inf"), tl.float32)
    denominator = tl.zeros((block_rows,), tl.float32)
    low_sum, high_sum = tl.zeros(low.shape, tl.float32), tl.zeros(low.shape, tl.float32)
    for start in range(first, last, block_tokens):
        tokens = start + tl.arange(0, block_tokens)
        is_token = tokens < last
        page = tl.load(pages + session * pages_stride + tokens // page_tokens, mask=is_token, other=0).to(tl.int64)
        place = tokens % page_tokens
        visible = is_token[None, :] & (tokens[None, :] <= places[:, None]) & (tokens[None, :] > hidden[:, None])
        maximum, denominator, low_sum, high_sum = take_plain(
            low, high, keys + page * key_page_stride + kv_head * key_head_stride + place * key_stride,
            values + page * value_page_stride + kv_head * value_head_stride + place * value_stride,
            is_token, visible, scale, softcap, maximum, denominator, low_sum, high_sum, half, has_cap,
        )  # fmt: skip
    row_places = (split * tl.num_programs(1) * group_size + heads) * num_queries + queries
    store_part(part_out, part_lse, row_places, is_row, maximum, denominator, low_sum, high_sum, half, block_half)


@triton.jit
def attend_tails(
    query, keys, values, pages, lengths, query_starts, part_out, part_lse, scale, softcap, window, num_queries,
    query_head_stride, query_stride, key_page_stride, key_head_stride, key_stride, value_page_stride,
    value_head_stride, value_stride, pages_stride, row_blocks,
    group_size: tl.constexpr, half: tl.constexpr, block_half: tl.constexpr, block_rows: tl.constexpr,
    block_tokens: tl.constexpr, split_tokens: tl.constexpr, page_tokens: tl.constexpr, has_window: tl.constexpr,
    has_cap: tl.constexpr, overlaps: tl.constexpr,
):  # fmt: skip
    """One split of one session's tail for one block of its rows of one key/value head."""
    wait_for_launch(overlaps)
    session, kv_head = tl.program_id(0) // row_blocks, tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * block_rows + tl.arange(0, block_rows)
    attend_tail(
        query, keys, values, pages, lengths, query_starts, part_out, part_lse, scale, softcap, window, num_queries,
        query_head_stride, query_stride, key_page_stride, key_head_stride, key_stride, value_page_stride,
        value_head_stride, value_stride, pages_stride, session, rows, kv_head, tl.program_id(2),
        group_size, half, block_half, block_rows, block_tokens, split_tokens, page_tokens, has_window, has_cap,
    )  # fmt: skip


def num_tail_splits(tails: PagedTails, split_tokens: int = SPLIT_TOKENS) -> int:
    """Splits that the longest possible tail takes."""
    return max(1, -(-tails.pages.shape[1] * tails.keys.shape[2] // split_tokens))


def attend_tails_parts(
    query: Tensor,
    tails: PagedTails,
    part_out: Tensor,
    part_lse: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    """Write the results of all splits: `part_out [num_splits, num_q_heads, num_queries, head_dim]`, `part_lse`.

    Queries of no session are not written.
    """
    num_q_heads, num_queries, head_dim = query.shape
    num_sessions, (num_kv_heads, page_tokens) = tails.lengths.shape[0], tails.keys.shape[1:3]
    group_size, half = num_q_heads // num_kv_heads, head_dim // 2
    num_rows = group_size * tails.max_queries
    is_wide = query.dtype == torch.float32
    block_rows = min(32 if is_wide and head_dim > 128 else 64, max(16, triton.next_power_of_2(num_rows)))
    row_blocks = triton.cdiv(num_rows, block_rows)
    block_tokens = tile_tokens(query.dtype, tails.keys.dtype, head_dim)
    attend_tails[(row_blocks * num_sessions, num_kv_heads, part_out.shape[0])](
        query, tails.keys, tails.values, tails.pages, tails.lengths, tails.query_starts, part_out, part_lse,
        scale, softcap or 0.0, window or 0, num_queries, *query.stride()[:2], *tails.keys.stride()[:3],
        *tails.values.stride()[:3], tails.pages.stride(0), row_blocks,
        group_size=group_size, half=half, block_half=max(16, triton.next_power_of_2(half)), block_rows=block_rows,
        block_tokens=block_tokens, split_tokens=SPLIT_TOKENS, page_tokens=page_tokens,
        has_window=window is not None, has_cap=softcap is not None, num_warps=8 if is_wide else 4, num_stages=2,
        **launch_options(query.device),
    )  # fmt: skip
