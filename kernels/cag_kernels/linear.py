"""Linear layers over a question's rows.

A matrix product library packs the larger operand before it multiplies; for a question's dozen of rows that packing can
cost more than the product. A weight that was packed once serves few rows by compiled code; many rows, too, where that
is the quicker way, else unpacked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cag_kernels.cpu.floats import reads_floats
from cag_kernels.cpu.processor import has_compiler, has_tiles, vector_lanes
from cag_kernels.packed import PackedWeight
from cag_kernels.rows_reference import gate_reference

if TYPE_CHECKING:
    from cag_kernels.cpu.products.dot_linear import DotProduct
    from cag_kernels.cpu.products.tile_linear import TileProduct

FEW_ROWS = 128  # of a forward of few rows
# lanes of a vector -> rows up to which compiled code over a packed weight is quicker than unpacking it for a library;
# see docs/design/008-few-rows.md
MOST_COMPILED_ROWS = {16: 256, 8: sys.maxsize}


def packed_linear(block: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`block @ weight.T + bias`, contiguous; safe to call from several Python threads.

    Args:
        block: `[..., num_rows, in_features]`, float32 on the CPU.
        packed: the weight.
        bias: `[out_features]` float32, or None.

    Raises:
        ValueError: operands that do not fit together.
    """
    rows = block.reshape(-1, block.shape[-1])
    _check(rows, packed, bias)
    if _wants_gradient(rows, bias):  # compiled code knows none, and what is unpacked to is overwritten before they flow
        product = packed_linear_reference(rows, packed, bias)
    elif len(rows) and multiplies_packed(packed.panels.dtype) and len(rows) <= MOST_COMPILED_ROWS[vector_lanes()]:
        from cag_kernels.cpu.products.linear import compiled_linear

        product = compiled_linear(rows.contiguous(), packed.panels, bias, packed.out_features)
    else:
        product = _piece_by_piece(rows, packed)
        product = product if bias is None else product.add_(bias)
    return product.view(*block.shape[:-1], packed.out_features)


def multiplies_packed(dtype: torch.dtype) -> bool:
    """Whether there is compiled code over packed weights of a type on this machine."""
    return has_compiler() and reads_floats(dtype)


class PackedProduct:
    """`packed_linear` with one weight by compiled code, whatever the number of rows, so that a row has the same bits in
    any company. Contiguous float32 rows on the CPU; not for gradients.

    Attributes:
        packed, bias: what it multiplies by and adds.
    """

    is_recordable = True

    def __init__(self, packed: PackedWeight, bias: Tensor | None) -> None:
        self.out_features, self.in_features = packed.out_features, packed.in_features
        self.packed, self.bias = packed, bias

    def __call__(self, rows: Tensor) -> Tensor:
        """`[num_rows, in_features]` to `[num_rows, out_features]`."""
        out = rows.new_empty(len(rows), self.out_features)
        if len(rows):
            self.into(rows, out)
        return out

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The same to `out`."""
        from cag_kernels.cpu.products.linear import compiled_linear

        compiled_linear(rows, self.packed.panels, self.bias, self.out_features, out)


def packed_linear_reference(block: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """What `packed_linear` computes, in the block's dtype and by torch alone."""
    return torch.nn.functional.linear(block, packed.unpacked().to(block.dtype), bias)


