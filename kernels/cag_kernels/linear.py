"""Linear layers over a few rows.

A matrix product library packs the larger operand before it multiplies; for a question's dozen of rows that packing can
cost more than the product. Compiled code reads the weight as it lies; where that does not serve, the transposed product
avoids the packing too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cag_kernels.cpu import has_compiler

FEW_ROWS = range(2, 49)
FEATURES_MULTIPLE = 16  # one vector of the widest registers


def few_rows_linear(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`block @ weight.T + bias`, returned contiguous; safe to call from several Python threads.

    Args:
        block: `[..., num_rows, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
    """
    rows = block.reshape(-1, block.shape[-1])
    if compiled_linear_serves(rows, weight, bias):
        from cag_kernels.cpu_linear import compiled_linear

        product = compiled_linear(rows, weight, bias)
    else:
        transposed = torch.mm(weight, rows.t()) if bias is None else torch.addmm(bias[:, None], weight, rows.t())
        product = transposed.t().contiguous()
    return product.view(*block.shape[:-1], weight.shape[0])


def compiled_linear_serves(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `cpu_linear.compiled_linear` takes these tensors."""
    tensors = (rows, weight) if bias is None else (rows, weight, bias)
    return (
        0 < rows.shape[0] < FEW_ROWS.stop
        and weight.shape[0] > 0
        and weight.shape[1] == rows.shape[1] > 0
        and weight.shape[1] % FEATURES_MULTIPLE == 0
        and (bias is None or bias.shape == weight.shape[:1])
        and all(_is_plain(tensor) for tensor in tensors)
        # the compiled code knows no gradients
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and has_compiler()
    )


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def warm_up_linear() -> None:
    """Compile what `few_rows_linear` runs, once a process; nothing without a compiler."""
    if has_compiler():
        from cag_kernels.cpu_linear import compiled_kernel

        compiled_kernel()
