"""Weights packed once for products with few rows: panels of 16 output features, input feature by input feature.

The layout only; who multiplies is in `linear`. A weight in 16 bits stays so: half the memory, and half as much to
read for each question and token.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cag_kernels.prefixes import FLOATS

PANEL = 16  # output features side by side: one vector of the widest registers
FEATURES_MULTIPLE = 16  # input features of a weight that can be packed
MAX_UNPACKED = 1 << 24  # numbers: 64 MB in float32, whatever the size of a vocabulary


class _Scratch(threading.local):
    """Memory of the calling thread for one weight unpacked; fresh memory for each would cost a fault a page."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.float32)

    def take(self, count: int) -> Tensor:
        """`count` float32 of any content."""
        if self._memory.numel() < count:
            with torch.inference_mode(False):  # it serves calls inside and outside of inference mode
                self._memory = torch.empty(count, dtype=torch.float32)
        return self._memory[:count]


_scratch = _Scratch()


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight `[out_features, in_features]` as panels `[num_panels, in_features, 16]`; rows behind the last are 0."""

    panels: Tensor
    out_features: int

    @property
    def in_features(self) -> int:
        """Input features."""
        return self.panels.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the panels."""
        return self.panels.nbytes

    def unpacked(self) -> Tensor:
        """The weight again, `[out_features, in_features]` in the dtype of the panels, as new memory."""
        rows = self.panels.transpose(1, 2).reshape(-1, self.in_features)
        return rows[: self.out_features].clone()

    def pieces(self) -> Iterator[PackedWeight]:
        """The weight cut after whole panels, so that each piece takes at most `MAX_UNPACKED` numbers unpacked."""
        step = max(1, MAX_UNPACKED // (PANEL * self.in_features))
        for first in range(0, self.panels.shape[0], step):
            count = min(step * PANEL, self.out_features - first * PANEL)
            yield PackedWeight(self.panels[first : first + step], count)

    def transposed(self) -> Tensor:
        """`[in_features, out_features]` float32, in memory of the calling thread that the next call overwrites."""
        num_panels, in_features, panel = self.panels.shape
        whole = _scratch.take(self.panels.numel()).view(in_features, num_panels, panel)
        whole.copy_(self.panels.permute(1, 0, 2))
        return whole.view(in_features, num_panels * panel)[:, : self.out_features]


def can_pack(weight: Tensor) -> bool:
    """Whether `pack_weight` takes a weight."""
    return (
        weight.dim() == 2
        and weight.dtype in FLOATS
        and weight.device.type == "cpu"
        and weight.shape[0] > 0
        and weight.shape[1] > 0
        and weight.shape[1] % FEATURES_MULTIPLE == 0
    )


def pack_weight(*weights: Tensor) -> PackedWeight:
    """Pack weights `[out_features, in_features]` of one dtype, one below the other.

    Raises:
        ValueError: a weight that `can_pack` refuses, or weights that do not fit together.
    """
    kinds = {(weight.shape[-1], weight.dtype) for weight in weights}
    if len(kinds) != 1 or not all(can_pack(weight) for weight in weights):
        raise ValueError(f"cannot pack weights of {[(tuple(weight.shape), weight.dtype) for weight in weights]}")
    out_features, in_features = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    rows = weights[0].new_zeros(-(-out_features // PANEL) * PANEL, in_features)
    torch.cat([weight.detach() for weight in weights], out=rows[:out_features])
    return PackedWeight(rows.view(-1, PANEL, in_features).transpose(1, 2).contiguous(), out_features)
