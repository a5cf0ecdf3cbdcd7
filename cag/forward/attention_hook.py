"""Attention of transformers' own networks through a sequence's state: registered with their attention interface.

The state comes as a keyword of the forward, and with it what is told the number of tokens before each layer attends.
Knows no model and no kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from cag.errors import UnsupportedModel
from cag.forward.state import SequenceState

ATTENTION_NAME = "cag_segments"


def _segment_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cag_state: SequenceState,
    cag_pause: Callable[[int], None] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[1, heads, tokens, head_dim]` in, `[1, tokens, heads, head_dim]` out."""
    if s_aux is not None:
        raise UnsupportedModel("the model uses attention sinks, which prefix attention does not support yet.")
    if cag_pause is not None:
        cag_pause(query.shape[-2])
    out = cag_state.attend(
        module.layer_idx,
        query[0],
        key[0],
        value[0],
        scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
    )
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION_NAME, _segment_attention_forward)
