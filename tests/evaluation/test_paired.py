# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of comparisons over seeds: paired, with Student's interval, and none that was not measured."""

import math

import numpy as np
import pytest
from scipy import stats

from modeling_cse.evaluation import Estimate, difference, mean_interval, ratio, share_of_gain


DENSE = {0: 20.0, 1: 30.0, 2: 25.0}
CSE = {0: 18.0, 1: 28.5, 2: 23.0}
ORACLE = {0: 17.5, 1: 27.0, 2: 22.0}


def logs(first, second):
    return np.array([math.log(first[seed] / second[seed]) for seed in sorted(first)])


def test_the_interval_is_students():
    values = [0.1, 0.4, 0.3, 0.2]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_interval(values)
    assert (found.value, found.lower, found.upper) == pytest.approx((0.25, expected.low, expected.high))
    narrow = mean_interval(values, confidence=0.5)
    assert found.lower < narrow.lower < narrow.upper < found.upper and found.seeds == 4


def test_a_ratio_is_geometric_and_paired():
    found = ratio(CSE, DENSE)
    interval = stats.ttest_1samp(logs(CSE, DENSE), 0).confidence_interval(0.95)
    assert found.value == pytest.approx((0.9 * 0.95 * 0.92) ** (1 / 3))
    assert (found.lower, found.upper) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
    # seeds differ by far more than the arms do, and only pairing sees through that
    assert found.upper < 1 < max(CSE.values()) / min(DENSE.values())
    assert ratio(DENSE, CSE).value == pytest.approx(1 / found.value)


def test_seeds_that_only_one_side_has_do_not_count():
    assert ratio({**CSE, 7: 1e6}, {**DENSE, 8: 1e-6}) == ratio(CSE, DENSE)


def test_a_difference_is_paired():
    found = difference(CSE, DENSE)
    interval = stats.ttest_rel(list(CSE.values()), list(DENSE.values())).confidence_interval(0.95)
    assert (found.value, found.lower, found.upper) == pytest.approx((-5.5 / 3, interval.low, interval.high))


def test_one_seed_has_no_interval():
    assert ratio({3: 18.0}, DENSE | {3: 20.0}) == Estimate(pytest.approx(0.9), None, None, 1)
    assert difference({3: 0.75}, {3: 0.5}) == Estimate(0.25, None, None, 1)
    assert share_of_gain({3: 18.0}, {3: 16.2}, {3: 20.0}).lower is None


def test_a_run_that_diverged_is_no_interval_either():
    assert ratio({0: math.inf, 1: 2.0}, {0: 1.0, 1: 2.0}) == Estimate(math.inf, None, None, 2)


def test_equal_seeds_have_an_interval_of_no_width():
    assert difference({0: 1.0, 1: 2.0}, {0: 0.5, 1: 1.5}) == Estimate(0.5, 0.5, 0.5, 2)


def test_the_share_of_the_gain_is_in_logarithms():
    own, best = logs(CSE, DENSE), logs(ORACLE, DENSE)
    found = share_of_gain(CSE, ORACLE, DENSE)
    assert found.value == pytest.approx(own.mean() / best.mean()) and found.seeds == 3
    whole = share_of_gain(ORACLE, ORACLE, DENSE)
    assert (whole.value, whole.lower, whole.upper) == pytest.approx((1, 1, 1))
    assert share_of_gain(DENSE, ORACLE, DENSE).value == 0


def test_fiellers_ends_are_the_shares_that_a_paired_test_just_excludes():
    own, best = logs(CSE, DENSE), logs(ORACLE, DENSE)
    found = share_of_gain(CSE, ORACLE, DENSE)
    assert found.lower < found.value < found.upper
    for end in (found.lower, found.upper):
        assert stats.ttest_1samp(own - end * best, 0).pvalue == pytest.approx(0.05, abs=1e-6)


def test_the_interval_of_a_share_holds_the_true_one_as_often_as_it_says():
    generator, held = np.random.default_rng(0), 0
    for _ in range(2000):
        noise = generator.normal(0, 0.02, (2, 5))
        best = -0.2 + noise[0]
        own = -0.14 + 0.6 * noise[0] + 0.5 * noise[1]
        found = share_of_gain(*(dict(enumerate(np.exp(part))) for part in (own, best, np.zeros(5))))
        held += found.lower <= 0.7 <= found.upper
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_without_a_gain_there_is_no_share_and_without_a_sure_one_no_interval():
    assert share_of_gain(CSE, DENSE, DENSE) is None
    assert share_of_gain(CSE, {0: 21.0, 1: 31.0, 2: 26.0}, DENSE) is None
    unsure = share_of_gain(CSE, {0: 10.0, 1: 31.0, 2: 26.0}, DENSE)
    assert unsure.value > 0 and unsure.lower is None and unsure.upper is None


def test_impossible_comparisons_are_refused():
    for compare in (ratio, difference):
        with pytest.raises(ValueError, match="is not allowed"):
            compare({0: 1.0}, {1: 1.0})
    with pytest.raises(ValueError, match="numerators"):
        ratio({0: 0.0}, {0: 1.0})
    with pytest.raises(ValueError, match="values"):
        mean_interval([])
    with pytest.raises(ValueError, match="confidence"):
        mean_interval([1.0, 2.0], confidence=1.0)
    with pytest.raises(ValueError, match="is not allowed"):
        share_of_gain(CSE, {5: 1.0}, DENSE)
