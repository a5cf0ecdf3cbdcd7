"""Attention over one layer of the prefix in codes against bfloat16 at the same shape, by the quicker of two kernels.

Sizes in, rows out.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag_bench.gpu.model import KINDS
from cag_bench.gpu.shapes import GpuOptions
from cag_bench.kernel_case import KernelCase, measure_case, relative_error
from cag_bench.kernel_clock import Clock
from cag_kernels import DensePrefix, prefix_attention, quantize_prefix
from cag_kernels.flash import fused_attention
from cag_kernels.prefix_reference import prefix_attention_reference

MAX_ERROR = 0.03  # of the largest number: bfloat16 rounds by 0.004 at each of a few places
CHECKED_QUERIES = 2


def attention_rows(
    device: torch.device, clock: Clock, options: GpuOptions, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """For each kind of codes and number of queries a row: seconds, floor, and `quicker_bf16_over`, pair by pair."""
    shape = options.network
    torch.manual_seed(options.seed)
    size = (2, shape.num_kv_heads, options.prefix_tokens, shape.head_dim)
    plain = DensePrefix(*torch.randn(size, dtype=torch.bfloat16, device=device))
    arrivals = torch.zeros(shape.num_kv_heads, dtype=torch.int32, device=device)
    for kind, codes in KINDS.items():
        if codes is None:
            continue
        coded = quantize_prefix(*plain, **codes)
        for num_queries in sorted({1, 16, options.sessions}):
            query = torch.randn(shape.num_q_heads, num_queries, shape.head_dim, dtype=torch.bfloat16, device=device)
            scale = shape.head_dim**-0.5
            attend = partial(prefix_attention, scale=scale, arrivals=arrivals)
            error = partial(_error, query, coded, scale, arrivals)
            arms = {
                f"prefix_attention {kind}": partial(attend, query, coded),
                "prefix_attention bf16": partial(attend, query, plain),
                "fused bf16": partial(fused_attention, query, *plain, scale=scale, offset=plain.num_tokens),
            }
            moved = coded.num_bytes + 2 * query.nbytes + query.numel() * 4
            sizes = {"num_tokens": options.prefix_tokens, "num_queries": num_queries}
            case = KernelCase(f"prefix attention, {kind}", sizes, moved, arms, error, MAX_ERROR)
            row = measure_case(case, clock, bandwidth, options.samples, options.seed)
            quicker = min(row["ratios"].values(), key=lambda ratio: ratio["p50"])
            yield row | {"quicker_bf16_over": quicker}


def _error(query: Tensor, coded: Any, scale: float, arrivals: Tensor) -> float:
    few = query[:, :CHECKED_QUERIES]
    expected, _ = prefix_attention_reference(few.float(), coded, scale=scale)
    found, _ = prefix_attention(query, coded, scale=scale, arrivals=arrivals)
    return relative_error(found[:, :CHECKED_QUERIES], expected)
