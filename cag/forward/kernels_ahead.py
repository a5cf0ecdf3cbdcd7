"""Compiling what a question needs when a model is loaded, so that no question waits for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cag.forward.state import AttentionRule, KvShape
from cag_kernels import warm_up, warm_up_linear, warm_up_tiles


def compile_kernels(
    num_q_heads: int, shapes: Sequence[KvShape], rules: Sequence[AttentionRule], compute_dtype: torch.dtype
) -> None:
    """Attention over bfloat16 keys of these shapes, with the windows that layers have, and products, for a network that
    computes in `compute_dtype` on a CPU."""
    groups = {num_q_heads // shape.num_kv_heads for shape in shapes}
    head_dims = sorted({shape.head_dim for shape in shapes})
    windows = dict.fromkeys(rule.window for rule in rules)
    warm_up(head_dims, sorted(groups), windows)
    if compute_dtype == torch.float32:
        warm_up_linear(torch.bfloat16)
    elif compute_dtype == torch.bfloat16:
        warm_up_tiles(head_dims, windows)
