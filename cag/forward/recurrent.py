"""Layers whose memory of a sequence has one size, however long it is: convolutions, state spaces, linear attention.

transformers' layers read and write it through the cache that their forward is given. `RecurrentStep` is that cache for
one forward: it hands out copies and collects what the layers leave, so the tensors of a sequence are never changed and
a forward that fails leaves no trace. Attention layers reach the sequence's keys and values through it as well, counted
among themselves. Knows no text, no store and no network's parts. See docs/design/021-recurrent-layers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

States = Mapping[str, Tensor]
"""What recurrent layers know of a sequence, by `state_name`. The tensors are shared, and never written to."""

ATTENDING = frozenset({"full_attention", "sliding_attention"})
RECURRENT = frozenset({"conv", "linear_attention", "hybrid", "hybrid_sliding"})
STATELESS = frozenset({"moe", "mlp"})  # layers of hybrids that mix no tokens
LARGEST_SHARE = 8  # of the keys and values that stand before a snapshot, the part that it may take within a prefix


def state_name(layer: int, kind: str, index: int) -> str:
    """Of state number `index` of a layer; `kind` is "conv" or "recurrent"."""
    return f"layers.{layer:03d}.{kind}.{index}"


def has_recurrent_layers(config: Any) -> bool:
    """Whether layers of a network remember a sequence otherwise than by keys and values."""
    return not RECURRENT.isdisjoint(getattr(config.get_text_config(), "layer_types", None) or ())


class Attends(Protocol):
    """What attention layers are given."""

    @property
    def attend(self) -> Callable[..., Tensor]:
        """See `cag.forward.state.SequenceState.attend`."""


class Recalls(Protocol):
    """A sequence with what its recurrent layers know."""

    @property
    def recurrent(self) -> States:
        """Behind its last token."""

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""

    def stage(self, states: States) -> None:
        """Behind the new tokens."""


class Remembers(Attends, Protocol):
    """What a forward's layers attend through, of one sequence or of several."""

    @property
    def sequences(self) -> Sequence[Recalls]:
        """Those whose new tokens the forward has: row by row, as many tokens of each."""


@dataclass(frozen=True)
class LayerStates:
    """States of one layer as networks of transformers up to 5.20 reach for them: `cache.layers[3].conv_states[0]`."""

    step: RecurrentStep
    layer: int
    record_past = False  # no states but the last are kept

    @property
    def conv_states(self) -> Numbered:
        """See `RecurrentStep.get_conv_state`."""
        return Numbered(partial(self.step.get_conv_state, self.layer))

    @property
    def recurrent_states(self) -> Numbered:
        """See `RecurrentStep.get_recurrent_state`."""
        return Numbered(partial(self.step.get_recurrent_state, self.layer))


@dataclass(frozen=True)
class Numbered:
    """What `get` gives for each number, in brackets."""

    get: Callable[[int], Any]

    def __getitem__(self, number: int) -> Any:
        return self.get(number)


