"""RoPE that transformers chooses by the length of each sequence, settled once for a network.

LongRoPE has two sets of frequencies, one for sequences within the window that a model was first trained with and one
for longer ones; transformers picks one in each forward. Behind a prefix the pick must not change, or its keys are those
of another RoPE. So a network gets the long set for good, and another one over the same weights the short set.

In: a network as transformers makes it. Knows its rotary embedding; no sequences and no caches.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn

from cag.errors import UnsupportedModel

BY_LENGTH = ("dynamic", "longrope")  # transformers asks in each forward how long the sequence is
Factors = Literal["short", "long"]


def settle_frequencies(network: Any) -> None:
    """Let a position mean the same in sequences of any length up to the network's window, in place.

    `dynamic` changes nothing up to there; LongRoPE gets its long factors, or its short ones where the window is the
    original one.

    Raises:
        UnsupportedModel: the angles depend on the length all the same.
    """
    found = [module for module in network.modules() if getattr(module, "rope_type", None) in BY_LENGTH]
    if not found:
        return
    rotary, config = _rotary_of(network), network.config.get_text_config()
    kind, window = found[0].rope_type, config.max_position_embeddings
    if kind == "longrope" and _original_window(config) < window and found == [rotary]:
        _set_factors(rotary, "long")
    for module in found:
        module.rope_type = "default"  # what transformers looks at before each forward
    if found != [rotary] or _depends_on_length(rotary, window):
        raise UnsupportedModel(
            f"{config.model_type} uses {kind} RoPE in a way of its own: keys of a prefix would change with the "
            "prompt's length."
        )


def short_network(network: Any) -> Any | None:
    """Another network over the same weights, with LongRoPE's short factors and the window that they are for; None for a
    network that has one set of frequencies."""
    rotary = _rotary_of(network)
    if _factors_of(network) is None:
        return None
    rotary, config = copy.deepcopy(rotary), copy.deepcopy(network.config)
    _set_factors(rotary, "short")
    text = config.get_text_config()
    text.max_position_embeddings = _original_window(text)
    short = _with_part(network, "model", _with_part(network.model, "rotary_emb", rotary))
    short.config = config
    return short


def rope_of(network: Any) -> dict[str, Any]:
    """What positions mean in a network's keys; part of a cache's identity."""
    parameters = getattr(network.config.get_text_config(), "rope_parameters", None)
    rope, factors = {"parameters": parameters, "positions": "contiguous from 0"}, _factors_of(network)
    return rope if factors is None else rope | {"factors": factors}


def _rotary_of(network: Any) -> Any:
    return getattr(getattr(network, "model", None), "rotary_emb", None)


def _factors_of(network: Any) -> Factors | None:
    return getattr(_rotary_of(network), "cag_factors", None)


def _original_window(config: Any) -> int:
    return int(config.rope_parameters["original_max_position_embeddings"])


def _set_factors(rotary: Any, factors: Factors) -> None:
    """Computed on the CPU, so that all devices turn by the same angles."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    length = _original_window(rotary.config) + (factors == "long")
    frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](rotary.config, torch.device("cpu"), seq_len=length)
    rotary.inv_freq.copy_(frequencies)
    rotary.cag_factors = factors


def _depends_on_length(rotary: Any, window: int) -> bool:
    """Whether a position has other angles where the last of the window is there, too."""
    positions = torch.tensor([[1, 1], [1, window - 1]], device=rotary.inv_freq.device)
    hidden = torch.zeros(1, 2, 1, device=positions.device)
    near, far = (rotary(hidden, position_ids=row[None]) for row in positions)
    return not all(torch.equal(one[:, 0], other[:, 0]) for one, other in zip(near, far, strict=True))


def _with_part(module: nn.Module, name: str, part: nn.Module) -> Any:
    """A module that shares all but one of its parts with `module`."""
    other = copy.copy(module)
    vars(other)["_modules"] = {**vars(module)["_modules"], name: part}
    return other
