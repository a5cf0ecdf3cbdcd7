"""What the steps of `cpu.rows` and `cpu.paged` mean, in plain torch and any floating dtype: the specification that
tests compare with.

Keys and values are tensors here, in the dtype that they are kept in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cag_kernels.merge import merge_segments
from cag_kernels.prefix_reference import tail_of
from cag_kernels.prefixes import PagedTails
from cag_kernels.reference import segment_attention_reference

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
}
"""What gates there are."""


def add_and_norm_reference(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """`(hidden + update, its RMS norm times weight)`, `[num_rows, size]` each."""
    added = hidden + update
    return added, head_norm_reference(added, weight, epsilon)


def add_normed_reference(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`hidden` and the RMS norm of `update`, times `weight`, added; all `[num_rows, size]`."""
    return hidden + head_norm_reference(update, weight, epsilon)


def head_norm_reference(heads: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last axis, times `weight`."""
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + epsilon) * weight


def rotate_reference(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """RoPE on `[num_heads, num_rows, head_dim]` whose pairs stand half a head apart; cosines, sines `[num_rows,
    head_dim]`."""
    low, high = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-high, low], dim=-1) * sines


def attend_tails_reference(
    query: Tensor,
    tails: PagedTails,
    skipped: list[int],
    scale: float,
    parts: list[tuple[Tensor, Tensor]],
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of each session's rows over its tail behind the first `skipped` tokens, joined with `parts`.
    With a window each row sees so many tokens of its tail at most, its own included.

    `query` is `[num_q_heads, num_rows, head_dim]`. Returns `[num_rows, num_q_heads * head_dim]` and the logsumexps
    `[num_q_heads, num_rows]` of all that a row saw.
    """
    outs, lses = [], []
    for session, length in enumerate(tails.lengths.tolist()):
        rows = slice(*tails.query_starts[session : session + 2].tolist())
        first, count = skipped[session], rows.stop - rows.start
        keys, values = (side[:, first:].to(query.dtype) for side in tail_of(tails, session, length))
        place = {"offset": length - count - first, "window": window}
        own = segment_attention_reference(query[:, rows], keys, values, scale=scale, **place)
        found = [own, *((out[:, rows], lse[:, rows]) for out, lse in parts)]
        outs.append(merge_segments(found))
        lses.append(torch.stack([lse for _, lse in found]).logsumexp(0))
    return torch.cat(outs, dim=1).transpose(0, 1).flatten(1), torch.cat(lses, dim=1)


def gate_reference(projected: Tensor, activation: str = "silu") -> Tensor:
    """`activation(left) * right` of the two halves of the last axis."""
    left, right = projected.chunk(2, dim=-1)
    return ACTIVATIONS[activation](left) * right
