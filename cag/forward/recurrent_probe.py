"""Finding the recurrent layers of a network, and proving that what they know of a sequence is all in our hands.

A network whose layers keep something elsewhere answers a text in pieces otherwise than at once; such a one is refused.
Knows a network's forward as transformers have it; knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from cag.errors import UnsupportedModel
from cag.forward.decoder_layers import CLOSE, relative_difference
from cag.forward.pages import PagedState
from cag.forward.products import Float32Products
from cag.forward.recurrent import RECURRENT, RecurrentLayers, RecurrentStep
from cag.forward.state import SequenceState, WholeState

NEAR = 0.1  # of the logits' norm, where convolutions and states are rounded to 16 bits
PIECES = (5, 1, 6)  # tokens of forwards that follow each other, as blocks and single steps do


class Model(Protocol):
    """What is asked of a `cag.model.LanguageModel`."""

    @property
    def network(self) -> Any:
        """transformers' own."""

    @property
    def vocab_size(self) -> int:
        """Token ids that it knows."""

    def new_state(self) -> WholeState:
        """An empty sequence."""

    def new_session_state(self) -> PagedState:
        """An empty sequence of which several fit into one forward."""

    def forward(self, token_ids: list[int], state: SequenceState, *, num_logits: int) -> Tensor:
        """Logits of new tokens of a sequence."""

    def forward_together(self, chunks: Sequence[tuple[list[int], PagedState]], *, num_logits: Sequence[int]) -> Tensor:
        """Logits of new tokens of several sequences, one behind the other."""


class _Attending:
    """Notes which layers attend; gives back what they ask with."""

    def __init__(self) -> None:
        self.layers: set[int] = set()

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, **_: Any) -> Tensor:  # noqa: ARG002
        self.layers.add(layer)
        return query[..., : values.shape[-1]]


@torch.inference_mode()
def find_recurrent_layers(network: Any, device: torch.device) -> RecurrentLayers:
    """The recurrent layers of a network that has some, seen in a forward of two tokens.

    Raises: UnsupportedModel: layers whose state is not in the cache that they are given, or none that attends.
    """
    attending, config = _Attending(), network.config
    name, ids = config.model_type, torch.zeros(1, 2, dtype=torch.long, device=device)
    step = RecurrentStep([{}], attending)
    positions = torch.arange(2, device=device)[None]
    try:
        network(input_ids=ids, position_ids=positions, use_cache=False, cag_state=step, past_key_values=step)
    except AttributeError as error:  # of a cache or a layer that is made otherwise
        raise UnsupportedModel(f"{name} keeps the state of its layers in a cache of its own: {error}.") from error
    if not attending.layers:
        raise UnsupportedModel(
            f"{name} has no layer with keys and values, and those are what a cache is made of.",
            hint="Take a model that has attention layers, too.",
        )
    found = {int(key.split(".")[1]) for key in step.after}
    kinds = enumerate(config.get_text_config().layer_types)
    silent = [layer for layer, kind in kinds if kind in RECURRENT and layer not in found]
    if silent:
        raise UnsupportedModel(f"{name} keeps the state of its layers {silent} where it cannot be read.")
    numbers = {layer: number for number, layer in enumerate(sorted(attending.layers))}
    return RecurrentLayers(numbers, {key: (tuple(state.shape), state.dtype) for key, state in step.after.items()})


def check_pieces(model: Model, *, exactly: bool) -> None:
    """Whether a network gives the same logits for tokens at once and in pieces, in company and alone, multiplied in
    float32; `exactly`: it computes in float32 besides.

    Raises: UnsupportedModel: it does not.
    """
    texts = [[index * (model.vocab_size // sum(PIECES)) for index in range(sum(PIECES))]]
    texts.append(texts[0][::-1])
    states, first = [model.new_session_state() for _ in texts], 0
    parts: list[list[Tensor]] = [[] for _ in texts]
    with Float32Products():
        whole = [model.forward(ids, model.new_state(), num_logits=0) for ids in texts]
        for count in PIECES:
            chunks = [(ids[first : first + count], state) for ids, state in zip(texts, states, strict=True)]
            found = model.forward_together(chunks, num_logits=[count] * len(texts))
            for part, logits in zip(parts, torch.split_with_sizes(found, [count] * len(texts)), strict=True):
                part.append(logits)
            first += count
    for alone, part in zip(whole, parts, strict=True):
        if not relative_difference(alone, torch.cat(part)) <= (
            CLOSE if exactly else NEAR
        ):  # also where it is no number
            raise UnsupportedModel(
                f"{model.network.config.model_type} answers a text in pieces otherwise than at once: its layers do not "
                "take up the state that stands before a block of tokens, or keep more than that, or not each "
                "sequence's own."
            )