class RecurrentStep:
    """The cache of one forward, as transformers' layers call it; also what attention layers are given.

    The forward is one of `num_sequences` rows, each a sequence; states have them along their first axis.

    Attributes:
        after: the states that the layers have left, by name.
    """

    def __init__(
        self,
        before: Sequence[States],
        attention: Attends,
        numbers: Mapping[int, int] | None = None,
        *,
        num_tokens: int = 0,
    ) -> None:
        """`before` says what the layers know of each sequence, `numbers` how each attention layer is counted among the
        attention layers; None: as in the network. `num_tokens` stand before the forward, in the longest sequence."""
        self._before, self._attention, self._numbers = before, attention, numbers
        self._num_tokens = num_tokens
        self._layer: int | None = None
        self.after: dict[str, Tensor] = {}

    @property
    def layers(self) -> Numbered:
        """`LayerStates` of each layer."""
        return Numbered(partial(LayerStates, self))

    @property
    def states(self) -> list[States]:
        """What the layers know behind the forward, of each sequence."""
        if len(self._before) == 1:
            return [{**self._before[0], **self.after}]
        return [
            {**before, **{name: state[row : row + 1].clone() for name, state in self.after.items()}}
            for row, before in enumerate(self._before)
        ]

    def attend(self, layer: int, query: Tensor, keys: Tensor, values: Tensor, **rule: Any) -> Tensor:
        """See `Attends`. The layer is the one that gave its keys to `update` before: one module may serve several."""
        layer, self._layer = layer if self._layer is None else self._layer, None
        number = layer if self._numbers is None else self._numbers[layer]
        attended: Tensor = self._attention.attend(number, query, keys, values, **rule)
        return attended

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of new tokens as they came: whoever attends stores them."""
        self._layer = layer_idx
        return keys, values

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The last inputs of a convolution, `[num_sequences, channels, kernel_size]`, to be written to; None before any
        token."""
        return self._own(state_name(layer_idx, "conv", state_idx))

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a recurrence, to be written to; None before any token."""
        return self._own(state_name(layer_idx, "recurrent", state_idx))

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Append inputs `[1, channels, num_new]`; returns those before them and them."""
        size = conv_states.shape[-1] if conv_kernel_size is None else conv_kernel_size
        before = self.get_conv_state(layer_idx, state_idx)
        if before is not None:
            conv_states = torch.cat([before, conv_states], dim=-1)
        elif conv_states.shape[-1] < size:
            conv_states = torch.nn.functional.pad(conv_states, (size - conv_states.shape[-1], 0))
        self.after[state_name(layer_idx, "conv", state_idx)] = conv_states[..., -size:].clone()
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Keep the state behind the new tokens."""
        self.after[state_name(layer_idx, "recurrent", state_idx)] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:  # noqa: ARG002
        """Whether tokens stand before the forward."""
        return bool(self._before[0])

    def is_recording_past(self, _layer_idx: int) -> bool:
        """No states but the last are kept."""
        return False

    def get_seq_length(self, _layer_idx: int = 0) -> int:
        """Tokens before the forward."""
        return self._num_tokens

    def _own(self, name: str) -> Tensor | None:
        if name not in self.after and name in self._before[0]:
            self.after[name] = torch.cat([states[name] for states in self._before])
        return self.after.get(name)


@dataclass(frozen=True)
class RecurrentLayers:
    """The recurrent layers of a network, seen from outside.

    Attributes:
        numbers: of each attention layer, its number among them: what the engine calls a layer.
        shapes: shape and dtype of each state of a sequence, by name.
    """

    numbers: Mapping[int, int]
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the states of one sequence, however long it is."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes.values())

    def places(self, num_tokens: int, kv_bytes_per_token: int, chunk_tokens: int) -> Iterator[int]:
        """Behind which tokens of a prefix its states are kept: at its end, behind each so many chunks that the keys and
        values of those are `LARGEST_SHARE` times as large, and, if the prefix is as long as that, behind its last whole
        chunk, where appended documents begin."""
        stride = chunk_tokens
        while stride * kv_bytes_per_token < LARGEST_SHARE * self.num_bytes:
            stride *= 2
        last_chunk = (num_tokens - 1) // chunk_tokens * chunk_tokens
        yield from range(stride, num_tokens, stride)
        if last_chunk % stride and num_tokens >= stride:
            yield last_chunk
        yield num_tokens


class KeptStates:
    """The states of one sequence behind its last token, and behind the last token that it may go back to."""

    def __init__(self, states: States) -> None:
        """`states` are those before the sequence's own tokens."""
        self._behind: dict[int, States] = {0: states}
        self._marked = 0

    def behind(self, num_tail: int) -> States:
        """Behind the first `num_tail` own tokens: all there are, or those of the mark."""
        return self._behind[num_tail]

    def has(self, num_tail: int) -> bool:
        """Whether `behind` knows."""
        return num_tail in self._behind

    @property
    def num_bytes(self) -> int:
        """Bytes of the states behind own tokens: those before them are the prefix's."""
        return sum(state.nbytes for place, states in self._behind.items() if place for state in states.values())

    def add(self, num_tail: int, states: States) -> None:
        """Behind more tokens. Those that were there stay until `settle`: whoever is interrupted in between finds what
        belongs to the number of tokens that he counts."""
        self._behind[num_tail] = states

    def settle(self, num_tail: int, *, mark: bool = False) -> None:
        """`num_tail` own tokens are counted: forget what is neither behind them nor behind the mark; with `mark` the
        sequence goes back no further than here."""
        self._marked = num_tail if mark else self._marked
        self._behind = {place: self._behind[place] for place in {self._marked, num_tail}}


def attention_arguments(attention: Attends, step: RecurrentStep | None) -> dict[str, Any]:
    """What a network's forward is given so that its layers attend, and, with a `step`, remember."""
    return {"cag_state": attention} if step is None else {"cag_state": step, "past_key_values": step}


@contextmanager
def remembering(attention: Any, layers: RecurrentLayers | None) -> Iterator[dict[str, Any]]:
    """Around a forward of new tokens, whose layers reach keys and values by `attention`, which `Attends`: the arguments
    for it.

    With recurrent `layers` it `Remembers`, too: the arguments let these, and what they know of each sequence is staged
    behind it. All sequences have tokens already, or none has.
    """
    if layers is None:
        yield attention_arguments(attention, None)
        return
    remembering: Remembers = attention
    sequences = remembering.sequences
    before, num_tokens = [sequence.recurrent for sequence in sequences], max(s.num_tokens for s in sequences)
    known = {frozenset(states) for states in before}
    assert len(known) == 1 and (not num_tokens or known == {frozenset(layers.shapes)}), "states are missing"
    step = RecurrentStep(before, remembering, layers.numbers, num_tokens=num_tokens)
    yield attention_arguments(remembering, step)
    for sequence, states in zip(sequences, step.states, strict=True):
        sequence.stage(states)


def by_sequence(branches: Sequence[list[int]], rows: Sequence[int]) -> Iterator[tuple[list[list[int]], list[int]]]:
    """Each branch by itself, with those of the ascending `rows`, counted over all branches, that are its own."""
    first = 0
    for branch in branches:
        last = first + len(branch)
        yield [branch], [row - first for row in rows if first <= row < last]
        first = last
