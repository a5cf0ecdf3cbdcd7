"""What the layers of a network compute with, as data: the parts of Llama, and of those that differ from it in their
norms, their gates, their rotations or in which weights are one.

In: a network's modules, and what was seen of each layer from outside (`cag.forward.layer_probe`). A formula is found
out by asking a module, never by the name of its class; where nothing known fits, there is no layer. Runs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cag.forward.state import AttentionRule
from cag.forward.weights import Product, joined_product, tile_mlp
from cag_kernels.rows_reference import ACTIVATIONS, head_norm_reference

if TYPE_CHECKING:
    from cag_kernels.cpu.products.tile_mlp import TileMlp

CLOSE = 2e-2  # of a norm; what 16 bits round in a formula or two is far below, another formula far above

MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
NORMS = (  # which parts of a layer stand before attention, behind it, before the MLP, behind it
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)
_BLOCKS = {"self_attn", "mlp"}
_HEAD_NORMS = ("q_norm", "k_norm")
_PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))
_GATE_AND_UP = (("gate_proj", "up_proj"), ("gate_up_proj",))
_ACTIVATIONS = ("act_fn", "activation_fn")


@dataclass(frozen=True, eq=False)
class Norm:
    """An RMS norm: what is multiplied by, `[size]` float32, and epsilon."""

    weight: NDArray[Any]
    epsilon: float


@dataclass(frozen=True)
class Turning:
    """What a layer's queries and keys are turned by: what the network asks its `rotary_emb` for that layer, besides
    rows and positions."""

    arguments: tuple[Any, ...] = ()
    named: tuple[tuple[str, Any], ...] = ()

    def angles(self, rotary_emb: Callable[..., Any], hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[num_rows, head_dim]` float32, of rows `[num_rows, size]` at int64 positions."""
        cosines, sines = rotary_emb(hidden[None], positions[None], *self.arguments, **dict(self.named))
        return cosines[0].float().contiguous(), sines[0].float().contiguous()


Rotations = dict[Turning | None, tuple[Tensor, Tensor]]
"""Cosines and sines `[num_rows, head_dim]` float32 for each way in which a network's layers turn."""


@dataclass(frozen=True)
class SeenLayer:
    """What a layer tells the attention: its rule, and how queries and keys were turned; None where they were not, and
    `is_otherwise` where no known way gives what was seen, or the layer has sinks or the keys of another one."""

    rule: AttentionRule
    turning: Turning | None = None
    is_otherwise: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer computes with.

    A norm before a block makes what the block reads, one behind it is over what the block gives, before that is added.
    `projections` are query, key and value rows side by side; `activation` is one of `rows_reference.ACTIVATIONS`; `mlp`
    is the last two products with the gate between them, where tiles do that in one.
    """

    before_attention: Norm | None
    behind_attention: Norm | None
    before_mlp: Norm | None
    behind_mlp: Norm | None
    projections: Product
    query_norm: Norm | None
    key_norm: Norm | None
    output: Product
    gate_and_up: Product
    down: Product
    activation: str
    mlp: TileMlp | None
    rule: AttentionRule
    turning: Turning | None

    @property
    def products(self) -> tuple[Product, ...]:
        """All of them."""
        return self.projections, self.output, self.gate_and_up, self.down

    def num_q_heads(self, head_dim: int) -> int:
        """Heads of the query: what the output projection takes."""
        return self.output.in_features // head_dim

    def head_norms(self, num_kv_features: int) -> list[tuple[Norm, int, int]]:
        """Norms over parts of the projections: a norm, the first column that it is over, and how many times it follows
        itself (a norm may be of a head, or of all heads together)."""
        num_q_features = self.output.in_features
        found = (self.query_norm, 0, num_q_features), (self.key_norm, num_q_features, num_kv_features)
        return [(norm, first, size // len(norm.weight)) for norm, first, size in found if norm is not None]


class Unknown(Exception):
    """A network has a part that is none of those known here. Does not leave this module's callers."""


def layers_of(network: Any, seen: Sequence[SeenLayer], norm_of: NormReader, kind: str) -> list[Layer]:
    """The layers of a network; `kind` as in `joined_product`.

    Raises:
        Unknown: one of them computes something else.
    """
    return [_layer(module, one, norm_of, kind) for module, one in zip(network.model.layers, seen, strict=True)]


