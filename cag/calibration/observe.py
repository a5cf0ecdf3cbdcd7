"""What keys and values look like on a text, and how much the model's predictions depend on them.

In: a model and windows of tokens. Out: for each layer the keys before rotation and the values of the tokens, and the
second moment of the gradient of sampled next tokens' log-likelihood by them: the Fisher information, which is the
curvature of the KL divergence
under an error in the cache. Knows no codec.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cag.errors import UnsupportedModel
from cag.forward.recurrent import RecurrentStep, attention_arguments
from cag.forward.state import KvPlace, sides_of
from cag.forward.weights import PackedLinear
from cag.model import LanguageModel
from cag.prefill import prefill
from cag_store.codecs.transform import Rotation

SKIPPED_TOKENS = 4  # attention sinks: codecs keep them exact
_KEPT_WINDOWS = 8  # windows whose rows are kept, for the frequency tables


@dataclass
class LayerSamples:
    """How much predictions depend on one side of one layer.

    reading: `[num_kv_heads, head_dim, head_dim]` float64, the second moment of the output projection's columns that
    read each head of the values; None where it is not known, and for keys.
    metric: `[num_kv_heads, head_dim, head_dim]` float64, a sum over `num_gradients` tokens of outer products of
    gradients.
    """

    num_kv_heads: int
    head_dim: int
    reading: Tensor | None = None
    metric: Tensor = field(init=False)
    num_gradients: int = 0

    def __post_init__(self) -> None:
        self.metric = torch.zeros(self.num_kv_heads, self.head_dim, self.head_dim, dtype=torch.float64)

    def add(self, gradient: Tensor) -> None:
        """Gradients by tokens, `[num_kv_heads, num_tokens, head_dim]`."""
        self.metric += (gradient.transpose(1, 2) @ gradient).double().cpu()
        self.num_gradients += gradient.shape[1]


@dataclass
class GroupSamples:
    """Mean and covariance of one side of a group of layers, and some of the rows themselves.

    A row has the channels of a token, layer by layer, head by head: `num_channels`.
    """

    layers: list[LayerSamples]
    rows: list[Tensor] = field(default_factory=list)
    num_rows: int = 0
    _origin: Tensor | None = None  # near the mean, so that float32 products keep the small variances
    _sum: Tensor = field(init=False)
    _product: Tensor = field(init=False)

    def __post_init__(self) -> None:
        num_channels = sum(layer.num_kv_heads * layer.head_dim for layer in self.layers)
        self._sum = torch.zeros(num_channels, dtype=torch.float64)
        self._product = torch.zeros(num_channels, num_channels, dtype=torch.float32)

    def add(self, arrays: Sequence[Tensor], keep: bool) -> None:
        """Tokens of all layers, each `[num_kv_heads, num_tokens, head_dim]`; they stay as rows if `keep`."""
        rows = torch.cat([array.float().transpose(0, 1).flatten(1) for array in arrays], dim=1)
        if self._origin is None:
            self._origin = rows.mean(0)
            self._product = self._product.to(rows.device)
        centered = rows - self._origin
        self._sum += centered.sum(0, dtype=torch.float64).cpu()
        self._product.addmm_(centered.T, centered)
        self.num_rows += len(rows)
        if keep:
            self.rows.append(rows.to("cpu", torch.bfloat16))

    @property
    def mean(self) -> Tensor:
        """`[num_channels]` float32."""
        assert self._origin is not None
        return self._origin.cpu() + (self._sum / self.num_rows).float()

    @property
    def covariance(self) -> Tensor:
        """`[num_channels, num_channels]` float32."""
        shift = (self._sum / self.num_rows).float()
        return self._product.cpu() / self.num_rows - torch.outer(shift, shift)


class _ObservedSequence:
    """Stands in for a sequence in one forward with gradients: plain causal attention that notes keys and values."""

    def __init__(self) -> None:
        self.arrays: dict[int, tuple[Tensor, ...]] = {}
        self.errors: dict[int, tuple[Tensor, ...]] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        stores: bool = True,
    ) -> Tensor:
        if stores:
            sides = sides_of(keys, values)
            self.arrays[layer] = tuple(side.detach() for side in sides)
            self.errors[layer] = tuple(torch.zeros_like(side, requires_grad=True) for side in sides)
        errors = self.errors[layer]
        moved = (keys + errors[0]).to(query.dtype), (values + errors[-1]).to(query.dtype)
        return _attention(query, *moved, scale, window, softcap, sinks)


def _attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    num_tokens = query.shape[1]
    if softcap is None and sinks is None and (window is None or window >= num_tokens):
        return scaled_dot_product_attention(
            query[None], keys[None], values[None], is_causal=True, scale=scale, enable_gqa=True
        )[0]
    groups = query.shape[0] // keys.shape[0]
    scores = query @ keys.repeat_interleave(groups, 0).transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(num_tokens, device=query.device)
    distance = distance[:, None] - distance
    hidden = (distance < 0) | (distance >= (window or num_tokens))
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, num_tokens, 1)], -1)
    return scores.softmax(-1)[..., :num_tokens] @ values.repeat_interleave(groups, 0)


def observe(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    rotations: Sequence[Rotation],
    layer_rotation: Sequence[int],
    joint_layers: int,
    num_gradient_windows: int,
    seed: int = 0,
    on_window: Callable[[int], None] = lambda _: None,
) -> list[tuple[GroupSamples, ...]]:
    """Samples of keys (before rotation) and values of each group of `joint_layers` layers; of keys alone where they are
    the values, too.

    `num_gradient_windows` of the windows, evenly spread, also give gradients, and some of those their rows. The second
    half of such a window is predicted; the gradients are those by its first half, which stands for a cache.
    `on_window(done)` after each window, with the number of them.

    Raises: UnsupportedModel: what the model computes is not numbers.
    """
    groups = _empty_samples(model, joint_layers)
    generator = torch.Generator(model.device).manual_seed(seed)
    every = -(-len(windows) // max(1, num_gradient_windows))
    for number, window in enumerate(windows):
        gradients: Sequence[Tensor] = ()
        if number % every == 0:
            sequence, gradients = _gradients(model, window, generator)
            arrays = [sequence.arrays[layer] for layer in range(len(model.kv_shapes))]
        else:
            arrays = _arrays(model, window)
        plain = [
            (_plain(keys, layer, rotations, layer_rotation), *(side[:, SKIPPED_TOKENS:] for side in values))
            for layer, (keys, *values) in enumerate(arrays)
        ]
        keep = number % (every * -(-num_gradient_windows // _KEPT_WINDOWS)) == 0
        for first, sides in zip(range(0, len(plain), joint_layers), groups, strict=True):
            for side, group in enumerate(sides):
                group.add([layer[side] for layer in plain[first : first + joint_layers]], keep)
        if gradients:
            _add_gradients(groups, gradients, len(window) // 2, rotations, layer_rotation)
        on_window(number + 1)
    for samples in (samples for sides in groups for samples in sides):
        _check_numbers(samples.covariance, *(layer.metric for layer in samples.layers))
    return groups


def _check_numbers(*tensors: Tensor) -> None:
    """Raises: UnsupportedModel."""
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise UnsupportedModel(
            "what the model computes on the texts of the calibration is not numbers (NaN, or beyond float32), so that "
            "there is no basis for the codec `transform`.",
            hint="Compute in another type (`--dtype`), or take another codec.",
        )


def _empty_samples(model: LanguageModel, joint_layers: int) -> list[tuple[GroupSamples, ...]]:
    shapes = model.kv_shapes
    sides = [[LayerSamples(shape.num_kv_heads, shape.head_dim) for shape in shapes]]
    if shapes[0].sides == 2:
        readings = zip(shapes, _readings(model), strict=True)
        sides.append([LayerSamples(shape.num_kv_heads, shape.head_dim, reading) for shape, reading in readings])
    spans = [slice(first, first + joint_layers) for first in range(0, len(shapes), joint_layers)]
    return [tuple(GroupSamples(side[span]) for side in sides) for span in spans]


def _arrays(model: LanguageModel, window: Sequence[int]) -> list[tuple[Tensor, ...]]:
    """The sides of each layer, without gradients."""
    state = model.new_state(capacity=len(window))
    prefill(model, state, window)
    tail = state.tail
    return [sides_of(*tail.gathered(layer, len(window))) for layer in range(len(tail.shapes))]


def _plain(array: Tensor, layer: int, rotations: Sequence[Rotation], layer_rotation: Sequence[int]) -> Tensor:
    """Keys of a window, or gradients by them, without the rotation of their layer; the first tokens are left out."""
    index = layer_rotation[layer]
    return (_unrotated(array, rotations[index]) if index >= 0 else array)[:, SKIPPED_TOKENS:]


def _add_gradients(
    groups: Sequence[tuple[GroupSamples, ...]],
    gradients: Sequence[Tensor],
    num_tokens: int,
    rotations: Sequence[Rotation],
    layer_rotation: Sequence[int],
) -> None:
    """Gradients by keys and values, layer by layer; only those of the first `num_tokens` tokens count."""
    layers = [sides for group in groups for sides in zip(*(side.layers for side in group), strict=True)]
    found = iter(gradients)
    for layer, (keys, *values) in enumerate(layers):
        keys.add(_plain(next(found)[:, :num_tokens], layer, rotations, layer_rotation).float())
        for side in values:
            side.add(next(found)[:, SKIPPED_TOKENS:num_tokens].float())


def _gradients(
    model: LanguageModel, window: Sequence[int], generator: torch.Generator
) -> tuple[_ObservedSequence, tuple[Tensor, ...]]:
    """Gradients by keys and values, layer by layer, of the log-likelihood of tokens drawn from the model itself."""
    with model.turns.turn(len(window)), torch.enable_grad():
        sequence, output = _observed(model, window, range(len(window)), range(len(window) // 2, len(window)))
        likelihood = output.logits[0].float().log_softmax(-1)
        chances = likelihood.detach().exp()
        _check_numbers(chances)
        drawn = torch.multinomial(chances, 1, generator=generator)
        errors = [error for layer in sorted(sequence.errors) for error in sequence.errors[layer]]
        gradients = torch.autograd.grad(likelihood.gather(1, drawn).sum(), errors)
    return sequence, gradients


def keys_at(model: LanguageModel, token: int, position: int) -> list[Tensor]:
    """Keys of each layer, `[num_kv_heads, 1, head_dim]`, of a text that is one token long and stands at a position."""
    with model.turns.turn(1), torch.no_grad():
        sequence, _ = _observed(model, [token], [position], [0])
    return [sequence.arrays[layer][0] for layer in range(len(model.kv_shapes))]


def _observed(
    model: LanguageModel, token_ids: Sequence[int], positions: Sequence[int], wanted: Sequence[int]
) -> tuple[_ObservedSequence, Any]:
    """A forward of the network itself, of a text without anything before it, with logits of the `wanted` tokens."""
    ids, places, rows = (torch.tensor(numbers, device=model.device) for numbers in (token_ids, positions, wanted))
    sequence = _ObservedSequence()
    step = RecurrentStep([{}], sequence, model.recurrent.numbers) if model.recurrent is not None else None
    output: Any = model.network(
        input_ids=ids[None],
        position_ids=places[None],
        use_cache=False,
        logits_to_keep=rows,
        cag_pause=model.turns.pause,
        cag_places=model.places,
        **attention_arguments(sequence, step),
    )
    return sequence, output


def _unrotated(array: Tensor, rotation: Rotation) -> Tensor:
    """`[num_kv_heads, num_tokens, head_dim]` from position 0 on with the rotation taken off."""
    cosines, sines = (torch.from_numpy(part).to(array.device) for part in rotation.angles(0, array.shape[1]))
    pairs = torch.from_numpy(rotation.pairs).to(array.device)
    first, second = array[..., pairs[:, 0]].float(), array[..., pairs[:, 1]].float()
    turned = array.float().clone()
    turned[..., pairs[:, 0]] = first * cosines + second * sines
    turned[..., pairs[:, 1]] = second * cosines - first * sines
    return turned


def _readings(model: LanguageModel) -> list[Tensor | None]:
    """For each layer the second moment of what reads its values: the last linear layer of its attention that takes all
    query heads."""
    num_q_heads = model.network.config.get_text_config().num_attention_heads
    found: list[Tensor | None] = [None] * len(model.kv_shapes)
    numbers = dict(enumerate(range(len(model.seen)))) if model.recurrent is None else model.recurrent.numbers
    for module in model.network.modules():
        index = numbers.get(getattr(module, "layer_idx", -1))
        if index is None:
            continue
        place = model.places[index] if model.places is not None else KvPlace(index)
        if not place.stores:
            continue
        layer, shape = place.layer, model.kv_shapes[place.layer]
        for child in module.children():
            if isinstance(child, torch.nn.Linear | PackedLinear) and child.in_features == num_q_heads * shape.head_dim:
                heads = child.weight.detach().double().cpu()
                heads = heads.view(len(heads), shape.num_kv_heads, -1, shape.head_dim)
                found[layer] = torch.einsum("ohgi,ohgj->hij", heads, heads)
    return found
