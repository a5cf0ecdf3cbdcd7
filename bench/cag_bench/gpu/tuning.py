"""How the kernels whose speed nobody has seen yet are best cut: seconds of each variant, with the time that is left.

Nothing here changes what is computed. Sizes in, rows out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cag_bench.gpu.clock import Budget, median_of, reason
from cag_bench.gpu.model import KINDS
from cag_bench.gpu.shapes import GpuOptions
from cag_bench.gpu.transform import CODED_SHARE
from cag_bench.kernel_clock import Clock, Work
from cag_kernels import DensePrefix, quantize_prefix
from cag_kernels.device import num_processors
from cag_kernels.prefixes import Prefix

NUM_SAMPLES = 7
MIN_VARIANT_S = 12.0  # one more is compiled and timed only with so much left
# warps, stages, programs at once; over 16 bits three stages of 72 KB leave room for three programs, two for five
CUTS = [(4, 3, 4), (4, 3, 3), (4, 2, 4), (4, 2, 5), (2, 3, 6), (1, 3, 8), (4, 4, 4), (4, 3, 6), (2, 4, 6)]
WIDE_CUTS = [(8, 3, 1), (4, 3, 2), (8, 2, 1), (8, 4, 1)]
INVERSE_CUTS = [(8, 3, 216), (8, 3, None), (8, 3, 200), (8, 4, 216), (8, 2, 216)]  # warps, stages, registers

Row = dict[str, Any]


def tuning_rows(device: torch.device, clock: Clock, options: GpuOptions, budget: Budget) -> Iterator[Row]:
    """A row for each kernel and size: variant -> median seconds; variants that there is no time for are left out."""
    if device.type != "cuda":
        yield {"name": "tuning", "skipped": "there is nothing to tune without a CUDA device"}
        return
    shape = options.network
    size = (2, shape.num_kv_heads, options.prefix_tokens, shape.head_dim)
    plain = DensePrefix(*torch.randn(size, dtype=torch.bfloat16, device=device))
    for kind in ("int4", "bf16", "int8"):
        codes = KINDS[kind]
        prefix: Prefix = plain if codes is None else quantize_prefix(*plain, **codes)
        for num_queries, cuts in ((4, CUTS), (options.question_tokens, WIDE_CUTS)):
            query = torch.randn(shape.num_q_heads, num_queries, shape.head_dim, dtype=torch.bfloat16, device=device)
            works = {str(cut): partial(attend_cut, query, prefix, *cut) for cut in cuts}
            yield {"name": f"tuning, attention {kind}, {num_queries} queries"} | _timed(works, clock, budget)
    yield {"name": "tuning, inverse transform"} | _timed(_inverse_works(device, options), clock, budget)


def attend_cut(query: Tensor, prefix: Prefix, num_warps: int, num_stages: int, programs: int) -> Tensor:
    """Attention over a prefix with a launch that is cut like this."""
    from cag_kernels.triton.merge import merge_parts
    from cag_kernels.triton.prefix import attend_prefix_parts, plan_splits

    num_q_heads, num_queries, head_dim = query.shape
    rows = num_q_heads // prefix[0].shape[0] * num_queries
    plan = plan_splits(prefix, rows, head_dim, num_processors(query.device), programs)
    plan = plan._replace(num_warps=num_warps, num_stages=num_stages)
    part_out = torch.empty(plan.num_splits, *query.shape, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(part_out.shape[:3], dtype=torch.float32, device=query.device)
    masks: dict[str, Any] = {"positions": None, "window": None, "softcap": None}
    attend_prefix_parts(query, prefix, part_out, part_lse, plan, scale=head_dim**-0.5, **masks)
    return merge_parts(part_out, part_lse, torch.float32)[0]


def _inverse_works(device: torch.device, options: GpuOptions) -> dict[str, Work]:
    from cag_kernels.triton.inverse import Cut, invert, operands

    channels = options.joint_layers * options.network.num_kv_heads * options.network.head_dim
    num_components = round(CODED_SHARE * channels)
    codes = torch.randint(-64, 64, (num_components, options.prefix_tokens), dtype=torch.int16, device=device).t()
    rows = torch.randint(-(1 << 14), 1 << 14, (num_components, channels), dtype=torch.int16, device=device)
    scale, mean = torch.rand(2, channels, device=device)
    split = operands(codes, rows, None, options.network.head_dim, "halves")
    size = channels // options.network.head_dim, options.prefix_tokens, options.network.head_dim
    arguments = (*split, scale, mean, None, None, torch.empty(size, dtype=torch.bfloat16, device=device))
    return {str(cut): partial(invert, *arguments, Cut(*cut)) for cut in INVERSE_CUTS}


def _timed(works: Mapping[str, Work], clock: Clock, budget: Budget) -> Row:
    """Median seconds of each; one that does not compile or fit says why."""
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, work in works.items():
        if budget.left_s < MIN_VARIANT_S:
            break
        try:
            seconds[name] = median_of([sample() for sample in NUM_SAMPLES * [clock.prepared(work)]])
        except Exception as error:  # too much shared memory, say
            failed[name] = reason(error)
    return {"variants_s": seconds, "variants_failed": failed}