def parts_of(module: nn.Module) -> set[str]:
    """Names of a module's own parts that compute something."""
    return {name for name, part in module.named_children() if not isinstance(part, nn.Dropout | nn.Identity)}


def activation_of(mlp: Any) -> str | None:
    """Which of `rows_reference.ACTIVATIONS` a gated MLP has; None if it has another one."""
    function = next((getattr(mlp, name) for name in _ACTIVATIONS if hasattr(mlp, name)), None)
    if function is None:
        return None
    sample = torch.linspace(-4, 4, 9, dtype=torch.float32)
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(function(sample), known(sample))), None)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    return float((expected - found).norm() / expected.norm())


class NormReader:
    """Reads RMS norms; whether it is 1 that a weight is added to is asked of the first module of each class."""

    def __init__(self) -> None:
        self._added: dict[type, float] = {}

    def __call__(self, module: Any) -> Norm:
        """Raises: Unknown: the module is no RMS norm."""
        kind, epsilon = type(module), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if epsilon is None or not isinstance(getattr(module, "weight", None), Tensor):
            raise Unknown(kind)
        if kind not in self._added:
            self._added[kind] = _added_to_weight(module, float(epsilon))
        weight, added = module.weight.detach().float(), self._added[kind]
        return Norm((weight + added if added else weight).numpy(), float(epsilon))


@torch.no_grad()
def _added_to_weight(module: Any, epsilon: float) -> float:
    """0 or 1, whichever gives what the module makes of rows of numbers, large ones and such that epsilon counts."""
    weight = module.weight.detach()
    large = torch.arange(2 * len(weight), dtype=torch.float32).sin().view(2, -1)
    rows = (large * torch.tensor([[1.0], [1e-3]], dtype=torch.float32)).to(weight.dtype)
    found = module(rows).float()
    misses = {
        added: relative_difference(found, head_norm_reference(rows.float(), weight.float() + added, epsilon))
        for added in (0.0, 1.0)
    }
    nearest = min(misses, key=lambda added: misses[added])
    if not misses[nearest] <= CLOSE:
        raise Unknown(type(module))
    return nearest


def _layer(module: Any, seen: SeenLayer, norm_of: NormReader, kind: str) -> Layer:
    if seen.is_otherwise or seen.rule.softcap is not None or not parts_of(module) >= _BLOCKS:
        raise Unknown(type(module))
    attention, mlp = module.self_attn, module.mlp
    projections, output = _products(attention, _PROJECTIONS, "o_proj", _HEAD_NORMS, kind)
    gate_and_up, down = _products(mlp, _GATE_AND_UP, "down_proj", _ACTIVATIONS, kind)
    if (activation := activation_of(mlp)) is None:
        raise Unknown(type(mlp))
    heads = [getattr(attention, name, None) for name in _HEAD_NORMS]
    query_norm, key_norm = (None if head is None else norm_of(head) for head in heads)
    before_attention, behind_attention, before_mlp, behind_mlp = _norms(module, norm_of)
    return Layer(
        before_attention=before_attention,
        behind_attention=behind_attention,
        before_mlp=before_mlp,
        behind_mlp=behind_mlp,
        projections=projections,
        query_norm=query_norm,
        key_norm=key_norm,
        output=output,
        gate_and_up=gate_and_up,
        down=down,
        activation=activation,
        mlp=tile_mlp(gate_and_up, down, activation),
        rule=seen.rule,
        turning=seen.turning,
    )


def _norms(module: Any, norm_of: NormReader) -> list[Norm | None]:
    """In the order of `NORMS`."""
    for roles in NORMS:
        if parts_of(module) - _BLOCKS == {name for name in roles if name is not None}:
            return [None if name is None else norm_of(getattr(module, name)) for name in roles]
    raise Unknown(type(module))


def _products(
    block: Any, first: Sequence[tuple[str, ...]], last: str, others: Sequence[str], kind: str
) -> tuple[Product, Product]:
    """What multiplies the input of a block, in one of the ways that it may be cut up, and what gives its output."""
    parts = parts_of(block) - set(others)
    for names in first:
        if parts == {*names, last}:
            products = [joined_product([getattr(block, name) for name in group], kind) for group in (names, (last,))]
            if products[0] is not None and products[1] is not None:
                return products[0], products[1]
    raise Unknown(type(block))
