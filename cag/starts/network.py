"""The parts of a Llama-like network that the forward of few rows takes its weights from, without transformers.

Named as transformers name them, packed where `cag.forward.weights.pack_network` packs them. Has no forward of its own:
a network's own forward is that of transformers, which takes over the weights that were read here (`adopt_weights`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cag.forward.weights import PackedLinear, WidenedEmbedding
from cag.starts.reading import WeightMemory
from cag.starts.record import EMBEDDING, Start
from cag_kernels import PackedWeight

Weights = Mapping[str, Tensor | PackedWeight]
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("q_norm", "k_norm")


class PlainNorm(nn.Module):
    """An RMS norm."""

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = _parameter(weight), epsilon

    def forward(self, rows: Tensor) -> Tensor:
        """`[..., size]`; what the forward of few rows asks to find out what kind of norm this is."""
        return nn.functional.rms_norm(rows.float(), self.weight.shape, self.weight.float(), self.variance_epsilon)


class PlainRotary(nn.Module):
    """Rotary angles of frequencies that do not change with the length of a sequence."""

    def __init__(self, inverse_frequencies: Tensor, attention_scaling: float) -> None:
        super().__init__()
        self.inv_freq = nn.Buffer(inverse_frequencies, persistent=False)
        self.attention_scaling = attention_scaling

    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[..., num_tokens, head_dim]` at `[..., num_tokens]`, in the dtype of `hidden`."""
        angles = position_ids[..., None].float() * self.inv_freq
        both = torch.cat((angles, angles), dim=-1)
        scaled = both.cos() * self.attention_scaling, both.sin() * self.attention_scaling
        return scaled[0].to(hidden.dtype), scaled[1].to(hidden.dtype)


@dataclass(frozen=True)
class PlainConfig:
    """The few fields of a configuration that answering asks for, named as transformers name them."""

    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any] | None

    def get_text_config(self) -> PlainConfig:
        """Itself."""
        return self


class PlainNetwork(nn.Module):
    """`model` and `lm_head` over the weights of a checkpoint; what `start` says is packed are `PackedWeight`."""

    def __init__(self, start: Start, weights: Weights) -> None:
        super().__init__()
        self.config = PlainConfig(start.num_q_heads, start.vocab_size, start.window_tokens, start.rope_parameters)
        embedding = _embedding(_plain(weights[EMBEDDING]))
        layers = (_layer(f"model.layers.{index}.", start, weights) for index in range(len(start.kv_shapes)))
        frequencies = torch.tensor(start.inverse_frequencies, dtype=torch.float32)
        self.model = _module(
            embed_tokens=WidenedEmbedding(embedding, scale=1) if start.packed else embedding,
            layers=nn.ModuleList(layers),
            norm=_norm("model.norm", start, weights),
            rotary_emb=PlainRotary(frequencies, start.attention_scaling),
        )
        shares = start.is_tied and not start.packed
        self.lm_head = _linear("model.embed_tokens" if shares else "lm_head", start, weights)
        if shares:
            self.lm_head.weight = embedding.weight


def weights_of(memory: WeightMemory, start: Start) -> dict[str, Tensor | PackedWeight]:
    """Weights as views of the memories that they were read to."""
    dtype = getattr(torch, start.stored_dtype)
    bits = [torch.from_numpy(part[: part.size // 2 * 2]).view(dtype) for part in memory.memories]
    found: dict[str, Tensor | PackedWeight] = {}
    for name, (index, first_byte, shape) in memory.places.items():
        behind = bits[index][first_byte // dtype.itemsize :]
        if name in start.packed:
            out_features, in_features = shape
            panels = -(-out_features // start.panel_rows), in_features, start.panel_rows
            found[name] = PackedWeight(behind[: math.prod(panels)].view(panels), out_features)
        else:
            found[name] = behind[: math.prod(shape)].view(shape)
    return found


def adopt_weights(network: nn.Module, plain: PlainNetwork) -> None:
    """Let every parameter of transformers' `network` be that of `plain`, and every packed layer too.

    Raises: ValueError: they have not the same ones.
    """
    for name, module in plain.named_modules():
        if isinstance(module, PackedLinear | WidenedEmbedding):
            if network.get_submodule(name).weight.shape != _shape(module):
                raise ValueError(f"the network has another {name} than its start.")
            network.set_submodule(name, module)
    ours = dict(plain.named_parameters(remove_duplicate=False))
    theirs = dict(network.named_parameters(remove_duplicate=False))
    if {name: value.shape for name, value in ours.items()} != {name: value.shape for name, value in theirs.items()}:
        raise ValueError("the network has other weights than its start.")
    for name, parameter in ours.items():
        module_name, _, part = name.rpartition(".")
        setattr(network.get_submodule(module_name), part, parameter)


def _shape(module: PackedLinear | WidenedEmbedding) -> torch.Size:
    if isinstance(module, PackedLinear):
        return torch.Size((module.out_features, module.in_features))
    return module.weight.shape


def _layer(prefix: str, start: Start, weights: Weights) -> nn.Module:
    norms = {name: f"{prefix}self_attn.{name}" for name in _HEAD_NORMS if f"{prefix}self_attn.{name}" in start.epsilons}
    return _module(
        self_attn=_module(
            **{name: _linear(f"{prefix}self_attn.{name}", start, weights) for name in _ATTENTION},
            **{name: _norm(whole_name, start, weights) for name, whole_name in norms.items()},
        ),
        mlp=_module(**{name: _linear(f"{prefix}mlp.{name}", start, weights) for name in _MLP}, act_fn=nn.SiLU()),
        **{name: _norm(prefix + name, start, weights) for name in _LAYER_NORMS},
    )


def _module(**parts: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        module.add_module(name, part)
    return module


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _plain(weight: Tensor | PackedWeight) -> Tensor:
    """Raises: TypeError: it is packed."""
    if not isinstance(weight, Tensor):
        raise TypeError("a weight is packed that is none of a linear layer.")
    return weight


def _computed(weight: Tensor | PackedWeight, start: Start) -> Tensor:
    """What a norm's weight or a bias is computed with."""
    return _plain(weight).to(getattr(torch, start.compute_dtype))


def _embedding(weight: Tensor) -> nn.Embedding:
    embedding = nn.Embedding(1, 1, _weight=torch.empty(1, 1))  # its own weights are replaced at once
    embedding.num_embeddings, embedding.embedding_dim = weight.shape
    embedding.weight = _parameter(weight)
    return embedding


def _linear(name: str, start: Start, weights: Weights) -> nn.Module:
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    if isinstance(weight, PackedWeight):
        return PackedLinear(weight, None if bias is None else _computed(bias, start))
    layer = nn.Linear(1, 1, bias=bias is not None)  # as above
    layer.out_features, layer.in_features = weight.shape
    layer.weight = _parameter(weight)
    if bias is not None:
        layer.bias = _parameter(_computed(bias, start))
    return layer


def _norm(name: str, start: Start, weights: Weights) -> PlainNorm:
    return PlainNorm(_computed(weights[f"{name}.weight"], start), start.epsilons[name])


def epsilons_of(network: Any) -> dict[str, float]:
    """Epsilon of each norm of a network, by name; of norms as the forward of few rows knows them."""
    return {
        name: float(module.variance_epsilon)
        for name, module in network.named_modules()
        if hasattr(module, "variance_epsilon")
    }
