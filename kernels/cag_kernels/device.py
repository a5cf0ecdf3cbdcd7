"""Which implementation serves the operations on prefixes, decided once for a device: Triton, or torch.

Triton is imported by the first call that it serves, never on a machine without a CUDA device.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from cag_kernels.cpu.attention.segments import compiles_codes
from cag_kernels.prefixes import Codes

MAX_HEAD_DIM = 256
HALF_TYPES = (torch.bfloat16, torch.float16)


@cache
def has_triton() -> bool:
    """Whether Triton can be imported on this machine."""
    return importlib.util.find_spec("triton") is not None


@cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere, where Triton only runs in its interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels run on a device."""
    return device.type == "cuda" and has_triton()


def triton_serves(tensor: Tensor) -> bool:
    """Whether the Triton kernels take a query, keys or values like `tensor`, whose last axis is head_dim."""
    return (
        tensor.dtype in (*HALF_TYPES, torch.float32)
        and tensor.shape[-1] % 2 == 0
        and tensor.shape[-1] <= MAX_HEAD_DIM
        and not tensor.requires_grad
        and triton_runs_on(tensor.device)
    )


def serves_codes(device: torch.device, head_dim: int, codes: Codes) -> bool:
    """Whether attention on a device reads a prefix in such codes as they are, not slower than numbers."""
    if device.type == "cpu":
        return compiles_codes(head_dim, codes)
    fits = codes.group_tokens % 16 == 0 and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM
    return triton_runs_on(device) and fits and 0 < codes.group_channels <= head_dim
