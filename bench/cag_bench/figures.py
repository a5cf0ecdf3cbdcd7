"""Arithmetic of a run: percentiles, ratios pair by pair with their uncertainty, and when a build has paid.

Numbers in, numbers out; knows no arms and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

PERCENTILES = (50, 90, 99)
MAX_OUTSIDE = 0.05  # of an interval: the chance that the median is not in it


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


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, object] | None:
    """`p50`: median of the ratios of the pairs; `ci95`: as `median_ci95`; `n`: pairs. None without pairs."""
    if not pairs:
        return None
    ratios = [over / under for over, under in pairs]
    return {"p50": median(ratios), "ci95": median_ci95(ratios), "n": len(pairs)}


def median_ci95(values: Sequence[float]) -> list[float] | None:
    """The narrowest two values, as far from either end, that hold the median of what was drawn from with a chance of at
    least 95 %, whatever its distribution; None where not even the least and the greatest do: below 6 values.

    Source: Conover, "Practical Nonparametric Statistics", 3rd edition, 1999, section 3.2 (quantiles, order statistics).
    """
    count, left_out = len(values), 0
    outside = 2 / 2**count  # the chance that all values lie on one side of the median
    if outside > MAX_OUTSIDE:
        return None
    while (further := outside + 2 * math.comb(count, left_out + 1) / 2**count) <= MAX_OUTSIDE:
        left_out, outside = left_out + 1, further
    ordered = sorted(values)
    return [ordered[left_out], ordered[-1 - left_out]]


def break_even_questions(build_s: float, pairs: Sequence[tuple[float, float]]) -> int | None:
    """The first number of questions whose summed first-token times, the build added, are no more than without a cache.

    `pairs` are (without, with) of the same questions; their mean difference is what a question saves. None when there
    are no pairs or a question saves nothing.
    """
    saved_s = mean([without - behind for without, behind in pairs])
    if saved_s is None or saved_s <= 0:
        return None
    return max(1, math.ceil(build_s / saved_s))
