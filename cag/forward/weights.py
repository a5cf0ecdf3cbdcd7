"""How a network's weights lie in memory on a CPU that computes in float32: as few bytes as were stored.

A checkpoint in 16 bits stays so: linear layers packed for a question's few rows (`cag_kernels.PackedWeight`),
embeddings widened row by row. Widening is exact, so the numbers are those of a network in float32, which would take
twice the memory and twice the reading for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from cag.machine.huge_pages import move_weights
from cag.machine.runtime import RuntimePlan
from cag_kernels import (
    PackedProduct,
    PackedWeight,
    can_pack,
    dot_linear,
    dot_linear_serves,
    dot_product,
    has_compiler,
    linear_without_packing,
    multiplies_packed,
    pack_weight,
    packed_linear,
    tile_linear,
    tile_linear_serves,
    tile_product,
    vector_lanes,
)
from cag_kernels.linear import MOST_COMPILED_ROWS
from cag_kernels.packed import PANEL

if TYPE_CHECKING:
    from cag_kernels.cpu.products.dot_linear import DotProduct
    from cag_kernels.cpu.products.tile_linear import TileProduct
    from cag_kernels.cpu.products.tile_mlp import TileMlp

FEW_ROWS = range(2, 49)  # where `linear_without_packing` can be quicker
MOST_COMPILED_PLAIN = 48  # rows up to which compiled code over a plain weight is quicker at most shapes
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # kept side by side: one product serves all


class Product(Protocol):
    """A linear layer, or several side by side, over few rows: contiguous float32 `[num_rows, in_features]`.

    Attributes:
        in_features, out_features: sizes of a row.
        is_recordable: whether `into` is made of compiled steps (`cag_kernels.cpu.tape`).
    """

    in_features: int
    out_features: int
    is_recordable: bool

    def __call__(self, rows: Tensor) -> Tensor:
        """`[num_rows, out_features]` float32, contiguous."""

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The same to `out`."""


