"""What attention over a prefix and over paged tails means: the shortest code that is right.

The Triton kernels are tested against these evaluated in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cag_kernels.prefixes import DensePrefix, PagedTails, Prefix, Prefixes, pieces_of
from cag_kernels.quantize import dequantize_prefix
from cag_kernels.reference import segment_attention_reference


def prefix_attention_reference(
    query: Tensor,
    prefix: Prefix,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the queries of any number of sessions over one prefix that stands before them all.

    `out[h, i] = sum_j softmax_j(s[h, i, j]) values[h // group, j]`, `s = scale * query . key`, capped to
    `softcap * tanh(s / softcap)`, over the tokens `j` with `positions[i] - j < window`.

    Args:
        query: `[num_q_heads, num_queries, head_dim]`, the queries of all sessions side by side.
        prefix: numbers, or codes that stand for `code * scale + offset`.
        scale: factor of the scores.
        positions: int32 `[num_queries]`, places of the queries, counted from the prefix's first token; only looked at
            with a window. A query stands behind the prefix.
        window: how many tokens a query sees at most, its own included, or None for all.
        softcap: cap of the scores, or None.

    Returns:
        `out [num_q_heads, num_queries, head_dim]` and `lse [num_q_heads, num_queries]`, both in float32 (float64 for
        float64 queries). A query that sees no token gets zeros and `-inf`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = prefix if isinstance(prefix, DensePrefix) else dequantize_prefix(prefix, dtype)
    if window is None:
        offset = keys.shape[1]
        return segment_attention_reference(query, keys, values, scale=scale, offset=offset, softcap=softcap)
    assert positions is not None, "a window needs the places of the queries"
    parts = [
        segment_attention_reference(
            query[:, index : index + 1], keys, values, scale=scale, offset=position, window=window, softcap=softcap
        )
        for index, position in enumerate(positions.tolist())
    ]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)


def paged_attention_reference(
    query: Tensor,
    tails: PagedTails,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each session's queries over its own tail, whose last tokens they are.

    As `reference.segment_attention_reference` for each session apart, with `offset = length - number of its queries`.

    Args:
        query: `[num_q_heads, num_queries, head_dim]`, the queries of all sessions side by side.
        tails: the sessions' keys and values in pages.
        scale, window, softcap: as there.

    Returns:
        `(out, lse)` as there, for all queries side by side. Queries of no session get zeros and `-inf`.
    """
    return session_by_session(query, tails, segment_attention_reference, scale=scale, window=window, softcap=softcap)


def session_by_session(
    query: Tensor, tails: PagedTails, attend: Callable[..., tuple[Tensor, Tensor]], **masks: Any
) -> tuple[Tensor, Tensor]:
    """`attend(query, keys, values, offset=..., **masks)` over the tail of each session, put side by side."""
    out = query.new_zeros(query.shape, dtype=torch.promote_types(query.dtype, torch.float32))
    lse = out.new_full(query.shape[:2], -torch.inf)
    starts = tails.query_starts.tolist()
    for session, length in enumerate(tails.lengths.tolist()):
        own = slice(starts[session], starts[session + 1])
        if own.stop > own.start:
            keys, values = tail_of(tails, session, length)
            offset = length - (own.stop - own.start)
            out[:, own], lse[:, own] = attend(query[:, own], keys, values, offset=offset, **masks)
    return out, lse


def tail_of(tails: PagedTails, session: int, length: int) -> tuple[Tensor, Tensor]:
    """A session's keys and values `[num_kv_heads, length, head_dim]`, copied out of their pages."""
    num_kv_heads, page_tokens, head_dim = tails.keys.shape[1:]
    pages = tails.pages[session, : -(-length // page_tokens)].long()
    whole = (side[pages].transpose(0, 1).reshape(num_kv_heads, -1, head_dim) for side in (tails.keys, tails.values))
    keys, values = (side[:, :length] for side in whole)
    return keys, values


def cascade_attention_reference(
    query: Tensor,
    prefix: Prefixes,
    tails: PagedTails,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of each session's queries over the shared prefix and behind it the session's own tail.

    Arguments as in `prefix_attention_reference` and `paged_attention_reference`; the prefix may come in any
    number of pieces that follow each other.

    Returns:
        `[num_q_heads, num_queries, head_dim]` in the query's dtype.

    Source: cascade inference, https://flashinfer.ai/2024/02/02/cascade-inference.html; Hydragen, arXiv:2402.05099.
    """
    masks: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    pieces = pieces_of(prefix)
    positions = query_positions(tails, sum(piece.num_tokens for piece in pieces), query.shape[1])
    parts = [paged_attention_reference(query, tails, **masks)]
    for piece in pieces:
        parts.append(prefix_attention_reference(query, piece, positions=positions, **masks))
        positions = positions - piece.num_tokens
    lse = torch.stack([part for _, part in parts]).logsumexp(0)[..., None].clamp_min(torch.finfo(parts[0][0].dtype).min)
    return sum(out * torch.exp(part[..., None] - lse) for out, part in parts).to(query.dtype)  # type: ignore[union-attr]


def query_positions(tails: PagedTails, num_prefix_tokens: int, num_queries: int) -> Tensor:
    """Place of each query, counted from the prefix's first token, int32 `[num_queries]`; waits for no device."""
    queries = torch.arange(num_queries, dtype=torch.int32, device=tails.lengths.device)
    session = torch.searchsorted(tails.query_starts, queries, right=True, out_int32=True) - 1
    session = session.clamp(0, tails.lengths.shape[0] - 1)
    behind = tails.lengths - tails.query_starts[1:] + num_prefix_tokens
    return behind[session] + queries
