"""A forward of few rows without a framework's overhead: the layers of a Llama-like network on a CPU.

For a dozen rows the calls of a network's hundreds of small operators cost as much as its products. Here a layer is four
products, one attention over each prefix, and four compiled steps between them; what is passed on between layers is
float32 also where products are of bfloat16. The rows may be of many sequences (`cag.batch`). Recognized by structure
and then checked: a network whose own forward gives other logits keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cag.batch import Batch, RowGroup
from cag.choices import GreedyChoice
from cag.recorded import RecordedForwards, attends_by_tiles, attends_rounded
from cag.state import AttentionRule, PrefixSegment, SequenceState, attend_prefix
from cag.weights import Product, is_tile_product, joined_product, tile_mlp
from cag_kernels import FEW_ROWS, DensePrefix, has_numba
from cag_kernels.attention import COMPILED_MAX_ROWS
from cag_kernels.cpu import cpu_attention, cpu_attention_serves

if TYPE_CHECKING:
    from cag_kernels.cpu_tile_mlp import TileMlp

PROBED_LAYERS = 2  # compared closely; behind all layers a network in bfloat16 may be far from itself in float32
CLOSE, FAR = 2e-2, 0.5  # of the logits' norm; another formula is far above the first after two layers

MODEL_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
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
    """What one layer computes with. `projections` are query, key and value rows side by side; `mlp` is the last two
    products with the gate between them, where tiles do that in one."""

    before_attention: Norm
    before_mlp: Norm
    projections: Product
    query_norm: Norm | None
    key_norm: Norm | None
    output: Product
    gate_and_up: Product
    down: Product
    mlp: TileMlp | None
    rule: AttentionRule

    @property
    def products(self) -> tuple[Product, ...]:
        """All of them."""
        return self.projections, self.output, self.gate_and_up, self.down

    def num_q_heads(self, head_dim: int) -> int:
        """Heads of the query: what the output projection takes."""
        return self.output.in_features // head_dim


class FewRowsDecoder:
    """Runs up to `FEW_ROWS` tokens of each sequence. Not for several threads at once: the model's lock is held.

    Attributes:
        rows_stay_apart: whether a row has the same bits whatever other rows there are: where tiles multiply and attend.
    """

    def __init__(
        self, network: Any, layers: list[Layer], head: Product, head_dim: int, attends_in: torch.dtype
    ) -> None:
        from cag_kernels import cpu_paged, cpu_rows

        self._steps = cpu_rows
        self._tails = cpu_paged.Tails
        self._network = network
        self._layers = layers
        self._head = head
        self._head_dim = head_dim
        self._attends_in = attends_in
        self._norm = _norm(network.model.norm)
        self.choice = GreedyChoice(head)
        self._recorded = RecordedForwards(layers, self._norm, head_dim, attends_in)
        products = [head, *(product for layer in layers for product in layer.products)]
        self.rows_stay_apart = attends_by_tiles(head_dim, attends_in) and all(map(is_tile_product, products))
        self._windows = [layer.rule.window for layer in layers if layer.rule.window is not None]

    def rows_left(self, state: SequenceState) -> int:
        """How many more tokens of a sequence `forward` takes, one by one or together."""
        return max(0, min([FEW_ROWS, *(window - state.num_tokens for window in self._windows)]))

    def serves(self, batch: Batch) -> bool:
        """Whether `forward` takes a batch."""
        return all(0 < count <= self.rows_left(state) for state, count in zip(batch.states, batch.counts, strict=True))

    def forward(
        self, token_ids: Tensor, batch: Batch, wanted: list[int] | slice, num_layers: int | None = None
    ) -> Tensor:
        """Logits of the `wanted` rows of a batch, `[num_wanted, vocab_size]` float32.

        The keys and values of the tokens go to the pages of their sequences; `token_ids` is `[num_rows]`. Only a check
        runs less than all layers.
        """
        return self._head(self._hidden(token_ids, batch, num_layers)[_as_slice(wanted)])

    def choose(self, token_ids: Tensor, batch: Batch, wanted: list[int]) -> list[int]:
        """Of the `wanted` rows of a batch the token with the largest logit, the lowest of equal ones. As `forward`."""
        return self.choice(self._hidden(token_ids, batch, None)[_as_slice(wanted)])

    def _hidden(self, token_ids: Tensor, batch: Batch, num_layers: int | None) -> Tensor:
        """Normalized rows behind the layers, until the next forward."""
        hidden = self._network.model.embed_tokens(token_ids).float()
        cosines, sines = self._network.model.rotary_emb(hidden[None], batch.positions(hidden.device)[None])
        turning = cosines[0].float().contiguous(), sines[0].float().contiguous()
        normed = self._recorded.forward(hidden, turning, batch, num_layers)
        if normed is None:
            normed = self._step_by_step(hidden, turning, batch, num_layers)
        return normed

    def _step_by_step(
        self, hidden: Tensor, turning: tuple[Tensor, Tensor], batch: Batch, num_layers: int | None
    ) -> Tensor:
        """As `RecordedForwards.forward`, for any batch."""
        rotation = turning[0].numpy(), turning[1].numpy()
        tails = self._tails(batch.pages, batch.lengths, batch.starts, batch.skipped)
        update, normed = torch.zeros_like(hidden), torch.empty_like(hidden)
        residual, out = hidden.numpy(), normed.numpy()
        for index, layer in enumerate(self._layers[:num_layers]):
            self._add_and_norm(residual, update, layer.before_attention, out)
            update = self._attend(index, layer, normed, rotation, batch, tails)
            self._add_and_norm(residual, update, layer.before_mlp, out)
            update = self._mlp(layer, normed)
        self._add_and_norm(residual, update, self._norm, out)
        return normed

    def _add_and_norm(self, residual: NDArray[Any], update: Tensor, norm: Norm, out: NDArray[Any]) -> None:
        self._steps.add_and_norm(residual, update.numpy(), norm.weight, norm.epsilon, out)

    def _attend(
        self, index: int, layer: Layer, normed: Tensor, rotation: tuple[Any, Any], batch: Batch, tails: Any
    ) -> Tensor:
        projected = layer.projections(normed)
        keys, values = batch.sides(index)
        num_rows, head_dim, num_kv_heads = normed.shape[0], self._head_dim, keys.shape[1]
        num_q_heads = projected.shape[1] // head_dim - 2 * num_kv_heads
        for norm, first, count in (
            (layer.query_norm, 0, num_q_heads),
            (layer.key_norm, num_q_heads * head_dim, num_kv_heads),
        ):
            if norm is not None:
                self._steps.head_norm(projected.numpy(), first, count, norm.weight, norm.epsilon)
        query = projected.new_empty(num_q_heads, num_rows, head_dim)
        pool = keys.view(torch.uint16).numpy(), values.view(torch.uint16).numpy()
        self._steps.rotate_and_store(
            projected.numpy(), *rotation, query.numpy(), *pool, batch.row_pages, batch.row_places
        )
        out, logsumexps = normed.new_empty(num_rows, num_q_heads * head_dim), query.new_empty(num_q_heads, num_rows)
        for group in batch.groups:
            parts = self._attend_before(index, layer, query, batch, group)
            sessions = group.sequences.start, group.sequences.stop
            tails.attend(query, keys, values, layer.rule.scale, *parts, out, logsumexps, sessions)
        return layer.output(out)

    def _attend_before(
        self, index: int, layer: Layer, query: Tensor, batch: Batch, group: RowGroup
    ) -> tuple[Tensor, Tensor]:
        """Attention of a group's rows over its prefix, and over a long tail's earlier tokens: parts `[num_parts,
        num_q_heads, num_rows, head_dim]` and their logsumexps."""
        segments = [] if group.prefix is None else list(group.prefix.segments(index))
        segments += batch.earlier(group, index)
        own = query if len(batch.groups) == 1 else query[:, group.rows]
        if not segments:
            return query.new_empty(0, *own.shape), query.new_empty(0, *own.shape[:2])
        parts = self._over_segments(own, segments, layer.rule.scale)
        if len(parts) == 1:
            return parts[0][0][None], parts[0][1].contiguous()[None]
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    def _over_segments(self, query: Tensor, segments: list[PrefixSegment], scale: float) -> list[tuple[Tensor, Tensor]]:
        """As `attend_prefix`, in blocks of rows that compiled attention takes."""
        rounded = self._rounded(query, segments[0])
        most = COMPILED_MAX_ROWS * segments[0][0].shape[0] // query.shape[0]
        if query.shape[1] <= most:
            return [self._over_segment(rounded, segment, scale) for segment in segments]
        blocks = [attend_prefix(block, segments, scale) for block in torch.split(rounded, most, dim=1)]
        return [
            (torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1))
            for parts in zip(*blocks, strict=True)
        ]

    def _over_segment(self, query: Tensor, segment: PrefixSegment, scale: float) -> tuple[Tensor, Tensor]:
        if isinstance(segment, DensePrefix) and cpu_attention_serves(query, segment.keys):
            return cpu_attention(query, *segment, scale=scale, offset=segment.num_tokens)
        return attend_prefix(query, [segment], scale)[0]

    def _rounded(self, query: Tensor, segment: PrefixSegment) -> Tensor:
        """The query in the type that the network attends in; unrounded where only code for a few float32 rows serves a
        single token quickly."""
        return query.to(self._attends_in) if attends_rounded(query, segment, self._attends_in) else query

    def _mlp(self, layer: Layer, normed: Tensor) -> Tensor:
        if layer.mlp is not None:
            return layer.mlp(normed)
        projected = layer.gate_and_up(normed)
        gated = projected.new_empty(projected.shape[0], projected.shape[1] // 2)
        self._steps.gate(projected.numpy(), gated.numpy())
        return layer.down(gated)


def _as_slice(rows: list[int] | slice) -> list[int] | slice:
    """Rows that are neighbours as a slice: a list would become a tensor first."""
    if isinstance(rows, slice) or rows != list(range(rows[0], rows[0] + len(rows))):
        return rows
    return slice(rows[0], rows[-1] + 1)


def recognize(
    network: Any, head_dim: int, rules: Sequence[AttentionRule], kind: str = "transposed"
) -> FewRowsDecoder | None:
    """A decoder for a network with the parts of Llama, Mistral, Qwen 2 or Qwen 3; None for any other.

    Its weights are packed, or plain in bfloat16; `kind` is that of `cag.weights.joined_product`, `rules` say how each
    layer attends, as the network itself told the attention.
    """
    model, head = getattr(network, "model", None), getattr(network, "lm_head", None)
    if not has_numba() or model is None or head is None:
        return None
    if parts_of(model) != MODEL_PARTS or parts_of(network) != {"model", "lm_head"}:
        return None
    layers = [_layer(module, rule, kind) for module, rule in zip(model.layers, rules, strict=True)]
    found = [layer for layer in layers if layer is not None]
    product = joined_product([head], kind)
    if product is None or not found or len(found) != len(layers):
        return None
    computes_in = model.layers[0].input_layernorm.weight.dtype
    return FewRowsDecoder(network, found, product, head_dim, computes_in)


def parts_of(module: nn.Module) -> set[str]:
    """Names of a module's own parts."""
    return {name for name, _ in module.named_children()}