class LibraryProduct:
    """A `Product` by torch's own multiplication, over a weight in 16 bits."""

    is_recordable = False

    def __init__(self, multiply: Callable[..., Tensor], weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self._multiply, self._weight, self._bias = multiply, weight, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """See `Product`."""
        product = self._multiply(rows.to(self._weight.dtype), self._weight).float()
        return product if self._bias is None else product.add_(self._bias)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """See `Product`."""
        out.copy_(self(rows))


class PackedLinear(nn.Module):
    """A linear layer over a packed weight; computes in float32."""

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.in_features, self.out_features = packed.in_features, packed.out_features

    @property
    def weight(self) -> Tensor:
        """The weight `[out_features, in_features]`, unpacked anew at each access, in the dtype it is kept in."""
        return self.packed.unpacked()

    def forward(self, block: Tensor) -> Tensor:
        """`[..., in_features]` float32 to `[..., out_features]`."""
        return packed_linear(block, self.packed, self.bias)

    def keeps_rows_apart(self, block: Tensor) -> bool:
        """Whether each row of a block has the same bits in any company."""
        num_rows = block.numel() // self.in_features
        return multiplies_packed(self.packed.panels.dtype) and 0 < num_rows <= MOST_COMPILED_ROWS[vector_lanes()]


class WidenedEmbedding(nn.Module):
    """An embedding kept in 16 bits whose rows come out in float32, times `scale`."""

    def __init__(self, embedding: nn.Embedding, scale: float) -> None:
        super().__init__()
        self.weight = embedding.weight
        self.padding_idx = embedding.padding_idx
        self.scale = scale

    def forward(self, token_ids: Tensor) -> Tensor:
        """`[...]` to `[..., hidden_size]`."""
        rows = nn.functional.embedding(token_ids, self.weight).float()
        return rows if self.scale == 1 else rows * self.scale


def _scale_of(embedding: nn.Embedding) -> float | None:
    """What an embedding in float32 multiplies each of its rows by; None of one that does anything else."""
    if type(embedding) is nn.Embedding:
        return 1.0
    kept, token_ids = (embedding.weight, embedding.padding_idx), torch.tensor([[2, 0, 2, 1]])
    rows = torch.tensor([[1.0], [2.0], [4.0]]).expand(-1, embedding.weight.shape[1])
    embedding.weight, embedding.padding_idx = nn.Parameter(rows, requires_grad=False), None  # which would be beyond
    try:
        found = embedding(token_ids)
        same = found.dtype == torch.float32 and torch.equal(found, rows[token_ids] * found[0, 1, 0])
        return float(found[0, 1, 0]) if same else None
    except Exception:  # one that is asked for something else than tokens, such as positions
        return None
    finally:
        embedding.weight, embedding.padding_idx = kept


class HeadProducts(nn.Module):
    """Each head's rows by a weight of its own, `[num_heads, in_features, out_features]`, that nobody saves."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, block: Tensor) -> Tensor:
        """`[num_heads, num_rows, in_features]` to `[num_heads, num_rows, out_features]`."""
        return block @ self.weight


class TransposedLinear(nn.Linear):
    """A linear layer with another order of the product for a question's few rows."""

    def forward(self, block: Tensor) -> Tensor:
        """See torch."""
        if block.shape[-2] in FEW_ROWS and block.dtype == self.weight.dtype:
            return linear_without_packing(block, self.weight, self.bias)
        return super().forward(block)


class CompiledLinear(nn.Linear):
    """A linear layer in bfloat16 whose few rows are multiplied by compiled code, by tiles or else by products of
    pairs."""

    def forward(self, block: Tensor) -> Tensor:
        """See torch."""
        if not self.keeps_rows_apart(block) or _wants_gradient(block, self.weight):
            return super().forward(block)
        multiply = tile_linear if tile_linear_serves(self.weight) else dot_linear
        bias = None if self.bias is None else self.bias.float()
        return multiply(block.float(), self.weight, bias).to(block.dtype)

    def keeps_rows_apart(self, block: Tensor) -> bool:
        """Whether a block is of few rows, each of which has the same bits in any company."""
        num_rows = block.numel() // self.in_features
        return 0 < num_rows <= MOST_COMPILED_PLAIN and block.dtype == self.weight.dtype == torch.bfloat16


def use_compiled_products(network: nn.Module) -> None:
    """Let linear layers be `CompiledLinear`, where compiled code serves their weights."""
    for module in network.modules():
        if type(module) is nn.Linear and (tile_linear_serves(module.weight) or dot_linear_serves(module.weight)):
            module.__class__ = CompiledLinear


def use_transposed_products(network: nn.Module) -> None:
    """Let linear layers use `linear_without_packing` for few rows."""
    for module in network.modules():
        if type(module) is nn.Linear:
            module.__class__ = TransposedLinear


def loses_in_16_bits(network: nn.Module) -> bool:
    """Whether a network that was loaded in a type of 16 bits has numbers besides its parameters that were rounded with
    it. One that its module keeps unrounded besides is put back."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and buffer.dtype != torch.float32:
                kept = [value for value in vars(module).values() if _is_rounded_to(value, buffer)]
                if not kept:
                    return True
                setattr(module, name, torch.tensor(kept[0], dtype=torch.float32))
    return False


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_rounded_to(value: Any, buffer: Tensor) -> bool:
    return isinstance(value, float) and buffer.ndim == 0 and bool(torch.tensor(value, dtype=buffer.dtype) == buffer)


def pack_network(network: nn.Module) -> None:
    """Turn a network in any one type, in place, into one that computes in float32 over weights of that type."""
    for parent in list(network.modules()):
        for names in _groups(parent):
            layers = [getattr(parent, name) for name in names]
            for name, packed in zip(names, _packed_together(layers), strict=True):
                setattr(parent, name, packed)
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Embedding) and (scale := _scale_of(child)) is not None:
                setattr(parent, name, WidenedEmbedding(child, scale))
    _widen_the_rest(network)


def lay_out_weights(network: nn.Module, plan: RuntimePlan, compute_dtype: torch.dtype, *, packs: bool) -> None:
    """Lay weights that were just read out as `plan` multiplies them, in place; packed where `packs`."""
    if packs:
        pack_network(network)
        return
    if plan.device == "cpu":
        move_weights(network)  # in order: what is joined lies side by side then, where rows fill lines
        if compute_dtype == torch.bfloat16:
            join_network(network)
    use_products(network, plan)


def use_products(network: nn.Module, plan: RuntimePlan) -> None:
    """Let the linear layers of a network multiply few rows as `plan` does, in place."""
    if plan.product in ("tiles", "dots"):
        use_compiled_products(network)
    if plan.product in ("transposed", "tiles"):
        use_transposed_products(network)


def join_network(network: nn.Module) -> None:
    """Lay weights that read the same input side by side, in place: each becomes a view of the joined one. Those that
    lie so already stay where they are."""
    for parent in network.modules():
        children = dict(parent.named_children())
        for names in TOGETHER:
            found = (children.get(name) for name in names)
            layers = [child for child in found if isinstance(child, nn.Linear)]
            if len(layers) == len(names) and _spanned([layer.weight.detach() for layer in layers]) is None:
                _join(layers)


def joined_product(layers: Sequence[Any], kind: str) -> Product | None:
    """One product for layers that lie side by side, outputs side by side too; None if they do not.

    `kind` (of `RuntimePlan.product`) says how plain weights in bfloat16 are multiplied: "plain", "transposed", "tiles",
    where tiles cannot serve a weight as "transposed", or "dots", where they cannot as "plain".
    """
    bias = _joined_bias(layers)
    if all(isinstance(layer, PackedLinear) for layer in layers):
        panels = _spanned([layer.packed.panels for layer in layers])
        packed = None if panels is None else PackedWeight(panels, sum(layer.out_features for layer in layers))
        return None if packed is None else PackedProduct(packed, bias)
    if not all(isinstance(layer, nn.Linear) and layer.weight.dtype == torch.bfloat16 for layer in layers):
        return None
    weight = _spanned([layer.weight.detach() for layer in layers])
    if weight is None:
        return None
    if kind == "tiles" and tile_linear_serves(weight):
        return tile_product(weight, bias)
    if kind == "dots" and dot_linear_serves(weight):
        return dot_product(weight, bias)
    multiply = nn.functional.linear if kind in ("plain", "dots") else linear_without_packing
    return LibraryProduct(multiply, weight, bias)


def tile_mlp(gate_and_up: Product, down: Product, activation: str) -> TileMlp | None:
    """Both products and the gate between them in one, if both multiply by tiles and have no bias; `activation` of
    `rows_reference.ACTIVATIONS`."""
    if not is_tile_product(gate_and_up) or not is_tile_product(down):
        return None
    from cag_kernels.cpu.products.tile_mlp import TileMlp, serves

    weights = cast("TileProduct", gate_and_up), cast("TileProduct", down)
    if any(product.bias is not None for product in weights) or not serves(*(product.weight for product in weights)):
        return None
    return TileMlp(weights[0].weight, weights[1].weight, activation)


def is_tile_product(product: Product) -> bool:
    """Whether it multiplies by tiles, which give a row the same bits whatever other rows there are."""
    if not has_compiler():
        return False
    from cag_kernels.cpu.products.tile_linear import TileProduct

    return isinstance(product, TileProduct)


def plain_weight(product: Product) -> Tensor | PackedWeight | None:
    """The weight of a product by compiled code that adds no bias: plain where tiles or vectors of bfloat16 multiply,
    else packed; None for any other product."""
    if isinstance(product, PackedProduct):
        return product.packed if product.bias is None else None
    if not product.is_recordable:
        return None
    plain = cast("TileProduct | DotProduct", product)
    return plain.weight if plain.bias is None else None


def joined_weight(layers: Sequence[Any]) -> Tensor | None:
    """The weights of linear layers as the one `[out_features, in_features]` that they are views of, or None."""
    if not all(type(layer) is nn.Linear for layer in layers):
        return None
    return _spanned([layer.weight.detach() for layer in layers])


def _spanned(parts: Sequence[Tensor]) -> Tensor | None:
    """One view over parts of one memory that follow each other along the first axis; None if they do not."""
    for before, behind in pairwise(parts):
        same = before.untyped_storage().data_ptr() == behind.untyped_storage().data_ptr()
        if not same or before.data_ptr() + before.nbytes != behind.data_ptr():
            return None
    first, count = parts[0], sum(part.shape[0] for part in parts)
    return first.as_strided((count, *first.shape[1:]), first.stride(), first.storage_offset())


def _joined_bias(layers: Sequence[Any]) -> Tensor | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [
        torch.zeros(layer.out_features, dtype=torch.float32) if layer.bias is None else layer.bias.detach()
        for layer in layers
    ]
    return torch.cat([part.float() for part in parts])


def _join(layers: Sequence[nn.Linear]) -> None:
    whole = torch.cat([layer.weight.detach() for layer in layers])
    parts = torch.split_with_sizes(whole, [layer.out_features for layer in layers])
    for layer, part in zip(layers, parts, strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)


def _groups(parent: nn.Module) -> Iterator[tuple[str, ...]]:
    """Names of linear layers of `parent` that are packed in one piece."""
    linear = {name for name, child in parent.named_children() if type(child) is nn.Linear and can_pack(child.weight)}
    for names in TOGETHER:
        layers = [getattr(parent, name) for name in names if name in linear]
        if len(layers) == len(names) and all(layer.out_features % PANEL == 0 for layer in layers):
            linear -= set(names)
            yield names
    yield from ((name,) for name in sorted(linear))


def _packed_together(layers: list[nn.Linear]) -> Iterator[PackedLinear]:
    whole = pack_weight(*(layer.weight for layer in layers))
    first = 0
    for layer in layers:
        num_panels = -(-layer.out_features // PANEL)
        yield PackedLinear(PackedWeight(whole.panels[first : first + num_panels], layer.out_features), layer.bias)
        first += num_panels


def _widen_the_rest(network: nn.Module) -> None:
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, WidenedEmbedding)}
    for parameter in network.parameters():
        if parameter.is_floating_point() and id(parameter) not in embeddings:
            parameter.data = parameter.data.float()
