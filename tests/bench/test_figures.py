from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cag_bench.figures import break_even_questions, mean, median, median_ci95, paired, paired_ratio, percentiles

positive = st.floats(0.001, 1000)


def test_percentiles_are_linear_between_samples():
    found = percentiles([4.0, 1.0, 3.0, 2.0, 5.0])
    assert found == {"p50": 3.0, "p90": pytest.approx(4.6), "p99": pytest.approx(4.96)}
    assert percentiles([7.0]) == {"p50": 7.0, "p90": 7.0, "p99": 7.0}
    assert percentiles([]) is None


def test_mean_and_median_of_nothing_are_none():
    assert (mean([]), median([])) == (None, None)
    assert (mean([1.0, 2.0, 6.0]), median([1.0, 2.0, 6.0])) == (3.0, 2.0)


def test_pairs_are_of_the_same_question_only():
    assert paired({2: 20.0, 0: 10.0, 5: 50.0}, {0: 1.0, 2: 2.0, 3: 3.0}) == [(10.0, 1.0), (20.0, 2.0)]


def test_ratio_is_the_median_of_ratios_and_not_the_ratio_of_medians():
    # Medians are 2 and 2; the ratios of the pairs are 0.5, 8 and 1.
    ratio = paired_ratio([(1.0, 2.0), (8.0, 1.0), (2.0, 2.0)])
    assert ratio["p50"] == 1.0
    assert ratio["n"] == 3


def test_fewer_pairs_than_can_span_the_median_19_times_of_20_have_no_interval():
    assert paired_ratio([(4.0, 1.0), (6.0, 1.0)]) == {"p50": 5.0, "ci95": None, "n": 2}
    assert paired_ratio([]) is None
    assert median_ci95([]) is None
    assert median_ci95([1.0, 2.0, 3.0, 4.0, 5.0]) is None  # all on one side of the median: 2 of 32
    assert median_ci95([6.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == [1.0, 6.0]


@pytest.mark.parametrize(("count", "places"), [(8, (1, 8)), (9, (2, 8)), (16, (4, 13)), (25, (8, 18)), (100, (40, 61))])
def test_interval_is_that_of_the_tables_of_the_sign_test(count, places):
    assert median_ci95([float(place) for place in range(count, 0, -1)]) == list(places)


def test_interval_of_equal_values_is_a_point():
    assert median_ci95([3.5] * 6) == [3.5, 3.5]


@pytest.mark.parametrize("count", [6, 7, 8, 16, 31])
def test_interval_covers_the_true_median_as_often_as_it_says_however_few_there_are(count):
    drawn = np.random.default_rng(3).lognormal(0.0, 0.4, (2000, count))
    intervals = [median_ci95(list(values)) for values in drawn]
    assert sum(low <= 1 <= high for low, high in intervals) >= 0.94 * len(drawn)


@given(st.lists(positive, min_size=6, max_size=20))
def test_interval_holds_the_median_and_lies_within_the_values(values):
    low, high = median_ci95(values)
    assert min(values) <= low <= np.median(values) <= high <= max(values)


def test_break_even_is_the_first_question_count_that_has_paid():
    # A question saves 0.5 s on average: 10 s are paid after 20 questions, 10.1 s after 21.
    pairs = [(0.5, 0.1), (0.7, 0.1)]
    assert break_even_questions(10.0, pairs) == 20
    assert break_even_questions(10.1, pairs) == 21
    assert break_even_questions(0.0, pairs) == 1


def test_break_even_is_none_when_nothing_is_saved():
    assert break_even_questions(1.0, [(0.2, 0.3)]) is None
    assert break_even_questions(1.0, [(0.2, 0.2)]) is None
    assert break_even_questions(1.0, []) is None


@given(st.floats(0, 1000), st.lists(st.tuples(positive, positive), min_size=1, max_size=8))
def test_break_even_is_minimal(build_s, pairs):
    questions = break_even_questions(build_s, pairs)
    saved = mean([without - behind for without, behind in pairs])
    if questions is None:
        assert saved <= 0
    else:
        assert questions * saved >= build_s * (1 - 1e-9)
        assert questions == 1 or (questions - 1) * saved < build_s * (1 + 1e-9)
