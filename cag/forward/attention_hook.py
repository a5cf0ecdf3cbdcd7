"""Attention of transformers' own networks through a sequence's state: registered with their attention interface.

The state comes as a keyword of the forward, and with it what is told the number of tokens before each layer attends,
and in which layer's keys and values each layer finds its own. What would make a layer attend in another way is refused
by name. Knows no model and no kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from cag.errors import UnsupportedModel
from cag.forward.latent import latent_of
from cag.forward.state import AttendingState, KvPlace

ATTENTION_NAME = "cag_segments"
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values to what the queries find."""

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
    head_dim]` out, contiguous, as networks may want to view it otherwise. There are several sequences only where layers
    are recurrent; those of others lie in one row.

    A layer of latents attends to those. Otherwise queries and keys that are wider than values, or narrower, are served
    with zeros behind the narrower ones.
    """
    if cag_state is None:
        raise UnsupportedModel(f"{type(module).__name__} hands no keywords to its attention.")
    strange = sorted(name for name in others.keys() - HARMLESS if others[name] is not None)
    if strange or is_causal is False:
        raise UnsupportedModel(
            f"{type(module).__name__} attends in a way of its own: by {', '.join(strange) or 'what comes later'}."
        )
    num_sequences, latent = len(query), latent_of(module)
    query, key, value = map(_side_by_side, (query, key, value))
    if latent is not None:  # before others may run the layer
        key = value = latent.kept(key)
    if cag_pause is not None:
        cag_pause(query.shape[-2])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    place = cag_places[module.layer_idx] if cag_places is not None else KvPlace(module.layer_idx)
    rule: dict[str, Any] = {"scale": scale, "window": sliding_window, "softcap": softcap}
    attend: Attend = partial(cag_state.attend, place.layer, **rule, sinks=s_aux, stores=place.stores)
    if latent is None:
        out = _by_heads(attend, query, key, value)
    else:
        out = latent.found(attend(latent.asked(query), key, value)).to(query.dtype)
    return out.transpose(0, 1).contiguous().view(num_sequences, -1, len(out), out.shape[-1]), None


def _side_by_side(rows: Tensor) -> Tensor:
    """`[sequences, heads, tokens, head_dim]` as `[heads, sequences * tokens, head_dim]`."""
    return rows.transpose(0, 1).flatten(1, 2)


def _by_heads(attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What `[heads, tokens, head_dim]` find, whichever of keys and values are the wider ones."""
    width, widest = value.shape[-1], max(value.shape[-1], key.shape[-1])
    if width != key.shape[-1]:
        query, key, value = (pad(part, (0, widest - part.shape[-1])) for part in (query, key, value))
    return attend(query, key, value)[..., :width]


AttentionInterface.register(ATTENTION_NAME, _attend)
