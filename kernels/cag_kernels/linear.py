"""Linear layers over a few rows.

A matrix product library packs the larger operand before it multiplies; for a question's dozen of rows that packing can
cost more than the product, and the transposed product avoids it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_ROWS = range(2, 49)


def few_rows_linear(block: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`block @ weight.T + bias`, computed as `(weight @ block.T).T` and returned contiguous.

    Args:
        block: `[..., num_rows, in_features]`.
        weight: `[out_features, in_features]`.
        bias: `[out_features]` or None.
    """
    rows = block.reshape(-1, block.shape[-1])
    product = torch.mm(weight, rows.t()) if bias is None else torch.addmm(bias[:, None], weight, rows.t())
    return product.t().contiguous().view(*block.shape[:-1], weight.shape[0])
