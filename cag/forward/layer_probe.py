"""Looking at a network from outside: what its layers tell the attention, and what a few probe tokens give.

Knows a network's forward as transformers have it; knows no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cag.errors import UnsupportedModel
from cag.forward.decoder import FAR, PROBED_LAYERS
from cag.forward.decoder_layers import CLOSE, SeenLayer, Turning, relative_difference
from cag.forward.recurrent import RecurrentLayers, RecurrentStep, attention_arguments
from cag.forward.state import AttentionRule, KvPlace, KvShape, sides_of
from cag_kernels.rows_reference import rotate_reference

NUM_PROBES = 6  # tokens on which a quick forward is compared with the network's own
_LOUDER = 1024.0  # a cap of the logits shows in logits that are so many times as large

Forward = Callable[[Tensor, Tensor, Sequence[int] | None], Tensor]
"""Logits `[num_tokens, vocab_size]` of ids at positions, both `[num_tokens]`, behind some layers or all (None)."""


class _Through(nn.Module):
    """In the place of a layer that is left out."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """What came in."""
        return hidden


@contextmanager
def only_layers(network: Any, chosen: Sequence[int] | None) -> Iterator[None]:
    """The network has no other layers than the chosen ones inside; they stay in their places."""
    layers = network.model.layers
    if chosen is not None:
        kept = (layer if index in chosen else _Through() for index, layer in enumerate(layers))
        network.model.layers = nn.ModuleList(kept)
    try:
        yield
    finally:
        network.model.layers = layers


@contextmanager
def _louder(head: nn.Module) -> Iterator[None]:
    hook = head.register_forward_hook(lambda _module, _rows, output: output.float() * _LOUDER)
    try:
        yield
    finally:
        hook.remove()


class LayerProbe:
    """Stands in for a sequence in one forward of one token at several positions, and notes what it is given.

    All positions get what the first one is given, so that what a layer reads is the same at all of them.
    """

    def __init__(self) -> None:
        self.rules: dict[int, AttentionRule] = {}
        self.heads: dict[int, Tensor] = {}  # queries and keys, `[num_heads, num_positions, head_dim]`
        self.given: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, kept so that others lie elsewhere
        self.with_sinks: set[int] = set()

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        sinks: Tensor | None = None,
        stores: bool = True,  # noqa: ARG002
        **rule: Any,
    ) -> Tensor:
        """See `cag.forward.state.SequenceState.attend`. Raises: UnsupportedModel: a second time in one layer."""
        if layer in self.given:
            raise UnsupportedModel(f"layer {layer} attends more than once, which is not supported.")
        self.given[layer], self.rules[layer] = (keys, values), AttentionRule(**rule)
        self.heads[layer] = torch.cat([query, keys])
        if sinks is not None:
            self.with_sinks.add(layer)
        return query[:, :1].expand_as(query)

    def places(self) -> list[KvPlace]:
        """In which layer's keys and values, counted among those that make their own, each layer finds its own.

        Raises:
            UnsupportedModel: layers that share keys and values attend to them by other rules.
        """
        found: dict[tuple[int, int], int] = {}
        places: list[KvPlace] = []
        owners: list[int] = []
        for layer, (keys, values) in sorted(self.given.items()):
            place = found.setdefault((keys.data_ptr(), values.data_ptr()), len(found))
            places.append(KvPlace(place, stores=place == len(owners)))
            if place == len(owners):
                owners.append(layer)
            elif self.rules[layer] != self.rules[owners[place]]:
                raise UnsupportedModel(
                    f"layer {layer} shares the keys of layer {owners[place]}, but attends by another rule."
                )
        return places


class RotationProbe:
    """Notes in one forward which of the rotations that a network computes each of its layers is given."""

    def __init__(self) -> None:
        self._computed: list[tuple[tuple[Tensor, Tensor], Turning]] = []
        self.turnings: dict[int, tuple[tuple[Tensor, Tensor], Turning]] = {}

    @contextmanager
    def watching(self, network: Any) -> Iterator[None]:
        """Inside, forwards of the network are seen."""
        model: Any = getattr(network, "model", None)
        hooks = []
        if getattr(model, "rotary_emb", None) is not None and hasattr(model, "layers"):
            hooks.append(model.rotary_emb.register_forward_hook(self._computes, with_kwargs=True))
            for index, layer in enumerate(model.layers):
                hooks.append(layer.register_forward_pre_hook(partial(self._gives, index), with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _computes(self, _module: Any, given: tuple[Any, ...], named: dict[str, Any], angles: Any) -> None:
        others = tuple((name, value) for name, value in named.items() if name not in ("x", "position_ids"))
        self._computed.append((angles, Turning(given[2:], others)))

    def _gives(self, index: int, _module: Any, _given: tuple[Any, ...], named: dict[str, Any]) -> None:
        angles = named.get("position_embeddings")
        found = next((known for known in self._computed if known[0] is angles), None)
        if found is not None:
            self.turnings[index] = found


@dataclass(frozen=True)
class ProbedNetwork:
    """What a network's layers attend with.

    Attributes:
        kv_shapes: keys and values of each layer that makes its own.
        rules: how these are attended to.
        places: of each layer of the network, in which of them it finds its own.
        seen: of each layer of the network, how it attends and turns.
    """

    kv_shapes: list[KvShape]
    rules: list[AttentionRule]
    places: list[KvPlace]
    seen: list[SeenLayer]


@torch.inference_mode()
def probe_network(network: Any, device: torch.device, recurrent: RecurrentLayers | None = None) -> ProbedNetwork:
    """How each layer attends, seen in a forward of one token at two positions: the first, and the last that the network
    has; from here on to latents, where these are what its keys are made of. Where there are `recurrent` layers, only of
    those that attend.

    Raises:
        UnsupportedModel: not every layer attends once, or a layer attends to other tokens than its rule says, or
            positions are not what the network is told.
    """
    from cag.forward.attention_hook import ATTENTION_NAME
    from cag.forward.latent import find_latent_layers
    from cag.forward.mask_probe import check_masks

    probe, rotations, config = LayerProbe(), RotationProbe(), network.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        raise UnsupportedModel(f"{config.model_type} says nowhere how long a prompt may be (max_position_embeddings).")
    find_latent_layers(network, ATTENTION_NAME)
    positions = torch.tensor([[0, most - 1]], device=device)
    ids, wanted = torch.full_like(positions, _loudest_probe(network)), positions.new_zeros(1)
    step = None if recurrent is None else RecurrentStep([{}], probe, recurrent.numbers)
    arguments = attention_arguments(probe, step)
    with rotations.watching(network):
        network(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted, **arguments)
    num_layers = config.num_hidden_layers if recurrent is None else len(recurrent.numbers)
    if sorted(probe.given) != list(range(num_layers)):
        raise UnsupportedModel(
            f"of the {num_layers} layers of {config.model_type} {sorted(probe.given) or 'none'} "
            f"{'attend' if len(probe.given) != 1 else 'attends'} through transformers' attention interface."
        )
    if "position_ids" not in signature(network.forward).parameters:  # of other keywords it says nothing
        raise UnsupportedModel(f"{config.model_type} takes no positions: it would begin again with each block.")
    check_masks(network, int(ids[0, 0]))
    rules = {layer: _needed(rule, most) for layer, rule in probe.rules.items()}
    places = probe.places()
    owners = [layer for layer, place in enumerate(places) if place.stores]
    if recurrent is not None and len(owners) < num_layers:
        raise UnsupportedModel(f"{config.model_type} has recurrent layers, and layers that share keys and values.")
    given = [probe.given[layer] for layer in owners]
    shapes = [KvShape(keys.shape[0], keys.shape[2], len(sides_of(keys, values))) for keys, values in given]
    seen = [_seen(rules[index], probe.heads[index], rotations.turnings.get(index)) for index in range(num_layers)]
    for index in {*range(num_layers)} - {*owners} | probe.with_sinks:
        seen[index] = replace(seen[index], is_otherwise=True)
    return ProbedNetwork(shapes, [rules[layer] for layer in owners], places, seen)


def probe_ids(network: Any) -> Tensor:
    """The probe tokens `[NUM_PROBES]`, spread over the vocabulary."""
    vocab_size: int = network.config.get_text_config().vocab_size
    return torch.arange(NUM_PROBES) * (vocab_size // NUM_PROBES)


def _loudest_probe(network: Any) -> int:
    """The probe token with the longest row: that of a padding token may be all zeros."""
    ids, weight = probe_ids(network), network.get_input_embeddings().weight
    return int(ids[weight[ids.to(weight.device)].float().norm(dim=1).argmax().cpu()])


def _needed(rule: AttentionRule, most: int) -> AttentionRule:
    """Without a window that hides nothing from the longest of sequences."""
    return replace(rule, window=None) if rule.window is not None and rule.window >= most else rule


def _seen(rule: AttentionRule, heads: Tensor, given: tuple[tuple[Tensor, Tensor], Turning] | None) -> SeenLayer:
    """How a layer turns `[num_heads, 2, head_dim]`: not at all, by the rotation that it was given, or in some other
    way."""
    first, last = heads.float().unbind(1)
    if relative_difference(first, last) <= CLOSE:
        return SeenLayer(rule)
    if given is None or given[0][0].shape[-1] != first.shape[-1]:
        return SeenLayer(rule, is_otherwise=True)
    (cosines, sines), turning = given
    turned = rotate_reference(first[:, None], cosines[0, 1:].float(), sines[0, 1:].float())[:, 0]
    is_same = relative_difference(last, turned / cosines[0, 0].float()) <= CLOSE  # at place 0 nothing is turned
    return SeenLayer(rule, turning, is_otherwise=not is_same)


def gives_the_same(network: Any, seen: Sequence[SeenLayer], own: Forward, other: Forward, *, exactly: bool) -> bool:
    """Whether another forward gives the logits of the network's own on probe tokens: closely behind the first layers
    and behind the first of each other kind, and behind all as far as the dtype allows (`exactly`: the network computes
    in float32)."""
    ids, positions = probe_ids(network), torch.arange(NUM_PROBES)
    closely = [list(range(min(PROBED_LAYERS, len(seen))))]
    closely += [[index] for kind in dict.fromkeys(seen) if (index := seen.index(kind)) >= PROBED_LAYERS]
    for chosen, tolerance in (*((one, CLOSE) for one in closely), (None, CLOSE if exactly else FAR)):
        with only_layers(network, chosen), _louder(network.lm_head):
            expected = own(ids, positions, chosen) / _LOUDER
        difference = relative_difference(expected, other(ids, positions, chosen))
        if not difference <= tolerance:  # also where it is no number
            return False
    return True
