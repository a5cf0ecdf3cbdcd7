"""What serves each operation of this package on a device, in words. Asks those who decide, and decides nothing."""

from __future__ import annotations

import torch

from cag_kernels.cpu.attention.segments import codes_arithmetic
from cag_kernels.cpu.processor import has_numba
from cag_kernels.device import triton_runs_on
from cag_kernels.largest import choice_arithmetic


def prefix_paths(device: torch.device) -> dict[str, str]:
    """What serves each operation on prefixes on `device`, for reports: operation -> implementation."""
    on_device = triton_runs_on(device)
    kernel = "Triton" if on_device else "torch"
    compiled = device.type == "cpu" and has_numba()
    tails = "compiled, all sessions at once" if compiled else "torch, session by session"
    layers = "compiled, recorded once" if compiled else "the network's own"
    layers = "Triton between products, steps recorded in CUDA graphs" if on_device else layers
    codes = "compiled, " + codes_arithmetic() if compiled else "torch, dequantized as a whole"
    return {
        "layers of a Llama, few rows": layers,
        "greedy choice": choice_arithmetic() if device.type == "cpu" else "from all logits",
        "prefix, 16 bits": "Triton or flash-attn, split" if on_device else "as prefill, question and answer",
        "prefix, 8 and 4 bits": f"{kernel}, dequantized in the tile" if on_device else codes,
        "tails in pages": f"{kernel}, all sessions at once" if on_device else tails,
        "quantize, rotate, decode": kernel,
        "caches in the codec transform": "decoded on the device, by Triton" if on_device else "decoded by the store",
    }
