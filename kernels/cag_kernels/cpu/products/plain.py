"""A linear layer over a plain weight by compiled code, made ready once: what the ways to multiply it have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class PlainProduct(ABC):
    """One weight `[out_features, in_features]` bfloat16 and its bias, or None."""

    is_recordable = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, None if bias is None else bias.contiguous()

    @abstractmethod
    def multiply(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """`[num_rows, in_features]` float32, contiguous, not empty, to `[num_rows, out_features]`: `out` if given."""

    def __call__(self, rows: Tensor) -> Tensor:
        """See `multiply`."""
        return self.multiply(rows)

    def into(self, rows: Tensor, out: Tensor) -> None:
        """The same, to `out`."""
        self.multiply(rows, out)
