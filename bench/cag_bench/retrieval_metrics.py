"""Quality of a ranking against the set of right items: Recall@k, all-found@k, reciprocal rank, nDCG@k.

A ranking is a sequence of distinct ids, best first; relevance is binary. Each function gives one query's value in
0..1; MRR and the rest of a set's figures are means over its queries.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def recall_at_k(ranking: Sequence[str], relevant: Collection[str], k: int) -> float:
    """The share of the relevant ids among the first `k`. Raises: `ValueError` without relevant ids or for k < 1."""
    _check(relevant, k)
    return len(set(ranking[:k]) & set(relevant)) / len(set(relevant))


def all_found_at_k(ranking: Sequence[str], relevant: Collection[str], k: int) -> float:
    """1 when every relevant id is among the first `k`, else 0. Raises: `ValueError` as `recall_at_k`."""
    _check(relevant, k)
    return float(set(relevant) <= set(ranking[:k]))


def reciprocal_rank(ranking: Sequence[str], relevant: Collection[str]) -> float:
    """One over the rank of the first relevant id; 0 when none is ranked. Raises: `ValueError` without relevant ids."""
    _check(relevant, 1)
    return next((1.0 / rank for rank, item in enumerate(ranking, start=1) if item in relevant), 0.0)


def ndcg_at_k(ranking: Sequence[str], relevant: Collection[str], k: int) -> float:
    """Discounted gain of the first `k` over that of an ideal ranking. Raises: `ValueError` as `recall_at_k`.

    Source: Jarvelin and Kekalainen, "Cumulated gain-based evaluation of IR techniques", 2002; discount log2(rank + 1).
    """
    _check(relevant, k)
    gain = sum(_discount(rank) for rank, item in enumerate(ranking[:k], start=1) if item in relevant)
    ideal = sum(_discount(rank) for rank in range(1, min(k, len(set(relevant))) + 1))
    return gain / ideal


def _discount(rank: int) -> float:
    return 1.0 / math.log2(rank + 1)


def _check(relevant: Collection[str], k: int) -> None:
    if not relevant:
        raise ValueError("A query without relevant items has no retrieval quality.")
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}.")
