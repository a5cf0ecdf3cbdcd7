"""The ways of launches beside each other in one run: what each does for attention alone and for a first token.

Every way computes the same, which the tests of the kernels hold; here they are only timed. Sizes in, rows out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cag_bench.gpu.clock import Budget, median_of, reason
from cag_bench.gpu.model import KINDS
from cag_bench.gpu.shapes import GpuOptions
from cag_bench.kernel_clock import Clock, Work
from cag_kernels import DensePrefix, prefix_attention, quantize_prefix
from cag_kernels.prefixes import Prefix
from cag_kernels.triton.launch_ways import LaunchWays, launch_ways, launching

NUM_SAMPLES = 7
MIN_WAY_S = 8.0  # one more is compiled and timed only with so much left
MIB = 1 << 20

Row = dict[str, Any]


def apart() -> LaunchWays:
    """Every launch by itself, as it was."""
    return LaunchWays(touches=False, joins=False, overlaps=False, ahead_bytes=0)


def attention_ways() -> dict[str, LaunchWays]:
    """Of attention over a prefix; first what the product does, then without one thing each, last without any."""
    usual = launch_ways()
    return {
        "as it is": usual,
        "merged apart": usual._replace(joins=False),
        "next tile not touched": usual._replace(touches=False),
        "launches not overlapped": usual._replace(overlaps=False),
        "as it was": apart(),
    }


def step_ways() -> dict[str, LaunchWays]:
    """Of a whole step."""
    usual = launch_ways()
    return {
        "as it is": usual,
        "launches not overlapped": usual._replace(overlaps=False),
        "nothing called ahead": usual._replace(ahead_bytes=0),
        "4 MiB ahead": usual._replace(ahead_bytes=4 * MIB),
        "16 MiB ahead": usual._replace(ahead_bytes=16 * MIB),
        "as it was": apart(),
    }


def ways_rows(device: torch.device, clock: Clock, options: GpuOptions, budget: Budget) -> Iterator[Row]:
    """A row for each kind of prefix and number of queries: way -> median seconds."""
    shape = options.network
    torch.manual_seed(options.seed)
    size = (2, shape.num_kv_heads, options.prefix_tokens, shape.head_dim)
    plain = DensePrefix(*torch.randn(size, dtype=torch.bfloat16, device=device))
    arrivals = torch.zeros(shape.num_kv_heads, dtype=torch.int32, device=device)
    for num_queries in (1, options.question_tokens, 16):
        for kind in ("int4", "bf16", "int8"):
            codes = KINDS[kind]
            prefix: Prefix = plain if codes is None else quantize_prefix(*plain, **codes)
            query = torch.randn(shape.num_q_heads, num_queries, shape.head_dim, dtype=torch.bfloat16, device=device)
            works = {
                name: _attending(query, prefix, arrivals, ways)
                for name, ways in attention_ways().items()
                if num_queries == 1 or name in ("as it is", "as it was")
            }
            yield {"name": f"launch ways, attention {kind}, queries {num_queries}"} | _timed(works, clock, budget)


def _attending(query: Tensor, prefix: Prefix, arrivals: Tensor, ways: LaunchWays) -> Work:
    def work() -> Tensor:
        with launching(ways):
            return prefix_attention(query, prefix, scale=query.shape[2] ** -0.5, arrivals=arrivals)[0]

    return work


def _timed(works: Mapping[str, Work], clock: Clock, budget: Budget) -> Row:
    """Median seconds of each, in turn; as many ways as there is time for. One that fails says why."""
    prepared: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    for name, work in works.items():
        if budget.left_s >= MIN_WAY_S:
            try:
                prepared[name] = clock.prepared(work)
            except Exception as error:  # on this device; the other ways are there to be compared
                failed[name] = reason(error)
    samples: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(NUM_SAMPLES):
        for name, sample in prepared.items():
            samples[name].append(sample())
    return _row(samples, failed)


def step_way_row(name: str, samples_of: Callable[[], list[float]], forget: Callable[[], None], budget: Budget) -> Row:
    """Seconds of a step in each way, as often as `samples_of` takes it; `forget` drops what was recorded before."""
    found: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for way, ways in step_ways().items():
        if budget.left_s < MIN_WAY_S:
            break
        forget()
        try:
            with launching(ways):
                found[way] = samples_of()
        except Exception as error:
            failed[way] = reason(error)
    forget()
    return {"name": name} | _row(found, failed)


def _row(samples: dict[str, list[float]], failed: dict[str, str]) -> Row:
    medians = {name: median_of(found) for name, found in samples.items()}
    return {"variants_s": medians, "variants_samples_s": samples, "variants_failed": failed}
