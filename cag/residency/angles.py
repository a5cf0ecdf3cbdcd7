"""By what the positions of a prefix turn its keys, computed on a device, to the bit as the store computes it.

In: a rotation of the store's basis. Out: cosines and sines of all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cag_store.codecs.transform import Rotation

DOUBTFUL = 64
"""Last places of a double by which two machines' cosines may differ; libraries of mathematics are within a few."""

_CUT = 29  # bits that a double has more than a float32


def angles_on(device: torch.device, rotation: Rotation, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines float32 `[num_tokens, num_pairs]` of positions from 0 on, as `Rotation.angles` has them.

    Double precision on the device, rounded. Where the double lies so near to the middle of two float32 that another
    machine's may be rounded to the other one, the host's is taken: about one in four million.
    """
    frequencies = torch.tensor(rotation.inverse_frequencies, dtype=torch.float64, device=device)
    turned = torch.arange(num_tokens, dtype=torch.float64, device=device)[:, None] * frequencies
    return _rounded(turned, turned.cos(), np.cos), _rounded(turned, turned.sin(), np.sin)


def _rounded(turned: Tensor, found: Tensor, on_host: Callable[[Any], Any]) -> Tensor:
    rounded = found.float()
    cut = found.view(torch.int64) & (1 << _CUT) - 1
    rows, columns = ((cut - (1 << _CUT - 1)).abs() <= DOUBTFUL).nonzero(as_tuple=True)
    if len(rows):
        exact = on_host(turned[rows, columns].cpu().numpy()).astype(np.float32)
        rounded[rows, columns] = torch.from_numpy(exact).to(turned.device)
    return rounded
