"""What keys and values look like on a text, and how much the model's predictions depend on them.

In: a model and windows of tokens. Out: for each layer the keys before rotation and the values of the tokens, and the
second moment of the gradient of sampled next tokens' log-likelihood by them: the Fisher information, which is the
curvature of the KL divergence
under an error in the cache. Knows no codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cag.model import LanguageModel
from cag_store.codecs.transform import Rotation

SKIPPED_TOKENS = 4  # attention sinks: codecs keep them exact


@dataclass
class LayerSamples:
    """One side of one layer.

    reading: `[num_kv_heads, head_dim, head_dim]` float64, the second moment of the output projection's columns that
    read each head of the
    values; None where it is not known, and for keys.
    rows: `[num_tokens, num_kv_heads * head_dim]` a window.
    metric: `[num_kv_heads, head_dim, head_dim]` float64, a sum over `num_gradients` tokens of outer products of
    gradients.
    """

    num_kv_heads: int
    head_dim: int
    reading: Tensor | None = None
    rows: list[Tensor] = field(default_factory=list)
    metric: Tensor = field(init=False)
    num_gradients: int = 0

    def __post_init__(self) -> None:
        self.metric = torch.zeros(self.num_kv_heads, self.head_dim, self.head_dim, dtype=torch.float64)

    def add(self, array: Tensor, gradient: Tensor) -> None:
        """Rows of a window, and gradients of its first tokens, `[num_kv_heads, num_tokens, head_dim]` each."""
        self.rows.append(array.transpose(0, 1).flatten(1).to("cpu", torch.bfloat16))
        self.metric += (gradient.transpose(1, 2) @ gradient).double().cpu()
        self.num_gradients += gradient.shape[1]


class _ObservedSequence:
    """Stands in for a sequence in one forward with gradients: plain causal attention that notes keys and values."""

    def __init__(self) -> None:
        self.arrays: dict[int, tuple[Tensor, Tensor]] = {}
        self.errors: dict[int, tuple[Tensor, Tensor]] = {}

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
    ) -> Tensor:
        self.arrays[layer] = keys.detach(), values.detach()
        errors = torch.zeros_like(keys, requires_grad=True), torch.zeros_like(values, requires_grad=True)
        self.errors[layer] = errors
        return _attention(query, keys + errors[0], values + errors[1], scale, window, softcap)


def _attention(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    num_tokens = query.shape[1]
    if softcap is None and (window is None or window >= num_tokens):
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
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ values.repeat_interleave(groups, 0)


def observe(
    model: LanguageModel,
    windows: Sequence[Sequence[int]],
    rotations: Sequence[Rotation],
    layer_rotation: Sequence[int],
    seed: int = 0,
) -> list[tuple[LayerSamples, LayerSamples]]:
    """Samples of keys (before rotation) and values of each layer.

    The second half of each window is predicted; the gradients are those by its first half, which stands for a cache.
    """
    readings = _readings(model)
    samples = [
        (LayerSamples(s.num_kv_heads, s.head_dim), LayerSamples(s.num_kv_heads, s.head_dim, reading))
        for s, reading in zip(model.kv_shapes, readings, strict=True)
    ]
    generator = torch.Generator(model.device).manual_seed(seed)
    for window in windows:
        sequence, gradients = _gradients(model, window, generator)
        half = len(window) // 2
        for layer, sides in enumerate(samples):
            index = layer_rotation[layer]
            rotation = rotations[index] if index >= 0 else None
            for side, sample in enumerate(sides):
                array, gradient = sequence.arrays[layer][side], gradients[2 * layer + side]
                if side == 0 and rotation is not None:
                    array, gradient = _unrotated(array, rotation), _unrotated(gradient, rotation)
                sample.add(array[:, SKIPPED_TOKENS:].float(), gradient[:, SKIPPED_TOKENS:half].float())
    return samples


def _gradients(
    model: LanguageModel, window: Sequence[int], generator: torch.Generator
) -> tuple[_ObservedSequence, tuple[Tensor, ...]]:
    """Gradients by keys and values, layer by layer, of the log-likelihood of tokens drawn from the model itself."""
    ids = torch.tensor(window, dtype=torch.long, device=model.device)[None]
    sequence = _ObservedSequence()
    with torch.enable_grad():
        output: Any = model.network(
            input_ids=ids,
            position_ids=torch.arange(len(window), device=model.device)[None],
            use_cache=False,
            logits_to_keep=len(window) - len(window) // 2,
            cag_state=sequence,
        )
        likelihood = output.logits[0].float().log_softmax(-1)
        drawn = torch.multinomial(likelihood.detach().exp(), 1, generator=generator)
        errors = [error for layer in sorted(sequence.errors) for error in sequence.errors[layer]]
        gradients = torch.autograd.grad(likelihood.gather(1, drawn).sum(), errors)
    return sequence, gradients


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
    for module in model.network.modules():
        layer = getattr(module, "layer_idx", None)
        if type(layer) is not int or not 0 <= layer < len(found):
            continue
        shape = model.kv_shapes[layer]
        for child in module.children():
            if isinstance(child, torch.nn.Linear) and child.in_features == num_q_heads * shape.head_dim:
                heads = child.weight.detach().double().cpu()
                heads = heads.view(len(heads), shape.num_kv_heads, -1, shape.head_dim)
                found[layer] = torch.einsum("ohgi,ohgj->hij", heads, heads)
    return found
