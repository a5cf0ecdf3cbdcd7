"""The time of a run: a budget that parts look at before they begin and between samples, and the wall clock.

Callables in, seconds out.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from cag_bench.figures import percentiles

MOST_LETTERS = 300  # of an error


class Budget:
    """Seconds that are left of a run."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left; negative when the time is over."""
        return self._ends_at - time.perf_counter()


def wall_samples(
    work: Callable[[], object], device: torch.device, count: int, budget: Budget, warm_up: int = 3
) -> list[float]:
    """Seconds of up to `count` runs of `work`, the device's work included; one at least, fewer when time runs out."""
    for _ in range(warm_up):
        work()
    samples: list[float] = []
    while len(samples) < count and (budget.left_s > 0 or not samples):
        settle(device)
        begin = time.perf_counter()
        work()
        settle(device)
        samples.append(time.perf_counter() - begin)
    return samples


def settle(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most memory of the device that was in use since the last call; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def released(device: torch.device) -> None:
    """Give back the memory of the device that nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def failure(name: str, error: Exception) -> dict[str, Any]:
    """The row of what could not be measured. Inside of an `except`."""
    return {"name": name, "failed": reason(error), "traceback": traceback.format_exc()}


def reason(error: Exception) -> str:
    """An error in a line of a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:MOST_LETTERS]


def median_of(samples: list[float]) -> float:
    """Their median; of one at least."""
    return (percentiles(samples) or {})["p50"]
