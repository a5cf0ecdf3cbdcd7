"""Arithmetic of a run: percentiles, ratios pair by pair with their uncertainty, and when a build has paid.

Numbers in, numbers out; knows no arms and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (50, 90, 99)
NUM_RESAMPLES = 10_000
MIN_PAIRS = 3  # below, a confidence interval would only repeat the samples
_BATCH_NUMBERS = 1_000_000


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """`p50`, `p90` and `p99`, linearly interpolated between samples; None without samples."""
    if not values:
        return None
    found = np.percentile(np.asarray(values, dtype=np.float64), PERCENTILES, method="linear")
    return {f"p{percentile}": float(value) for percentile, value in zip(PERCENTILES, found, strict=True)}


def median(values: Sequence[float]) -> float | None:
    """The median; None without values."""
    return float(np.median(values)) if values else None


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return math.fsum(values) / len(values) if values else None


def paired(over: Mapping[int, float], under: Mapping[int, float]) -> list[tuple[float, float]]:
    """The values of the questions that both have, in the order of the questions."""
    return [(over[question], under[question]) for question in sorted(over.keys() & under.keys())]


def paired_ratio(pairs: Sequence[tuple[float, float]], seed: int) -> dict[str, object] | None:
    """`p50`: median of the ratios of the pairs; `ci95`: its bootstrap interval, None below `MIN_PAIRS`; `n`: pairs.

    None without pairs.
    """
    if not pairs:
        return None
    ratios = np.asarray([over / under for over, under in pairs], dtype=np.float64)
    return {"p50": float(np.median(ratios)), "ci95": median_ci95(ratios, seed), "n": len(pairs)}


def median_ci95(values: NDArray[np.float64], seed: int) -> list[float] | None:
    """The 2.5th and 97.5th percentile of the medians of `NUM_RESAMPLES` resamples; None below `MIN_PAIRS` values.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13 (percentile interval).
    """
    if len(values) < MIN_PAIRS:
        return None
    generator = np.random.default_rng(seed)
    batch = max(1, _BATCH_NUMBERS // len(values))
    medians: list[NDArray[np.float64]] = []
    for done in range(0, NUM_RESAMPLES, batch):
        rows = min(batch, NUM_RESAMPLES - done)
        medians.append(np.median(values[generator.integers(len(values), size=(rows, len(values)))], axis=1))
    low, high = np.percentile(np.concatenate(medians), (2.5, 97.5), method="linear")
    return [float(low), float(high)]


def break_even_questions(build_s: float, pairs: Sequence[tuple[float, float]]) -> int | None:
    """The first number of questions whose summed first-token times, the build added, are no more than without a cache.

    `pairs` are (without, with) of the same questions; their mean difference is what a question saves. None when there
    are no pairs or a question saves nothing.
    """
    saved_s = mean([without - behind for without, behind in pairs])
    if saved_s is None or saved_s <= 0:
        return None
    return max(1, math.ceil(build_s / saved_s))
