# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of gains: ratios of token means, intervals that hold what they should, and say so where they cannot."""

import numpy as np
import pytest
from scipy.stats import t

from modeling_cse.analysis import Losses, measure_gain


def losses(gain: float, noise: float = 0.0, count: int = 200, seed: int = 0, spread: float = 1.0) -> Losses:
    """Sequences of unequal length and difficulty; CSE is better by so many nats a token, give or take the noise."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 100, count)
    dense = tokens * (4 + spread * generator.normal(size=count))
    return Losses(dense, dense - tokens * (gain + noise * generator.normal(size=count)), tokens, np.ones(count, bool))


def test_ratio_and_perplexities_are_of_token_means():
    dense, cse, inside = np.array([10.0, 90.0, 5.0]), np.array([10.0, 60.0, 5.0]), np.array([True, True, False])
    part = Losses(dense, cse, np.array([5, 20, 1]), inside)
    gain = measure_gain([part])
    assert (gain.dense, gain.cse) == pytest.approx((np.exp(4), np.exp(70 / 25)))
    assert gain.ratio == pytest.approx(np.exp(-30 / 25)) and gain.sequences == 2


def test_sequences_are_paired():
    """Sequences differ by far more than the models do: only a paired bootstrap sees the gain."""
    gain = measure_gain([losses(0.02, noise=0.05)])
    assert gain.low < np.exp(-0.02) < gain.high < 1 and gain.better and not gain.worse
    assert gain.high - gain.low < 0.03
    assert measure_gain([losses(-0.02, noise=0.05)]).worse


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    found = [measure_gain([losses(0.01, noise=0.05, seed=seed)]) for seed in range(40)]
    assert 34 <= sum(gain.low <= np.exp(-0.01) <= gain.high for gain in found) <= 40


def test_the_bootstrap_is_seeded():
    assert measure_gain([losses(0.0, 0.1)]) == measure_gain([losses(0.0, 0.1)])
    assert measure_gain([losses(0.0, 0.1)], 1) != measure_gain([losses(0.0, 0.1)], 2)


def test_with_seeds_the_interval_is_students_over_them():
    logs = np.array([-0.03, -0.01, -0.02])
    gain = measure_gain([losses(-value) for value in logs])
    reach = t.ppf(0.975, 2) * logs.std(ddof=1) / np.sqrt(3)
    assert (gain.ratio, gain.low, gain.high) == pytest.approx(np.exp([-0.02, -0.02 - reach, -0.02 + reach]))
    one_of_three = [losses(0.02), *(Losses(*(np.zeros(9),) * 2, np.ones(9, int), np.zeros(9, bool)) for _ in range(2))]
    assert gain.seeds == 3 and measure_gain(one_of_three).seeds == 1
    assert measure_gain(one_of_three).low is None  # one seed of three has such a group: no interval over seeds


def test_too_few_sequences_have_no_interval_and_none_no_gain():
    few = measure_gain([losses(0.5, count=7)])
    assert few.low is None and few.high is None and not few.better and not few.worse and few.ratio < 1
    empty = losses(0.1)
    assert measure_gain([Losses(empty.dense, empty.cse, empty.tokens, ~empty.inside)]) is None
