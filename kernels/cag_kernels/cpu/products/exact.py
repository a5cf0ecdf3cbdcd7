"""Weights of which a few outputs are multiplied exactly, and their bounds: plain, by tiles or vectors, or in panels.

Each records its own steps of `cpu.products.choice`: rows become integers, these bounds of all outputs; the weights of a
few features are gathered and multiplied with the bits of the whole product.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cag_kernels.cpu.products import bounds as cpu_bounds
from cag_kernels.cpu.products import dot_linear as cpu_dot_linear
from cag_kernels.cpu.products import linear as cpu_linear
from cag_kernels.cpu.products import tile_bounds as cpu_tile_bounds
from cag_kernels.cpu.products import tile_linear as cpu_tile_linear
from cag_kernels.cpu.products.codes import DEPTH, LANES, QUAD, ROWS
from cag_kernels.cpu.rows import Array, kept_numbers
from cag_kernels.packed import PackedWeight


class ExactWeight(Protocol):
    """A weight in 16 bits.

    Attributes:
        num_features, size: of the weight.
        memory: the weight as it lies.
    """

    num_features: int
    size: int
    memory: Tensor

    def compile(self) -> None:
        """The code of bounds of such weights, once a process."""

    def patterns(self, features: slice) -> Array:
        """`[num_features, size]` of whole groups of features, as `cpu.rows.kept_numbers` gives them."""

    def integers(self, num_rows: int) -> Tensor:
        """Memory for what `cpu.products.codes` makes of so many rows."""

    def gathered(self, most: int) -> Tensor:
        """Memory for the weights of so many features."""

    def record_bounds(self, memory: tuple[Tensor, ...], num_rows: int, num_groups: int) -> None:
        """Of all outputs; memory: see `cpu.products.bounds.Field`."""

    def record_product(self, rows: Tensor, gathered: Tensor, out: Tensor) -> None:
        """Rows by what was gathered, `[num_rows, most]`."""


class TileWeight:
    """`[num_features, size]`, multiplied by tiles."""

    def __init__(self, weight: Tensor) -> None:
        self.memory = weight
        self.num_features, self.size = weight.shape

    def compile(self) -> None:
        """See `ExactWeight`."""
        cpu_tile_bounds.compiled_kernel()

    def patterns(self, features: slice) -> Array:
        """See `ExactWeight`."""
        return kept_numbers(self.memory[features])

    def integers(self, num_rows: int) -> Tensor:
        """See `ExactWeight`."""
        return torch.zeros(-(-num_rows // ROWS), self.size // DEPTH, LANES, DEPTH, dtype=torch.int8)

    def gathered(self, most: int) -> Tensor:
        """See `ExactWeight`."""
        return torch.empty(most, self.size, dtype=torch.bfloat16)

    def record_bounds(self, memory: tuple[Tensor, ...], num_rows: int, num_groups: int) -> None:
        """See `ExactWeight`."""
        cpu_tile_bounds.compiled_bounds(memory, num_rows, self.size // DEPTH, num_groups)

    def record_product(self, rows: Tensor, gathered: Tensor, out: Tensor) -> None:
        """See `ExactWeight`."""
        cpu_tile_linear.compiled_linear(rows, gathered[: out.shape[1]], out=out)


class DotWeight(TileWeight):
    """`[num_features, size]`, multiplied in vectors of bfloat16; its bounds as of a packed one."""

    def compile(self) -> None:
        """See `ExactWeight`."""
        cpu_bounds.compiled_kernel()

    def integers(self, num_rows: int) -> Tensor:
        """See `ExactWeight`."""
        return torch.zeros(num_rows, self.size // QUAD, 2, 2, dtype=torch.int16)

    def record_bounds(self, memory: tuple[Tensor, ...], num_rows: int, num_groups: int) -> None:
        """See `ExactWeight`."""
        cpu_bounds.compiled_bounds(memory, num_rows, self.size // QUAD, num_groups)

    def record_product(self, rows: Tensor, gathered: Tensor, out: Tensor) -> None:
        """See `ExactWeight`."""
        cpu_dot_linear.compiled_linear(rows, gathered[: out.shape[1]], out=out)


class PanelWeight:
    """`[num_panels, size, 16]`, multiplied in vectors."""

    def __init__(self, weight: PackedWeight) -> None:
        self.memory = weight.panels
        self.num_features, self.size = weight.out_features, weight.in_features

    def compile(self) -> None:
        """See `ExactWeight`."""
        cpu_bounds.compiled_kernel()

    def patterns(self, features: slice) -> Array:
        """See `ExactWeight`."""
        stop = min(features.stop, self.num_features)
        panels = self.memory[features.start // LANES : -(-stop // LANES)]
        rows = PackedWeight(panels, stop - features.start).unpacked()
        return kept_numbers(rows)

    def integers(self, num_rows: int) -> Tensor:
        """See `ExactWeight`."""
        return torch.zeros(num_rows, self.size // QUAD, 2, 2, dtype=torch.int16)

    def gathered(self, most: int) -> Tensor:
        """See `ExactWeight`."""
        return torch.zeros(-(-most // LANES), self.size, LANES, dtype=self.memory.dtype)

    def record_bounds(self, memory: tuple[Tensor, ...], num_rows: int, num_groups: int) -> None:
        """See `ExactWeight`."""
        cpu_bounds.compiled_bounds(memory, num_rows, self.size // QUAD, num_groups)

    def record_product(self, rows: Tensor, gathered: Tensor, out: Tensor) -> None:
        """See `ExactWeight`."""
        cpu_linear.compiled_linear(rows, gathered, None, out.shape[1], out)
