# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Contenders in turn, round after round, so that whatever else the machine does meets all of them alike."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch.utils.benchmark import timer


# Rounds that are dropped.
WARMUP = 2


class Stopwatch:
    """
    Seconds of one call. `torch.utils.benchmark.timer` waits for the accelerator before it reads the clock; its `Timer`
    is not used because each `timeit` calls twice before it counts.

    Args:
        call: what is timed.
        least: a sample is so many seconds long, if that takes more than one call. The second sample tells how many,
            because the first one is far too slow. So at least two samples must be dropped.
    """

    def __init__(self, call: Callable[[], object], least: float = 0.05):
        self.call = call
        self.least = least
        self.calls = 1
        self.samples = 0

    def __call__(self) -> float:
        start = timer()
        for _ in range(self.calls):
            self.call()
        seconds = (timer() - start) / self.calls
        self.samples += 1
        if self.samples == WARMUP:
            self.calls = max(1, math.ceil(self.least / seconds))
        return seconds


def interleave(samplers: dict[str, Callable[[], float]], rounds: int, warmup: int = WARMUP) -> dict[str, list[float]]:
    """
    One sample of each in every round: A B C, B C A, C A B, ... so that none always follows the same one.

    Args:
        samplers: by name, what takes one sample (seconds).
        rounds: that count.
        warmup: rounds before them, that are dropped.

    Returns:
        By name, a sample a round.
    """
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warmup, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = samplers[name]()
            if number >= 0:
                samples[name].append(seconds)
    return samples


@dataclass(frozen=True)
class Ratio:
    """A ratio to the dense twin: the median, and the quartiles as its spread."""

    median: float
    low: float
    high: float

    @classmethod
    def paired(cls, samples: list[float], dense: list[float]) -> "Ratio":
        """Of the ratios round by round: what slows a whole round down cancels.

        Raises:
            ValueError: there is not one sample of each in every round.
        """
        if len(samples) != len(dense) or not samples:
            raise ValueError(f"samples={len(samples)} is not allowed: there must be as many as dense={len(dense)}.")
        low, median, high = np.quantile(np.divide(samples, dense), [0.25, 0.5, 0.75])
        return cls(float(median), float(low), float(high))
