# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the peak finder: it stops at a peak, soon after it, and nowhere else."""

import math

import pytest
import torch

from modeling_cse.training.peaks import PeakFinder


def first_passed(values, **options) -> tuple[int | None, PeakFinder]:
    """The number of values after which the peak is first said to have passed."""
    finder = PeakFinder(**options)
    for number, value in enumerate(values, start=1):
        finder.add(10 * number, value)
        if finder.passed:
            return number, finder
    return None, finder


def hill(count: int = 20, top: int = 8) -> list[float]:
    return [0.9 - 0.06 * abs(number - top) for number in range(1, count + 1)]


def test_rise_and_fall():
    """The peak is the eighth of twenty values. A median over three cuts a sharp top off, so that the seventh to the
    ninth are level; then come three lower ones, and the value that the last median needs."""
    when, finder = first_passed(hill(), patience=3, margin=0.02)
    assert when == 9 + 3 + 1
    assert finder.peak == (70, pytest.approx(0.84))


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_move_the_peak_far(seed):
    generator = torch.Generator().manual_seed(seed)
    noisy = [value + 0.02 * float(torch.randn((), generator=generator)) for value in hill()]
    when, finder = first_passed(noisy, margin=0.1)
    assert when is not None and 10 <= when <= 14 and 60 <= finder.peak[0] <= 100


def test_a_single_outlier_is_no_peak():
    values = [0.1 * number for number in range(1, 10)]
    values[3] = 5.0
    assert first_passed(values)[0] is None


def test_a_rise_never_passes():
    assert first_passed([math.tanh(0.1 * number) for number in range(100)])[0] is None


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_level_curve_never_passes(margin):
    assert first_passed([0.5] * 100, margin=margin)[0] is None


@pytest.mark.parametrize("seed", range(5))
def test_noise_below_the_margin_never_passes(seed):
    noise = torch.rand(100, generator=torch.Generator().manual_seed(seed))
    assert first_passed((0.8 + 0.05 * noise).tolist(), margin=0.1)[0] is None


def test_a_fall_from_the_start_has_its_peak_at_the_start():
    when, finder = first_passed([0.9 - 0.1 * number for number in range(9)])
    assert when == 6 and finder.peak == (20, pytest.approx(0.8))


def test_the_margin_is_a_share_of_the_magnitude_also_below_zero():
    fall = [-0.5, -0.5, -0.5, -0.505, -0.505, -0.505, -0.505, -0.505]
    assert first_passed(fall, margin=0.02)[0] is None
    assert first_passed(fall, margin=0.005)[0] is not None


def test_more_patience_takes_longer():
    assert [first_passed(hill(), patience=patience, margin=0.02)[0] for patience in (1, 2, 5)] == [11, 12, 15]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_left_out_and_named(value, caplog):
    with caplog.at_level("WARNING"):
        _, finder = first_passed([0.1, value, 0.2])
    assert finder.values == [0.1, 0.2] and finder.steps == [10, 30]
    assert "step 20" in caplog.text


def test_nothing_is_said_of_fewer_than_three_values():
    finder = PeakFinder()
    assert finder.peak is None and not finder.passed
    finder.add(1, 0.5)
    finder.add(2, 0.1)
    assert finder.peak is None and not finder.passed


def test_state_goes_round_exactly():
    _, finder = first_passed(hill()[:10])
    other = PeakFinder()
    other.load(finder.state())
    assert other.steps == finder.steps and other.values == finder.values
    for number, value in enumerate(hill()[10:], start=11):
        finder.add(10 * number, value)
        other.add(10 * number, value)
        assert (other.passed, other.peak) == (finder.passed, finder.peak)


@pytest.mark.parametrize("step", [20, 19])
def test_steps_must_go_on(step):
    finder = PeakFinder()
    finder.add(20, 0.5)
    with pytest.raises(ValueError, match=f"step={step} is not allowed"):
        finder.add(step, 0.5)


@pytest.mark.parametrize(
    ("name", "value"), [("patience", 0), ("patience", 1.5), ("patience", True), ("margin", -0.1), ("margin", math.nan)]
)
def test_wrong_argument_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} is not allowed: "):
        PeakFinder(**{name: value})
