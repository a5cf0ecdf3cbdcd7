"""Attention of few queries, of one or of many sessions, over one immutable prefix, and over their tails behind it.

The public operations with their checks and their dispatch; what they mean is in `prefix_reference`. On a CUDA device
with Triton the prefix is read where it lies, once for all rows, dequantized in the tile; `prefix_attention` of a plain
prefix goes to `flash-attn` where that is installed. Elsewhere torch serves, through `segment_attention` where it can.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from cag_kernels.attention import COMPILED_MAX_ROWS, segment_attention
from cag_kernels.cpu.attention.segments import (
    MAX_HEAD_DIM,
    cpu_attention,
    cpu_attention_serves,
    cpu_quantized_attention,
    quantized_attention_serves,
)
from cag_kernels.cpu.floats import reads_floats
from cag_kernels.cpu.processor import has_compiler
from cag_kernels.device import HALF_TYPES, num_processors, triton_serves
from cag_kernels.flash import has_flash_attn
from cag_kernels.merge import merge_segments
from cag_kernels.prefix_reference import prefix_attention_reference, query_positions, session_by_session
from cag_kernels.prefixes import (
    BLOCK_TOKENS,
    DensePrefix,
    PagedTails,
    Prefix,
    Prefixes,
    QuantizedPrefix,
    check_prefix,
    check_tails,
    pieces_of,
)
from cag_kernels.wide import wide_paged_attention


def prefix_attention(
    query: Tensor,
    prefix: Prefix,
    *,
    scale: float,
    positions: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    arrivals: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one prefix for the queries of all sessions; see `prefix_reference.prefix_attention_reference`.

    `arrivals`: int32 zeros, one for each key/value head, of which only one call at a time makes use; zeros again behind
    it. With it, one launch may serve where there would be two.

    Raises:
        ValueError: tensors that do not fit together, or a window without positions.
    """
    _check(query, prefix, positions, window)
    _check_arrivals(arrivals, prefix[0])
    kwargs: dict[str, Any] = {"scale": scale, "positions": positions, "window": window, "softcap": softcap}
    path = choose_prefix_path(query, prefix, window=window, softcap=softcap)
    if path == "segment":
        keys, values = prefix[:2]
        return segment_attention(query, keys, values, scale=scale, offset=prefix.num_tokens, softcap=softcap)
    if path == "compiled":
        return _compiled_prefix(query, prefix, scale, window, positions)
    if path == "torch":
        return prefix_attention_reference(query, prefix, **kwargs)
    from cag_kernels.triton.launch import attend

    return attend(query, prefix, None, num_processors(query.device), **kwargs, arrivals=arrivals)


