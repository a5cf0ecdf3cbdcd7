"""Compiling what a question needs when a model is loaded, so that no question waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cag.forward.state import AttentionRule, KvShape
from cag.forward.weights import PackedLinear
from cag_kernels import warm_up, warm_up_dots, warm_up_linear, warm_up_tails, warm_up_tiles


def compile_kernels(
    network: Any,
    shapes: Sequence[KvShape],
    rules: Sequence[AttentionRule],
    kv_dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> None:
    """Attention over keys of these shapes in `kv_dtype`, with the windows that layers have, and products, for a network
    on a CPU whose weights are laid out and that computes in `compute_dtype`."""
    groups = {network.config.get_text_config().num_attention_heads // shape.num_kv_heads for shape in shapes}
    head_dims = sorted({shape.head_dim for shape in shapes})
    windows = dict.fromkeys(rule.window for rule in rules)
    warm_up(head_dims, sorted(groups), windows, kv_dtype)
    warm_up_tails(head_dims, sorted(groups), kv_dtype)
    for dtype in {module.packed.panels.dtype for module in network.modules() if isinstance(module, PackedLinear)}:
        warm_up_linear(dtype)
    if compute_dtype == torch.bfloat16:
        warm_up_tiles(head_dims, windows)
        warm_up_dots(head_dims, sorted(groups), windows)