def _layer(module: Any, rule: AttentionRule, kind: str) -> Layer | None:
    if parts_of(module) != LAYER_PARTS or parts_of(module.self_attn) - _HEAD_NORMS != _ATTENTION:
        return None
    attention, mlp = module.self_attn, module.mlp
    if rule.softcap is not None or not is_gated_by_silu(mlp):
        return None
    projections = joined_product([attention.q_proj, attention.k_proj, attention.v_proj], kind)
    output = joined_product([attention.o_proj], kind)
    gate_and_up = joined_product([mlp.gate_proj, mlp.up_proj], kind)
    down = joined_product([mlp.down_proj], kind)
    if projections is None or output is None or gate_and_up is None or down is None:
        return None
    return Layer(
        before_attention=_norm(module.input_layernorm),
        before_mlp=_norm(module.post_attention_layernorm),
        projections=projections,
        query_norm=_norm(attention.q_norm) if hasattr(attention, "q_norm") else None,
        key_norm=_norm(attention.k_norm) if hasattr(attention, "k_norm") else None,
        output=output,
        gate_and_up=gate_and_up,
        down=down,
        mlp=tile_mlp(gate_and_up, down),
        rule=rule,
    )


def is_gated_by_silu(mlp: Any) -> bool:
    """Whether a module is `down(silu(gate(x)) * up(x))`, as its parts tell."""
    return parts_of(mlp) - {"act_fn"} == _MLP - {"act_fn"} and _is_silu(mlp.act_fn)


def _is_silu(activation: Any) -> bool:
    sample = torch.linspace(-4, 4, 9)
    return torch.allclose(activation(sample), nn.functional.silu(sample))


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach().float().numpy(), float(getattr(module, "variance_epsilon", 0.0)))


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    return float((expected - found).norm() / expected.norm())
