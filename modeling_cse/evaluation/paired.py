# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Comparisons paired by seed: two runs of one seed share their start and their batches, so that what the seed does to
both drops out. Intervals are Student's t over seeds; one seed has none."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """
    Fields:
        value: the estimate; infinite or NaN where a run diverged.
        lower, upper: its interval; None where there is none: one seed, or a value that is not finite.
        seeds: how many it rests on.
    """

    value: float
    lower: float | None
    upper: float | None
    seeds: int


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> Estimate:
    """
    Mean with Student's t interval.

    Args:
        values: one number a seed.
        confidence: between 0 and 1.

    Raises:
        ValueError: there is no value, or a confidence that is none.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values of shape {values.shape} is not allowed: it must be (seeds,) with at least one seed.")
    half = _t(len(values), confidence) * stats.sem(values) if len(values) > 1 and np.isfinite(values).all() else None
    mean = float(values.mean())
    return Estimate(mean, None if half is None else mean - half, None if half is None else mean + half, len(values))


def _t(count: int, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence!r} is not allowed: it must be between 0 and 1.")
    return float(stats.t.ppf((1 + confidence) / 2, count - 1))


def _pair(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        raise ValueError(
            f"seeds {sorted(first)} and {sorted(second)} is not allowed: a paired comparison needs one that both have."
        )
    one, other = (np.asarray([side[seed] for seed in seeds], dtype=np.float64) for side in (first, second))
    return one, other


def _log_ratios(numerators: Mapping[int, float], denominators: Mapping[int, float]) -> np.ndarray:
    above, below = _pair(numerators, denominators)
    for name, values in (("numerators", above), ("denominators", below)):
        if (values <= 0).any():
            raise ValueError(f"{name}={values.tolist()} is not allowed: a ratio needs numbers above 0.")
    return np.log(above) - np.log(below)


def ratio(
    numerators: Mapping[int, float], denominators: Mapping[int, float], confidence: float = CONFIDENCE
) -> Estimate:
    """
    Geometric mean of the ratios, for perplexities: exp of the mean of their logarithms, the interval likewise.

    Args:
        numerators, denominators: seed to number above 0; seeds that only one of them has are left out.
        confidence: of the interval.

    Raises:
        ValueError: no common seed, or a number that is not above 0.
    """
    logs = mean_interval(_log_ratios(numerators, denominators), confidence)
    lower, upper = (None if end is None else math.exp(end) for end in (logs.lower, logs.upper))
    return Estimate(float(np.exp(logs.value)), lower, upper, logs.seeds)


def difference(first: Mapping[int, float], second: Mapping[int, float], confidence: float = CONFIDENCE) -> Estimate:
    """Mean of `first` minus `second`, for accuracies; arguments as those of `ratio`."""
    above, below = _pair(first, second)
    return mean_interval(above - below, confidence)


def share_of_gain(
    method: Mapping[int, float],
    ceiling: Mapping[int, float],
    baseline: Mapping[int, float],
    confidence: float = CONFIDENCE,
) -> Estimate | None:
    """
    How much of the ceiling's gain over the baseline the method reaches, in logarithms: mean log(method / baseline)
    over mean log(ceiling / baseline), 1 where it is as good.

    The interval is Fieller's for the ratio of two paired means (1954), exact where both are normal over seeds. It is
    not even about the value, and there is none where the ceiling's gain itself is not apart from 0 at this
    confidence: then no share is excluded.

    Args:
        method, ceiling, baseline: seed to perplexity; seeds that not all of them have are left out.
        confidence: of the interval.

    Returns:
        None where the ceiling gains nothing, so that there is nothing to have a share of.

    Raises:
        ValueError: no common seed, or a number that is not above 0.
    """
    common = method.keys() & ceiling.keys() & baseline.keys()
    shared = {seed: baseline[seed] for seed in common}
    own, best = _log_ratios(method, shared), _log_ratios(ceiling, shared)
    count, value = len(own), float(own.mean() / best.mean()) + 0.0 if best.mean() else math.nan
    if best.mean() >= 0:
        return None
    if count == 1 or not (np.isfinite(own).all() and np.isfinite(best).all()):
        return Estimate(value, None, None, count)
    # the shares s for which mean(own - s * best) is not apart from 0: a s^2 - 2 b s + c <= 0
    spread = _t(count, confidence) ** 2 * np.cov(own, best) / count
    a = best.mean() ** 2 - spread[1, 1]
    b = best.mean() * own.mean() - spread[0, 1]
    c = own.mean() ** 2 - spread[0, 0]
    if a <= 0:
        return Estimate(value, None, None, count)
    root = math.sqrt(max(b * b - a * c, 0.0))
    return Estimate(value, float((b - root) / a), float((b + root) / a), count)


__all__ = ["CONFIDENCE", "Estimate", "difference", "mean_interval", "ratio", "share_of_gain"]
