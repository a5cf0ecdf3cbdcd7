from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag_bench.retrieval_metrics import all_found_at_k, ndcg_at_k, recall_at_k, reciprocal_rank

RANKING = ["a", "b", "c", "d", "e"]


def test_recall_is_the_share_of_the_relevant_ones():
    assert [recall_at_k(RANKING, {"b", "d"}, k) for k in (1, 2, 3, 4, 99)] == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert recall_at_k(RANKING, {"a", "missing"}, 5) == 0.5


def test_all_found_needs_every_relevant_one():
    assert [all_found_at_k(RANKING, {"b", "d"}, k) for k in (3, 4)] == [0.0, 1.0]


def test_reciprocal_rank_is_that_of_the_first_hit():
    assert reciprocal_rank(RANKING, {"c", "e"}) == pytest.approx(1 / 3)
    assert reciprocal_rank(RANKING, {"z"}) == 0.0


def test_ndcg_discounts_by_the_logarithm_of_the_rank():
    assert ndcg_at_k(RANKING, {"a"}, 10) == 1.0
    assert ndcg_at_k(RANKING, {"c"}, 10) == pytest.approx(0.5)
    found = 1 / math.log2(3) + 1 / math.log2(5)
    assert ndcg_at_k(RANKING, {"b", "d"}, 10) == pytest.approx(found / (1 + 1 / math.log2(3)))
    assert ndcg_at_k(RANKING, {"b", "d"}, 1) == 0.0


def test_an_ideal_ranking_cut_short_is_still_ideal():
    assert ndcg_at_k(["a", "b", "x"], {"a", "b", "c"}, 2) == 1.0


@pytest.mark.parametrize("metric", [recall_at_k, all_found_at_k, ndcg_at_k])
def test_senseless_questions_are_refused(metric):
    with pytest.raises(ValueError, match="relevant"):
        metric(RANKING, [], 3)
    with pytest.raises(ValueError, match="k must"):
        metric(RANKING, {"a"}, 0)


def test_reciprocal_rank_without_relevant_ones_is_refused():
    with pytest.raises(ValueError, match="relevant"):
        reciprocal_rank(RANKING, [])


@given(st.permutations(RANKING), st.sets(st.sampled_from([*RANKING, "x"]), min_size=1), st.integers(1, 6))
def test_values_stay_in_bounds_and_agree(ranking, relevant, k):
    recall, ndcg = recall_at_k(ranking, relevant, k), ndcg_at_k(ranking, relevant, k)
    assert 0.0 <= recall <= 1.0
    assert 0.0 <= ndcg <= 1.0 + 1e-12
    assert (recall > 0) == (ndcg > 0) == (reciprocal_rank(ranking, relevant) >= 1 / k)
    assert all_found_at_k(ranking, relevant, k) == (recall == 1.0)
    assert recall_at_k(ranking, relevant, k + 1) >= recall
