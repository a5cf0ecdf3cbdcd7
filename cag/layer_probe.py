"""Looking at a network from outside: what its layers tell the attention, and what a few probe tokens give.

Knows a network's forward as transformers have it; knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cag.decoder import CLOSE, FAR, PROBED_LAYERS, relative_difference
from cag.errors import UnsupportedModel
from cag.state import AttentionRule, KvShape

NUM_PROBES = 6  # tokens on which a quick forward is compared with the network's own

Forward = Callable[[Tensor, Tensor, int | None], Tensor]
"""Logits `[num_tokens, vocab_size]` of ids at positions, both `[num_tokens]`, behind the first layers or all (None)."""


@contextmanager
def first_layers(network: Any, count: int | None) -> Iterator[None]:
    """The network ends behind its first `count` layers inside."""
    layers = network.model.layers
    network.model.layers = layers[:count]
    try:
        yield
    finally:
        network.model.layers = layers


class LayerProbe:
    """Stands in for a sequence in one forward and notes what it is given."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[KvShape, AttentionRule]] = {}

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, **rule: Any) -> Tensor:
        """See `cag.state.SequenceState.attend`.

        Raises:
            UnsupportedModel: keys and values of different sizes.
        """
        if keys.shape != values.shape or keys.shape[-1] != query.shape[-1]:
            raise UnsupportedModel(f"layer {layer} has keys {tuple(keys.shape)} and values {tuple(values.shape)}.")
        self.layers[layer] = KvShape(keys.shape[0], keys.shape[2]), AttentionRule(**rule)
        return query


@torch.inference_mode()
def probed_layers(network: Any, device: torch.device) -> list[tuple[KvShape, AttentionRule]]:
    """Shapes of keys and values in each layer and how it attends, seen in a forward of one token.

    Raises:
        UnsupportedModel: not every layer attends with keys and values of its own.
    """
    probe = LayerProbe()
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    network(input_ids=ids, position_ids=ids, use_cache=False, logits_to_keep=1, cag_state=probe)
    num_layers = network.config.get_text_config().num_hidden_layers
    if sorted(probe.layers) != list(range(num_layers)):
        raise UnsupportedModel(
            f"of {num_layers} layers only {sorted(probe.layers)} use standard attention; "
            "layers that share or replace keys and values are not supported."
        )
    return [probe.layers[index] for index in range(num_layers)]


def probe_ids(network: Any) -> Tensor:
    """The probe tokens `[NUM_PROBES]`, spread over the vocabulary."""
    vocab_size = int(network.config.get_text_config().vocab_size)
    return torch.arange(NUM_PROBES) * (vocab_size // NUM_PROBES)


def gives_the_same(network: Any, own: Forward, other: Forward, *, exactly: bool) -> bool:
    """Whether another forward gives the logits of the network's own on probe tokens: closely behind two layers, and
    behind all as far as the dtype allows (`exactly`: the network computes in float32)."""
    ids, positions = probe_ids(network), torch.arange(NUM_PROBES)
    for num_layers, tolerance in ((PROBED_LAYERS, CLOSE), (None, CLOSE if exactly else FAR)):
        with first_layers(network, num_layers):
            expected = own(ids, positions, num_layers)
        difference = relative_difference(expected, other(ids, positions, num_layers))
        if not difference <= tolerance:  # also where it is no number
            return False
    return True
