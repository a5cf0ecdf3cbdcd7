"""The static part of decoding the codec `transform` on a device: tables, integer rows, scales and means of one side of
a group of layers.

In: what the store prepared of a basis. Out: tensors, made once and kept as long as that is.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from cag_store.codecs.transform.prepared import PreparedSide


@dataclass(frozen=True, eq=False)
class BasisTensors:
    """One side of a group of layers, of `num_channels` channels and `num_components` coded components.

    slots: int32 `[num_tables, 4096]`; tables, low_bits: int8 `[num_components]` (`cag_kernels.decode_segments`).
    rows: int16 `[num_components, num_channels]`; scale, mean: float32 `[num_channels]`.
    """

    slots: Tensor
    tables: Tensor
    low_bits: Tensor
    rows: Tensor
    scale: Tensor
    mean: Tensor


_kept: WeakKeyDictionary[PreparedSide, dict[torch.device, BasisTensors]] = WeakKeyDictionary()
_making = threading.Lock()


def basis_tensors(static: PreparedSide, device: torch.device) -> BasisTensors:
    """The tensors of `static`, those of an earlier call where there was one. Never to be changed."""
    with _making:
        found = _kept.setdefault(static, {})
        if device not in found:
            found[device] = _made(static, device)
            if device.type == "cuda":  # others will use them in other streams
                torch.cuda.current_stream(device).synchronize()
        return found[device]


def _made(static: PreparedSide, device: torch.device) -> BasisTensors:
    def sent(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    return BasisTensors(
        sent(static.tables.slots.view(np.int32)),
        sent(static.table_numbers.astype(np.int8)),
        sent(static.low.astype(np.int8)),
        _rows(static, device),
        sent(static.scale),
        sent(static.mean),
    )


def _rows(static: PreparedSide, device: torch.device) -> Tensor:
    """Mantissas, in a byte where that is enough, are sent and shifted there."""
    group, count = static.group, static.num_components
    wide = min(group.num_wide, count)
    rows = torch.empty((count, group.num_channels), dtype=torch.int16, device=device)
    rows[:wide] = torch.from_numpy(group.mantissas[:wide]).to(device)
    rows[wide:] = torch.from_numpy(group.mantissas[wide:count].astype(np.int8)).to(device)
    rows *= torch.from_numpy((1 << group.row_shifts[:count].astype(np.int32)).astype(np.int16)).to(device)[:, None]
    return rows
