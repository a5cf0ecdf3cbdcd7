"""Which implementation serves the operations on prefixes, decided once for a device: Triton, or torch.

Triton is imported by the first call that it serves, never on a machine without a CUDA device.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from cag_kernels.cpu import codes_arithmetic, compiles_codes, has_byte_tiles, has_numba
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


def prefix_paths(device: torch.device) -> dict[str, str]:
    """What serves each operation on prefixes on `device`, for reports: operation -> implementation."""
    on_device = triton_runs_on(device)
    kernel = "Triton" if on_device else "torch"
    compiled = device.type == "cpu" and has_numba()
    choice = "from 8 bits of the output matrix where tiles multiply, half of its memory more"
    tails = "compiled, all sessions at once" if compiled else "torch, session by session"
    layers = "compiled, recorded once" if compiled else "the network's own"
    layers = "Triton between products, steps recorded in CUDA graphs" if on_device else layers
    codes = "compiled, " + codes_arithmetic() if compiled else "torch, dequantized as a whole"
    return {
        "layers of a Llama, few rows": layers,
        "greedy choice": choice if compiled and has_byte_tiles() else "from all logits",
        "prefix, 16 bits": "Triton or flash-attn, split" if on_device else "as prefill, question and answer",
        "prefix, 8 and 4 bits": f"{kernel}, dequantized in the tile" if on_device else codes,
        "tails in pages": f"{kernel}, all sessions at once" if on_device else tails,
        "quantize, rotate, decode": kernel,
        "caches in the codec transform": "decoded on the device, by Triton" if on_device else "decoded by the store",
    }
