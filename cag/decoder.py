"""A question's forward without a framework's overhead: the layers of a Llama-like network over few rows, on a CPU.

For a dozen rows the calls of a network's hundreds of small operators cost as much as its products. Here a layer is four
products over packed weights, one attention over the prefix, and four compiled steps between them. Recognized by
structure and then checked: a network whose own forward gives other logits keeps its own forward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cag.state import AttentionRule, SequenceState
from cag.weights import PackedLinear, joined_weight
from cag_kernels import FEW_ROWS, PackedWeight, packed_linear, segment_attention

OWN_PAIRS = 2048  # queries x keys of the tail up to which one pass over the tail is quicker than two
TOLERANCE = 1e-2  # of the largest logit: keys a step of bfloat16 apart stay below, another formula far above

_MODEL = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm: weight `[size]` float32, and epsilon."""

    weight: NDArray[Any]
    epsilon: float


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer computes with. `projections` are query, key and value rows side by side."""

    before_attention: Norm
    before_mlp: Norm
    projections: PackedWeight
    projections_bias: Tensor | None
    query_norm: Norm | None
    key_norm: Norm | None
    output: PackedLinear
    gate_and_up: PackedWeight
    gate_and_up_bias: Tensor | None
    down: PackedLinear
    rule: AttentionRule


class FewRowsDecoder:
    """Runs up to `FEW_ROWS` tokens. Not for several threads at once: the model's lock is held around it."""

    def __init__(self, network: Any, layers: list[Layer], head_dim: int) -> None:
        from cag_kernels import cpu_rows

        self._steps = cpu_rows
        self._network = network
        self._layers = layers
        self._head_dim = head_dim
        self._norm = _norm(network.model.norm)
        self._windows = [layer.rule.window for layer in layers if layer.rule.window is not None]

    def serves(self, num_tokens: int, state: SequenceState) -> bool:
        """Whether `forward` takes a forward of `num_tokens` tokens behind `state`."""
        fits = 0 < num_tokens <= FEW_ROWS
        return fits and all(state.num_tokens + num_tokens <= window for window in self._windows)

    def forward(self, token_ids: Tensor, positions: Tensor, state: SequenceState, num_logits: int) -> Tensor:
        """Logits of the last `num_logits` of the tokens (all if 0), `[num_logits, vocab_size]` float32.

        The keys and values of the tokens join the tail's buffers; `token_ids` and `positions` are `[num_tokens]`.
        """
        hidden = self._network.model.embed_tokens(token_ids)
        cosines, sines = self._network.model.rotary_emb(hidden[None], positions[None])
        rotation = cosines[0].float().contiguous().numpy(), sines[0].float().contiguous().numpy()
        update, normed = torch.zeros_like(hidden), torch.empty_like(hidden)
        for index, layer in enumerate(self._layers):
            self._add_and_norm(hidden, update, layer.before_attention, normed)
            update = self._attend(index, layer, normed, rotation, state)
            self._add_and_norm(hidden, update, layer.before_mlp, normed)
            update = self._mlp(layer, normed)
        self._add_and_norm(hidden, update, self._norm, normed)
        logits: Tensor = self._network.lm_head(normed[-num_logits:])
        return logits

    def _add_and_norm(self, hidden: Tensor, update: Tensor, norm: Norm, out: Tensor) -> None:
        self._steps.add_and_norm(hidden.numpy(), update.numpy(), norm.weight, norm.epsilon, out.numpy())

    def _attend(
        self, index: int, layer: Layer, normed: Tensor, rotation: tuple[Any, Any], state: SequenceState
    ) -> Tensor:
        projected = packed_linear(normed, layer.projections, layer.projections_bias)
        keys, values = state.tail.keys[index], state.tail.values[index]
        num_rows, head_dim = normed.shape[0], self._head_dim
        num_q_heads = projected.shape[1] // head_dim - 2 * keys.shape[0]
        for norm, first, count in (
            (layer.query_norm, 0, num_q_heads),
            (layer.key_norm, num_q_heads * head_dim, keys.shape[0]),
        ):
            if norm is not None:
                self._steps.head_norm(projected.numpy(), first, count, norm.weight, norm.epsilon)
        query = projected.new_empty(num_q_heads, num_rows, head_dim)
        tail = keys.view(torch.uint16).numpy(), values.view(torch.uint16).numpy()
        self._steps.rotate_and_store(projected.numpy(), *rotation, query.numpy(), *tail, state.num_tail)
        first, parts, logsumexps = self._attend_before(index, layer, query, state)
        out = normed.new_empty(num_rows, num_q_heads * head_dim)
        self._steps.attend_and_merge(
            query.numpy(),
            *tail,
            first,
            state.num_tail,
            layer.rule.scale,
            parts.numpy(),
            logsumexps.numpy(),
            out.numpy(),
        )
        return packed_linear(out, layer.output.packed, layer.output.bias)

    def _attend_before(
        self, index: int, layer: Layer, query: Tensor, state: SequenceState
    ) -> tuple[int, Tensor, Tensor]:
        """Attention over the prefix, and over a long tail's earlier tokens: from which token of the tail on nothing was
        attended to yet, parts `[num_parts, num_q_heads, num_rows, head_dim]` and their logsumexps."""
        segments = [] if state.prefix is None else [(*state.prefix.layer(index), state.num_tokens)]
        first = 0 if state.num_tail * query.shape[1] <= OWN_PAIRS else state.num_tail
        if first:
            segments.append((state.tail.keys[index][:, :first], state.tail.values[index][:, :first], first))
        parts = [
            segment_attention(query, keys, values, scale=layer.rule.scale, offset=at) for keys, values, at in segments
        ]
        if not parts:
            return first, query.new_empty(0, *query.shape), query.new_empty(0, *query.shape[:2])
        if len(parts) == 1:
            return first, parts[0][0][None], parts[0][1][None]
        return first, torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    def _mlp(self, layer: Layer, normed: Tensor) -> Tensor:
        projected = packed_linear(normed, layer.gate_and_up, layer.gate_and_up_bias)
        gated = projected.new_empty(projected.shape[0], projected.shape[1] // 2)
        self._steps.gate(projected.numpy(), gated.numpy())
        return packed_linear(gated, layer.down.packed, layer.down.bias)


def recognize(network: Any, head_dim: int, rules: Sequence[AttentionRule]) -> FewRowsDecoder | None:
    """A decoder for a packed network with the parts of Llama, Mistral, Qwen 2 or Qwen 3; None for any other.

    `rules` say how each layer attends, as the network itself told the attention.
    """
    if importlib.util.find_spec("numba") is None or not isinstance(getattr(network, "lm_head", None), PackedLinear):
        return None
    model = getattr(network, "model", None)
    if model is None or _children(model) != _MODEL or _children(network) != {"model", "lm_head"}:
        return None
    layers = [_layer(module, rule) for module, rule in zip(model.layers, rules, strict=True)]
    found = [layer for layer in layers if layer is not None]
    return FewRowsDecoder(network, found, head_dim) if found and len(found) == len(layers) else None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _layer(module: Any, rule: AttentionRule) -> Layer | None:
    if _children(module) != _LAYER or _children(module.self_attn) - _HEAD_NORMS != _ATTENTION:
        return None
    attention, mlp = module.self_attn, module.mlp
    if rule.softcap is not None or _children(mlp) - {"act_fn"} != _MLP - {"act_fn"} or not _is_silu(mlp.act_fn):
        return None
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_and_up = [mlp.gate_proj, mlp.up_proj]
    joined, joined_gate = joined_weight(projections), joined_weight(gate_and_up)
    ends_packed = isinstance(attention.o_proj, PackedLinear) and isinstance(mlp.down_proj, PackedLinear)
    if joined is None or joined_gate is None or not ends_packed:
        return None
    return Layer(
        before_attention=_norm(module.input_layernorm),
        before_mlp=_norm(module.post_attention_layernorm),
        projections=joined,
        projections_bias=_joined_bias(projections),
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=attention.o_proj,
        gate_and_up=joined_gate,
        gate_and_up_bias=_joined_bias(gate_and_up),
        down=mlp.down_proj,
        rule=rule,
    )


def _is_silu(activation: Any) -> bool:
    sample = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(sample), nn.functional.silu(sample))


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach().numpy(), float(getattr(module, "variance_epsilon", 0.0)))


def _joined_bias(layers: list[PackedLinear]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([part.detach() for part in parts])


def agrees(expected: Tensor, found: Tensor) -> bool:
    """Whether logits are the same up to the order of float32 sums."""
    return bool((expected - found).abs().max() <= TOLERANCE * expected.abs().max())
