"""A forward of few rows without a framework's overhead: the layers of a Llama-like network on a CPU.

For a dozen rows the calls of a network's hundreds of small operators cost as much as its products. Here a layer is four
products, one attention over each prefix, and four compiled steps between them; what is passed on between layers is
float32 also where products are of bfloat16. The rows may be of many sequences (`cag.forward.batch`). Recognized by
structure and then checked: a network whose own forward gives other logits keeps its own forward.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cag.forward.batch import Batch, RowGroup
from cag.forward.choices import GreedyChoice
from cag.forward.decoder_layers import (
    MODEL_PARTS,
    Layer,
    Norm,
    NormReader,
    Rotations,
    SeenLayer,
    Unknown,
    layers_of,
    parts_of,
)
from cag.forward.recorded import (
    RecordedForwards,
    as_slice,
    attends_rounded,
    attention_dtype,
    before_tails,
    seen_from,
    tail_places,
)
from cag.forward.state import AttentionRule, PrefixSegment, attend_prefix
from cag.forward.weights import Product, joined_product
from cag_kernels import FEW_ROWS, DensePrefix, has_numba, prefix_attention
from cag_kernels.attention import COMPILED_MAX_ROWS
from cag_kernels.cpu.attention.segments import MAX_HEAD_DIM, cpu_attention, cpu_attention_serves
from cag_kernels.cpu.floats import loops_read_floats

if TYPE_CHECKING:
    from cag_kernels.cpu.paged import Tails

PROBED_LAYERS = 2  # compared closely; behind all layers a network in bfloat16 may be far from itself in float32
FAR = 0.5  # of the logits' norm, behind all layers


class FewRowsDecoder:
    """Runs up to `FEW_ROWS` tokens of each sequence. Not for several threads at once: the model's lock is held.

    Attributes:
        rows_stay_apart: whether a row has the same bits whatever other rows there are: where compiled code multiplies
            and attends, by tiles or in float32 over packed weights.
    """

    def __init__(
        self,
        network: Any,
        layers: list[Layer],
        norm: Norm,
        head: Product,
        head_dim: int,
        attends_in: torch.dtype,
    ) -> None:
        from cag_kernels.cpu import paged as cpu_paged
        from cag_kernels.cpu import rows as cpu_rows

        self._steps = cpu_rows
        self._tails = cpu_paged.Tails
        self._network = network
        self._layers = layers
        self._head = head
        self._head_dim = head_dim
        self._attends_in = attends_in
        self._norm = norm
        self.choice = GreedyChoice(head)
        self._turnings = list(dict.fromkeys(layer.turning for layer in layers))
        self._recorded = RecordedForwards(layers, self._norm, head_dim, attends_in)
        self.rows_stay_apart = self._recorded.rows_stay_apart and head.is_recordable

    def over(self, network: Any) -> FewRowsDecoder:
        """The same layers, turned by the rotary embedding of another network over the same weights."""
        other = copy.copy(self)
        other._network = network
        return other

    def serves(self, batch: Batch) -> bool:
        """Whether `forward` takes a batch."""
        return all(0 < count <= FEW_ROWS for count in batch.counts)

    def forward(
        self, token_ids: Tensor, batch: Batch, wanted: list[int] | slice, chosen: Sequence[int] | None = None
    ) -> Tensor:
        """Logits of the `wanted` rows of a batch, `[num_wanted, vocab_size]` float32.

        The keys and values of the tokens go to the pages of their sequences; `token_ids` is `[num_rows]`. Only a check
        runs less than all layers.
        """
        return self._head(self._hidden(token_ids, batch, chosen, wanted))

    def choose(self, token_ids: Tensor, batch: Batch, wanted: list[int]) -> list[int]:
        """Of the `wanted` rows of a batch the token with the largest logit, the lowest of equal ones. As `forward`."""
        return self.choice(self._hidden(token_ids, batch, None, wanted))

    def _hidden(
        self, token_ids: Tensor, batch: Batch, chosen: Sequence[int] | None, wanted: list[int] | slice
    ) -> Tensor:
        """The `wanted` rows behind the layers, normalized, until the next forward."""
        hidden = self._network.model.embed_tokens(token_ids).float()
        rotations = self._rotations(hidden, batch.positions(hidden.device))
        normed = self._recorded.forward(hidden, rotations, batch, chosen, wanted)
        if normed is None:
            normed = self._step_by_step(hidden, rotations, batch, chosen)[as_slice(wanted)]
        return normed

    def _rotations(self, hidden: Tensor, positions: Tensor) -> Rotations:
        """Of all rows; cosines and sines of no angle where a layer turns nothing."""
        rotary_emb = self._network.model.rotary_emb
        found: Rotations = {}
        for turning in self._turnings:
            if turning is None:
                none = hidden.new_zeros(len(hidden), self._head_dim)
                found[turning] = none + 1, none
            else:
                found[turning] = turning.angles(rotary_emb, hidden, positions)
        return found

    def _step_by_step(self, hidden: Tensor, rotations: Rotations, batch: Batch, chosen: Sequence[int] | None) -> Tensor:
        """All rows as `RecordedForwards.forward` gives them, for any batch."""
        tails = self._tails(batch.pages, batch.lengths, batch.starts, batch.skipped)
        places = torch.from_numpy(tail_places(batch))
        update, behind, normed = torch.zeros_like(hidden), None, torch.empty_like(hidden)
        for index in range(len(self._layers)) if chosen is None else chosen:
            layer = self._layers[index]
            read = self._pass_on(hidden, update, behind, layer.before_attention, normed)
            update = self._attend(index, layer, read, rotations[layer.turning], batch, tails, places)
            read = self._pass_on(hidden, update, layer.behind_attention, layer.before_mlp, normed)
            update, behind = self._mlp(layer, read), layer.behind_mlp
        return self._pass_on(hidden, update, behind, self._norm, normed)

    def _pass_on(
        self, hidden: Tensor, update: Tensor, behind: Norm | None, before: Norm | None, normed: Tensor
    ) -> Tensor:
        """Add what a block gave to the residual, and return what the next one reads: one of `hidden` and `normed`."""
        rows, added, out = hidden.numpy(), update.numpy(), normed.numpy()
        if before is None:
            if behind is None:
                hidden.add_(update)
            else:
                self._steps.add_normed(rows, added, behind.weight, behind.epsilon)
            return hidden
        norm = before.weight, before.epsilon
        if behind is None:
            self._steps.add_and_norm(rows, added, *norm, out)
        else:
            self._steps.add_normed_and_norm(rows, added, behind.weight, behind.epsilon, *norm, out)
        return normed

    def _attend(
        self,
        index: int,
        layer: Layer,
        read: Tensor,
        rotation: tuple[Tensor, Tensor],
        batch: Batch,
        tails: Tails,
        places: Tensor,
    ) -> Tensor:
        projected = layer.projections(read)
        keys, values = batch.sides(index)
        num_rows, head_dim, num_kv_heads = len(read), self._head_dim, keys.shape[1]
        num_q_heads = layer.num_q_heads(head_dim)
        for norm, first, count in layer.head_norms(num_kv_heads * head_dim):
            self._steps.head_norm(projected.numpy(), first, count, norm.weight, norm.epsilon)
        query = projected.new_empty(num_q_heads, num_rows, head_dim)
        pool = self._steps.kept_numbers(keys), self._steps.kept_numbers(values)
        cosines, sines = rotation[0].numpy(), rotation[1].numpy()
        self._steps.rotate_and_store(
            projected.numpy(), cosines, sines, query.numpy(), *pool, batch.row_pages, batch.row_places
        )
        out, logsumexps = read.new_empty(num_rows, num_q_heads * head_dim), query.new_empty(num_q_heads, num_rows)
        for group in batch.groups:
            parts = self._attend_before(index, layer, query, batch, group, places)
            sessions = group.sequences.start, group.sequences.stop
            tails.attend(
                query, keys, values, layer.rule.scale, *parts, out, logsumexps, sessions, window=layer.rule.window
            )
        return layer.output(out)

    def _attend_before(
        self, index: int, layer: Layer, query: Tensor, batch: Batch, group: RowGroup, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention of a group's rows over its prefix, and over a long tail's earlier tokens: parts `[num_parts,
        num_q_heads, num_rows, head_dim]` and their logsumexps."""
        before = [] if group.prefix is None else before_tails(group.prefix.segments(index))
        before += [(segment, 0) for segment in batch.earlier(group, index)]
        own = query if len(batch.groups) == 1 else query[:, group.rows]
        if not before:
            return query.new_empty(0, *own.shape), query.new_empty(0, *own.shape[:2])
        parts = self._over_segments(own, before, layer.rule, places[group.rows])
        if len(parts) == 1:
            return parts[0][0][None], parts[0][1].contiguous()[None]
        return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])

    def _over_segments(
        self, query: Tensor, before: Sequence[tuple[PrefixSegment, int]], rule: AttentionRule, places: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """What queries find in each segment, in blocks of rows that compiled attention takes."""
        segment = before[0][0]
        most = COMPILED_MAX_ROWS * segment[0].shape[0] // query.shape[0]
        rows = zip(torch.split(self._rounded(query, segment), most, dim=1), torch.split(places, most), strict=True)
        blocks = [[_over_segment(*block, *one, rule) for one in before] for block in rows]
        if len(blocks) == 1:
            return blocks[0]
        return [
            (torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1))
            for parts in zip(*blocks, strict=True)
        ]

    def _rounded(self, query: Tensor, segment: PrefixSegment) -> Tensor:
        """The query in the type that the network attends in; unrounded where only code for a few float32 rows serves a
        single token quickly."""
        return query.to(self._attends_in) if attends_rounded(query, segment, self._attends_in) else query

    def _mlp(self, layer: Layer, read: Tensor) -> Tensor:
        if layer.mlp is not None:
            return layer.mlp(read)
        projected = layer.gate_and_up(read)
        gated = projected.new_empty(projected.shape[0], projected.shape[1] // 2)
        self._steps.GATES[layer.activation](projected.numpy(), gated.numpy())
        return layer.down(gated)


def _over_segment(
    query: Tensor, places: Tensor, segment: PrefixSegment, offset: int, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Of rows at places of their tails, the first of which stands `offset` tokens behind the segment's first."""
    if isinstance(segment, DensePrefix) and cpu_attention_serves(query, segment.keys):
        seen = seen_from(offset, places, segment, rule)
        return cpu_attention(query, *segment, scale=rule.scale, **seen)
    if rule.window is None:
        return attend_prefix(query, [segment], rule.scale)[0]
    return prefix_attention(query, segment, scale=rule.scale, positions=places + offset, window=rule.window)


def recognize(
    network: Any,
    head_dim: int,
    seen: Sequence[SeenLayer],
    kind: str = "transposed",
    kv_dtype: torch.dtype = torch.bfloat16,
) -> FewRowsDecoder | None:
    """A decoder for a network whose layers are of the kinds that `cag.forward.decoder_layers` knows; None for any
    other.

    Its weights are packed, or plain in bfloat16; `kind` is that of `cag.forward.weights.joined_product`, `seen` what
    was seen of each layer. Keys and values are kept in `kv_dtype`.
    """
    model, head = getattr(network, "model", None), getattr(network, "lm_head", None)
    is_served = has_numba() and loops_read_floats(kv_dtype) and head_dim <= MAX_HEAD_DIM
    if not is_served or model is None or head is None:
        return None
    if parts_of(model) != MODEL_PARTS or parts_of(network) != {"model", "lm_head"}:
        return None
    norm_of, product = NormReader(), joined_product([head], kind)
    try:
        layers, norm = layers_of(network, seen, norm_of, kind), norm_of(model.norm)
    except Unknown:
        return None
    if product is None or not layers:
        return None
    attends_in = attention_dtype(model.norm.weight.dtype, head_dim, kv_dtype)
    return FewRowsDecoder(network, layers, norm, product, head_dim, attends_in)