def paged_attention(
    query: Tensor, tails: PagedTails, *, scale: float, window: int | None = None, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of each session's queries over its own tail; see `prefix_reference.paged_attention_reference`.

    Raises:
        ValueError: tensors that do not fit together.
    """
    check_tails(tails, query)
    kwargs: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    if not triton_serves(query):
        if softcap is None and _compiled_tails_serve(query, tails):
            return _compiled_tails(query, tails, scale, window)
        if query.is_cuda:
            return wide_paged_attention(query, tails, **kwargs)
        return session_by_session(query, tails, segment_attention, **kwargs)
    from cag_kernels.triton.launch import attend

    return attend(query, None, tails, num_processors(query.device), positions=None, **kwargs)


def cascade_attention(
    query: Tensor,
    prefix: Prefixes,
    tails: PagedTails,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    arrivals: Tensor | None = None,
) -> Tensor:
    """Attention of all sessions over the shared prefix and each over its own tail, joined by their log-sum-exps.

    See `prefix_reference.cascade_attention_reference`; the prefix may come in any number of pieces.
    A launch a piece and two more on a CUDA device; nothing waits for the host. `arrivals`: as in `prefix_attention`;
    with it the two more may be left out.

    Raises:
        ValueError: tensors that do not fit together.
    """
    check_tails(tails, query)
    pieces = pieces_of(prefix)
    for piece in pieces:
        check_prefix(piece, query.shape[2])
    _check_arrivals(arrivals, tails.keys)
    kwargs: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap}
    num_tokens = sum(piece.num_tokens for piece in pieces)
    positions = None if window is None else query_positions(tails, num_tokens, query.shape[1])
    if triton_serves(query):
        from cag_kernels.triton.launch import attend

        kwargs |= {"positions": positions, "dtype": query.dtype, "arrivals": arrivals}
        return attend(query, pieces, tails, num_processors(query.device), **kwargs)[0]
    parts = []
    for piece in pieces:
        parts.append(prefix_attention(query, piece, positions=positions, **kwargs))
        positions = None if positions is None else positions - piece.num_tokens
    return merge_segments([*parts, paged_attention(query, tails, **kwargs)]).to(query.dtype)


def choose_prefix_path(query: Tensor, prefix: Prefix, *, window: int | None, softcap: float | None) -> str:
    """`"triton"`, `"segment"` (see `attention.choose_path`), `"compiled"` or `"torch"` for these tensors."""
    plain = isinstance(prefix, DensePrefix) and window is None
    if triton_serves(query):
        flash = plain and softcap is None and has_flash_attn()
        return "segment" if flash and query.dtype == prefix[0].dtype and query.dtype in HALF_TYPES else "triton"
    if plain:
        return "segment"
    if softcap is not None:
        return "torch"
    if isinstance(prefix, QuantizedPrefix):
        served = quantized_attention_serves(query, prefix)
    else:
        served = cpu_attention_serves(query, prefix.keys)
    return "compiled" if served else "torch"


def rows_stay_apart(query: Tensor, prefix: Prefix, *, window: int | None = None) -> bool:
    """Whether `prefix_attention` without a cap gives a query the same bits, however many others there are and wherever
    they stand.

    On a CPU compiled code does. Elsewhere it is not promised; on a GPU queries are taken together all the same.
    """
    if query.device.type != "cpu":
        return True
    path = choose_prefix_path(query, prefix, window=window, softcap=None)
    if isinstance(prefix, QuantizedPrefix):
        return path == "compiled"
    rows = query.shape[0] // prefix[0].shape[0] * query.shape[1]
    few_enough = rows <= COMPILED_MAX_ROWS or path == "compiled"
    return few_enough and path != "torch" and cpu_attention_serves(query, prefix[0])


def _compiled_prefix(
    query: Tensor, prefix: Prefix, scale: float, window: int | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    places: dict[str, Any] = {}
    if window is not None and positions is not None:
        places = {"window": window, "positions": positions.contiguous()}
    if isinstance(prefix, QuantizedPrefix):
        return cpu_quantized_attention(query, prefix, scale=scale, **places)
    return cpu_attention(query, *prefix, scale=scale, offset=0, **places)


def _compiled_tails_serve(query: Tensor, tails: PagedTails) -> bool:
    page_tokens = tails.keys.shape[2]
    return (
        query.device.type == "cpu"
        and query.dtype in (torch.float32, torch.bfloat16)
        and all(part.is_contiguous() for part in tails[:5])
        and (page_tokens % BLOCK_TOKENS == 0 or tails.pages.shape[1] == 1)
        and not query.requires_grad
        and has_compiler()
        and reads_floats(tails.keys.dtype)
        and query.shape[2] <= MAX_HEAD_DIM
    )


def _compiled_tails(query: Tensor, tails: PagedTails, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    from cag_kernels.cpu import paged as cpu_paged

    num_q_heads, num_queries, head_dim = query.shape
    out = torch.zeros(num_queries, num_q_heads, head_dim, dtype=torch.float32)
    lse = torch.full((num_q_heads, num_queries), -torch.inf, dtype=torch.float32)
    pages, lengths, starts = (part.numpy() for part in (tails.pages, tails.lengths, tails.query_starts))
    sessions = cpu_paged.Tails(pages, lengths, starts, np.zeros_like(lengths))
    nothing = torch.empty(0, dtype=torch.float32)
    sessions.attend(query.float().contiguous(), *tails[:2], scale, nothing, nothing, out, lse, window=window)
    return out.transpose(0, 1), lse


def _check_arrivals(arrivals: Tensor | None, like: Tensor) -> None:
    """`like`: keys of prefix or tails."""
    num_kv_heads = like.shape[0] if like.ndim == 3 else like.shape[1]
    if arrivals is not None and (
        arrivals.dtype != torch.int32
        or arrivals.device != like.device
        or not arrivals.is_contiguous()
        or arrivals.numel() < num_kv_heads
    ):
        raise ValueError(f"counts of arrivals {arrivals.dtype} {tuple(arrivals.shape)} do not fit {num_kv_heads} heads")


def _check(query: Tensor, prefix: Prefix, positions: Tensor | None, window: int | None) -> None:
    if query.ndim != 3 or prefix[0].ndim != 3 or query.shape[0] % max(1, prefix[0].shape[0]):
        raise ValueError(f"a query {tuple(query.shape)} does not fit keys {tuple(prefix[0].shape)}")
    check_prefix(prefix, query.shape[2])
    if window is not None and (
        positions is None or positions.shape != query.shape[1:2] or positions.dtype != torch.int32
    ):
        raise ValueError(f"a window needs int32 positions of {query.shape[1]} queries")
