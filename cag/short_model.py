"""The model for sequences within the window that it was first trained with, where its RoPE has other frequencies for
those (LongRoPE): one more `LanguageModel` over the same weights.

A sequence is read by one of the two from its first token to its last (docs/design/022-rope-that-depends-on-length.md).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cag.forward.replays import StepReplays
from cag.forward.rope import short_network

if TYPE_CHECKING:
    from cag.model import LanguageModel


def short_model(model: LanguageModel) -> LanguageModel | None:
    """`model` for short sequences; None where it is the same for all. Weights, turns, pages and quick forwards are
    shared: all that differs is the network's rotary embedding and its window."""
    network = short_network(model._network)
    if network is None:
        return None
    short = copy.copy(model)
    short._network, short.short = network, None
    short.decoder = model.decoder and model.decoder.over(network)
    short.device_decoder = model.device_decoder and model.device_decoder.over(network)
    if model.replays is not None:
        short.replays = StepReplays(short.run_step, model.pages, model.device, capture=model.replays.records)
    return short


def for_length(model: LanguageModel, num_tokens: int) -> LanguageModel:
    """What reads a sequence that will have up to `num_tokens` tokens, its answer included."""
    short = model.short
    return short if short is not None and num_tokens <= short.window_tokens else model


def with_rope(model: LanguageModel, rope: Mapping[str, Any]) -> LanguageModel:
    """What reads behind keys of a RoPE configuration; `model` where they are of none of its own."""
    short = model.short
    return short if short is not None and short.rope == dict(rope) else model
