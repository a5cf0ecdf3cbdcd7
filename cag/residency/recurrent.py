"""States of recurrent layers between tensors and the store. Knows shapes; knows no network and no files."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from cag.errors import CacheMismatch
from cag.forward.recurrent import RecurrentLayers, States
from cag.residency.buffers import storage_view
from cag_store import StateArray


def stored_states(states: States) -> dict[str, StateArray]:
    """As the store takes them: each in its own type, on the host."""
    names = ((name, state, str(state.dtype).removeprefix("torch.")) for name, state in states.items())
    return {name: StateArray(dtype, storage_view(state.cpu().contiguous())) for name, state, dtype in names}


def loaded_states(stored: Mapping[str, StateArray], layers: RecurrentLayers, device: torch.device) -> States:
    """As the model computes with them: to the bit where it computes in the type in which it did at the build.

    Raises: CacheMismatch: states of other layers, or of other shapes.
    """
    expected = {name: shape for name, (shape, _) in layers.shapes.items()}
    found = {name: tuple(state.array.shape) for name, state in stored.items()}
    if expected != found:
        raise CacheMismatch(
            "the cache holds states of other recurrent layers than the model has.",
            hint="Remove it, run `cag gc`, and build it again.",  # with its snapshots there, a build would find them
            part="recurrent layers",
            expected=expected,
            found=found,
        )
    return {name: _tensor(state).to(device, layers.shapes[name][1]) for name, state in stored.items()}


def _tensor(state: StateArray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(state.array))
    return tensor.view(torch.bfloat16) if state.dtype == "bfloat16" else tensor
