"""A decoder's layers in a dozen launches each, for few rows on a GPU: five products, four small steps, attention.

Between products a network runs some thirty operators a layer, which take longer than reading its weights does. The
residual stays in float32; products are those of the network, over weights that lie side by side (`join_network`).
Recognized by structure and then checked against the network's own logits, as `cag.forward.decoder` is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cag.forward.decoder_layers import MODEL_PARTS, SeenLayer, Turning, activation_of, parts_of
from cag.forward.state import AttentionRule
from cag.forward.step_tensors import StepState, StepTensors
from cag.forward.weights import joined_weight
from cag_kernels import add_and_norm, gate, rotate_and_store

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True, eq=False)
class Joined:
    """Linear layers side by side: `[out_features, in_features]`, and a bias or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        """`[num_rows, in_features]` to `[num_rows, out_features]`."""
        return nn.functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class DeviceNorm:
    """Weight `[size]` float32, and epsilon."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class DeviceLayer:
    """What one layer computes with."""

    before_attention: DeviceNorm
    before_mlp: DeviceNorm
    projections: Joined
    head_norms: tuple[Tensor | None, Tensor | None]
    head_epsilon: float
    output: Joined
    gate_and_up: Joined
    down: Joined
    rule: AttentionRule


class DeviceDecoder:
    """Runs the rows of a step through all layers of a network with the parts of Llama, Mistral, Qwen 2 or Qwen 3."""

    def __init__(self, network: Any, layers: Sequence[DeviceLayer]) -> None:
        self._network, self._layers = network, layers
        self._norm = _norm(network.model.norm)
        self._dtype = network.lm_head.weight.dtype

    def over(self, network: Any) -> DeviceDecoder:
        """The same layers, turned by the rotary embedding of another network over the same weights."""
        other = copy.copy(self)
        other._network = network
        return other

    def forward(self, tensors: StepTensors, state: StepState, chosen: Sequence[int] | None = None) -> Tensor:
        """Logits of the wanted rows, `[num_wanted, vocab_size]` float32; keys and values go to their pages.

        Only a check runs less than all layers.
        """
        residual = self._network.model.embed_tokens(tensors.ids).float()
        turning = self._network.model.rotary_emb(residual[None], tensors.positions[None])
        rotation = turning[0][0].float().contiguous(), turning[1][0].float().contiguous()
        places, update = (tensors.row_pages, tensors.row_places), None
        for index in range(len(self._layers)) if chosen is None else chosen:
            layer = self._layers[index]
            normed = self._add_and_norm(residual, update, layer.before_attention, layer.projections.weight)
            query = rotate_and_store(
                layer.projections(normed), rotation, state.sides(index), places, layer.head_norms, layer.head_epsilon
            )
            attended = state.attend_stored(index, query, layer.rule)
            update = layer.output(attended.transpose(0, 1).reshape(len(residual), -1))
            normed = self._add_and_norm(residual, update, layer.before_mlp, layer.gate_and_up.weight)
            update = layer.down(gate(layer.gate_and_up(normed), layer.down.weight))
        normed = self._add_and_norm(residual, update, self._norm, self._network.lm_head.weight)
        logits: Tensor = self._network.lm_head(normed[tensors.wanted]).float()
        return logits

    def _add_and_norm(self, residual: Tensor, update: Tensor | None, norm: DeviceNorm, ahead: Tensor) -> Tensor:
        return add_and_norm(residual, update, norm.weight, norm.epsilon, self._dtype, ahead)


def recognize_on_device(network: Any, seen: Sequence[SeenLayer]) -> DeviceDecoder | None:
    """A decoder for a network with plain weights in the parts of Llama, Mistral, Qwen 2 or Qwen 3; None for any other.

    `seen` says how each layer attends, as the network itself told the attention.
    """
    model, head = getattr(network, "model", None), getattr(network, "lm_head", None)
    if model is None or head is None or parts_of(network) != {"model", "lm_head"} or parts_of(model) != MODEL_PARTS:
        return None
    layers = [_layer(module, one) for module, one in zip(model.layers, seen, strict=True)]
    found = [layer for layer in layers if layer is not None]
    return DeviceDecoder(network, found) if found and len(found) == len(layers) else None


def _layer(module: Any, seen: SeenLayer) -> DeviceLayer | None:
    if parts_of(module) != _LAYER or parts_of(module.self_attn) - _HEAD_NORMS != _ATTENTION:
        return None
    attention, mlp = module.self_attn, module.mlp
    if seen.rule.softcap is not None or seen.is_otherwise or seen.turning != Turning():
        return None
    if parts_of(mlp) | {"act_fn"} != _MLP or activation_of(mlp) != "silu":
        return None
    projections = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_and_up = _joined([mlp.gate_proj, mlp.up_proj])
    output, down = _joined([attention.o_proj]), _joined([mlp.down_proj])
    if projections is None or gate_and_up is None or output is None or down is None:
        return None
    norms = [_norm(getattr(attention, name)) if hasattr(attention, name) else None for name in ("q_norm", "k_norm")]
    return DeviceLayer(
        before_attention=_norm(module.input_layernorm),
        before_mlp=_norm(module.post_attention_layernorm),
        projections=projections,
        head_norms=(None if norms[0] is None else norms[0].weight, None if norms[1] is None else norms[1].weight),
        head_epsilon=next((norm.epsilon for norm in norms if norm is not None), 0.0),
        output=output,
        gate_and_up=gate_and_up,
        down=down,
        rule=seen.rule,
    )


def _joined(layers: Sequence[Any]) -> Joined | None:
    weight = joined_weight(layers)
    if weight is None:
        return None
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return Joined(weight, None)
    parts = [weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    return Joined(weight, torch.cat(parts))


def _norm(module: Any) -> DeviceNorm:
    return DeviceNorm(module.weight.detach().float(), float(getattr(module, "variance_epsilon", 0.0)))
