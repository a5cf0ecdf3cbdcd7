"""One kernel at one shape: checked first, then timed against its references in turn, beside the floor of its bytes.

A case in, a row out; knows no engine and no files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cag_bench.errors import KernelWrong
from cag_bench.figures import paired_ratio, percentiles
from cag_bench.kernel_clock import Clock, Work


@dataclass(frozen=True)
class KernelCase:
    """A kernel and what it is measured against.

    name: operation and kind, as it stands in rows. shape: the sizes. bytes_moved: read and written at least, once each.
    arms: name -> call; the first is the kernel, the others references. error: the kernel's largest error over the
    largest expected number, measured before the clock starts. max_error: beyond this the kernel is wrong.
    """

    name: str
    shape: Mapping[str, int]
    bytes_moved: int
    arms: Mapping[str, Work]
    error: Callable[[], float]
    max_error: float


def measure_case(case: KernelCase, clock: Clock, bandwidth: float, num_samples: int, seed: int) -> dict[str, Any]:
    """The row of a case: `floor_s`, for each arm p50, p90, p99 and raw samples, ratios of pairs.

    Raises:
        KernelWrong: the result is not what the reference says; nothing was timed.
    """
    error = case.error()
    if not error <= case.max_error:
        raise KernelWrong(f"{case.name} at {dict(case.shape)} is off by {error:.3g}, allowed are {case.max_error:.3g}.")
    timed = {name: clock.prepared(work) for name, work in case.arms.items()}
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order = random.Random(f"{seed}/{case.name}")
    for _ in range(num_samples):
        for name in order.sample(list(timed), len(timed)):
            samples[name].append(timed[name]())
    kernel, *references = case.arms
    floor_s = case.bytes_moved / bandwidth
    return {
        "name": case.name,
        "shape": dict(case.shape),
        "error": error,
        "bytes_moved": case.bytes_moved,
        "floor_s": floor_s,
        "arms": {name: _figures(values, floor_s) for name, values in samples.items()},
        "ratios": {
            f"{name}/{kernel}": paired_ratio(list(zip(samples[name], samples[kernel], strict=True)))
            for name in references
        },
    }


def _figures(samples: list[float], floor_s: float) -> dict[str, Any]:
    spread = percentiles(samples) or {}
    return {"seconds": spread, "p50_over_floor": spread["p50"] / floor_s, "samples_s": samples}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected number; NaN where something is not a number."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30))