def linear_without_packing(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`block @ weight.T + bias`, contiguous, for few rows and any weight: the transposed product packs less."""
    rows = block.reshape(-1, block.shape[-1])
    transposed = torch.mm(weight, rows.t()) if bias is None else torch.addmm(bias[:, None], weight, rows.t())
    return transposed.t().contiguous().view(*block.shape[:-1], weight.shape[0])


def tile_linear_serves(weight: Tensor) -> bool:
    """Whether `tile_linear` takes this weight on this machine."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not has_compiler():
        return False
    from cag_kernels.cpu.products import tile_linear as cpu_tile_linear

    return cpu_tile_linear.serves(weight)


def tile_linear(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`block @ weight.T + bias` by tile products: the block rounded to bfloat16, sums and result float32.

    Args:
        block: `[..., num_rows, in_features]` float32 on the CPU, not empty.
        weight: `[out_features, in_features]` bfloat16 that `tile_linear_serves`; it is not packed.
        bias: `[out_features]` float32, contiguous, or None.

    Raises:
        ValueError: operands that do not fit together, or a weight that is not served.
    """
    _check_plain(block, weight, bias, tile_linear_serves(weight))
    from cag_kernels.cpu.products import tile_linear as cpu_tile_linear

    return _of_block(cpu_tile_linear.compiled_linear, block, weight, bias)


def tile_product(weight: Tensor, bias: Tensor | None = None) -> TileProduct:
    """`tile_linear` with one weight, its operands checked once: for contiguous `[num_rows, in_features]` float32, and
    not for several threads at once.

    Raises:
        ValueError: a weight that is not served.
    """
    if not tile_linear_serves(weight):
        raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} is not served by tiles")
    from cag_kernels.cpu.products.tile_linear import TileProduct

    return TileProduct(weight, bias)


def dot_linear_serves(weight: Tensor) -> bool:
    """Whether `dot_linear` takes this weight on this machine. Not where there are tiles, which do more at once: so a
    plain weight has one product of ours on a machine."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not has_compiler() or has_tiles():
        return False
    from cag_kernels.cpu.products import dot_linear as cpu_dot_linear

    return cpu_dot_linear.serves(weight)


def dot_linear(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`tile_linear` by the products of vectors of bfloat16 (AVX512_BF16), for a weight that `dot_linear_serves`.

    Raises:
        ValueError: operands that do not fit together, or a weight that is not served.
    """
    _check_plain(block, weight, bias, dot_linear_serves(weight))
    from cag_kernels.cpu.products import dot_linear as cpu_dot_linear

    return _of_block(cpu_dot_linear.compiled_linear, block, weight, bias)


def dot_product(weight: Tensor, bias: Tensor | None = None) -> DotProduct:
    """As `tile_product`, of `dot_linear`."""
    if not dot_linear_serves(weight):
        raise ValueError(f"a weight {tuple(weight.shape)} of {weight.dtype} is not served by products of bfloat16")
    from cag_kernels.cpu.products.dot_linear import DotProduct

    return DotProduct(weight, bias)


def tile_linear_reference(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What `tile_linear` and `dot_linear` mean, in the block's type: the specification that tests compare with."""
    product = block.to(torch.bfloat16).to(block.dtype) @ weight.to(block.dtype).t()
    return product if bias is None else product + bias


def warm_up_linear(dtype: torch.dtype) -> None:
    """Compile what `packed_linear` runs for weights of `dtype`, once a process; nothing where that cannot be."""
    if multiplies_packed(dtype):
        from cag_kernels.cpu.products.linear import compiled_kernel

        compiled_kernel(dtype)


def _piece_by_piece(rows: Tensor, packed: PackedWeight) -> Tensor:
    pieces = list(packed.pieces())
    if len(pieces) == 1:
        return torch.mm(rows, packed.transposed())
    product, first = rows.new_empty(rows.shape[0], packed.out_features), 0
    for piece in pieces:
        product[:, first : first + piece.out_features] = torch.mm(rows, piece.transposed())
        first += piece.out_features
    return product


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(rows: Tensor, packed: PackedWeight, bias: Tensor | None) -> None:
    fits = rows.shape[1] == packed.in_features and (bias is None or bias.shape == (packed.out_features,))
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in (rows, *_present(bias)))
    if not fits or not plain or not (bias is None or bias.is_contiguous()):
        raise ValueError(
            f"a float32 block {tuple(rows.shape)} and a bias do not fit a packed weight of "
            f"{packed.out_features} x {packed.in_features}"
        )


def _of_block(multiply: Callable[..., Tensor], block: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`multiply` of the rows of a block `[..., num_rows, in_features]`."""
    rows = block.reshape(-1, block.shape[-1]).contiguous()
    bias = None if bias is None else bias.contiguous()
    return multiply(rows, weight, bias).view(*block.shape[:-1], weight.shape[0])


def _check_plain(block: Tensor, weight: Tensor, bias: Tensor | None, serves: bool) -> None:
    fits = block.shape[-1] == weight.shape[1] and block.numel() and (bias is None or bias.shape == weight.shape[:1])
    floats = all(part.dtype == torch.float32 and part.device.type == "cpu" for part in (block, *_present(bias)))
    if not fits or not floats or not serves:
        raise ValueError(f"a block {tuple(block.shape)} of {block.dtype} does not fit a weight {tuple(weight.shape)}")


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


def tile_mlp_reference(block: Tensor, gate_and_up: Tensor, down: Tensor, activation: str = "silu") -> Tensor:
    """What `cpu.products.tile_mlp.TileMlp` means, in the block's type: `down(activation(gate) * up)`, rounded before
    each product."""
    return tile_linear_reference(gate_reference(tile_linear_reference(block, gate_and_up), activation), down)
