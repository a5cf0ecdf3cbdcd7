"""Attention of transformers' own networks through a sequence's state: registered with their attention interface.

The state comes as a keyword of the forward, and with it what is told the number of tokens before each layer attends,
and in which layer's keys and values each layer finds its own. What would make a layer attend in another way is refused
by name. Knows no model and no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from cag.errors import UnsupportedModel
from cag.forward.state import AttendingState, KvPlace

ATTENTION_NAME = "cag_segments"
HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "dropout",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""What networks hand their attention that changes nothing for one sequence that is not trained."""


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # noqa: ARG001 - nothing is masked but what the rule of the layer says
    *,
    scaling: float | None = None,
    cag_state: AttendingState | None = None,
    cag_pause: Callable[[int], None] | None = None,
    cag_places: Sequence[KvPlace] | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: `[sequences, heads, tokens, head_dim]` in, `[sequences, tokens, heads,
    head_dim]` out. There are several sequences only where layers are recurrent; those of others lie in one row.

    Queries and keys that are wider than values, or narrower, are served with zeros behind the narrower ones.
    """
    if cag_state is None:
        raise UnsupportedModel(f"{type(module).__name__} hands no keywords to its attention.")
    strange = sorted(name for name in others.keys() - HARMLESS if others[name] is not None)
    if strange or is_causal is False:
        raise UnsupportedModel(
            f"{type(module).__name__} attends in a way of its own: by {', '.join(strange) or 'what comes later'}."
        )
    if cag_pause is not None:
        cag_pause(query.shape[-2])
    width = value.shape[-1]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if width != key.shape[-1]:
        widest = max(width, key.shape[-1])
        query, key, value = (pad(part, (0, widest - part.shape[-1])) for part in (query, key, value))
    place = cag_places[module.layer_idx] if cag_places is not None else KvPlace(module.layer_idx)
    out = cag_state.attend(
        place.layer,
        _side_by_side(query),
        _side_by_side(key),
        _side_by_side(value),
        scale=scale,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        stores=place.stores,
    )
    return out[..., :width].transpose(0, 1).reshape(len(query), -1, len(out), width), None


def _side_by_side(rows: Tensor) -> Tensor:
    """`[sequences, heads, tokens, head_dim]` as `[heads, sequences * tokens, head_dim]`."""
    return rows.transpose(0, 1).flatten(1, 2)


AttentionInterface.register(ATTENTION_NAME, _attend)
