# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When clusters are fitted: at the end of the dense warm-up, and again at even or growing intervals."""

import math
from dataclasses import dataclass, replace


UPDATES = ("recluster", "recluster+ema", "ema", "frozen")
WARMUP = 0.1


@dataclass
class FitSchedule:
    """
    What a user may say about the times of fits, checked when made.

    Fields:
        warmup: dense steps (int), share of training (float below 1), or "auto" (`training.consistency`). None: see
            `resolve`.
        recluster_every: from the first fit to the second, steps (int) or share of training (float below 1).
        recluster_growth: each interval is so many times the one before, at least 1.
        recluster_until: no fit after this step (int) or share of training (float); None: until the end.
        update: one of `UPDATES`.
    """

    warmup: int | float | str | None = None
    recluster_every: int | float = 0.1
    recluster_growth: float = 1.0
    recluster_until: int | float | None = None
    update: str = "recluster"

    def __post_init__(self):
        if self.update not in UPDATES:
            raise ValueError(f"update={self.update!r} is not allowed: it must be one of {list(UPDATES)}.")
        if self.warmup not in ("auto", None):
            _check_time("warmup", self.warmup, "None, 'auto', ")
        _check_time("recluster_every", self.recluster_every, least=1)
        growth = self.recluster_growth
        if isinstance(growth, bool) or not isinstance(growth, int | float) or not 1 <= growth < math.inf:
            raise ValueError(f"recluster_growth={growth!r} is not allowed: it must be a number >= 1.")
        if self.recluster_until is not None:
            _check_time("recluster_until", self.recluster_until, "None, ")
        for name, default in (("recluster_growth", 1.0), ("recluster_until", None)):
            if not self.repeats and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is not allowed with update={self.update!r}, which fits once."
                )

    @property
    def repeats(self) -> bool:
        """Whether clusters are fitted more than once."""
        return self.update.startswith("recluster")

    @property
    def moves(self) -> bool:
        """Whether centroids follow their members between fits."""
        return self.update.endswith("ema")

    def resolve(self, at_once: bool) -> "FitSchedule":
        """With a warm-up where none was named: no steps if training begins with clusters, otherwise a tenth."""
        return self if self.warmup is not None else replace(self, warmup=0 if at_once else WARMUP)

    def first_fit(self, max_steps: int) -> int | None:
        """The step at whose end the warm-up is over; None with "auto", and before `resolve`."""
        return as_step(self.warmup, max_steps) if isinstance(self.warmup, int | float) else None

    def next_fit(self, first: int, step: int, max_steps: int) -> int | None:
        """
        The first step after `step` at whose end clusters are fitted, None if there is none. Never the last step of
        training, because nothing would be left to train what changed.

        Args:
            first: the step of the first fit.
        """
        if step < first:
            return first
        last = max_steps - 1
        if self.recluster_until is not None:
            last = min(last, as_step(self.recluster_until, max_steps))
        fit, interval = first, float(as_step(self.recluster_every, max_steps))
        while fit <= step:
            fit, interval = fit + round(interval), interval * self.recluster_growth
        return fit if self.repeats and fit <= last else None


def as_step(time: int | float, max_steps: int) -> int:
    """A step as it is, a share of training as the step that completes it."""
    # 0.07 * 100 is 7.000000000000001
    return math.ceil(round(time * max_steps, 6)) if isinstance(time, float) else time


def _check_time(name: str, value: object, others: str = "", least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, int) and value < least):
        raise ValueError(
            f"{name}={value!r} is not allowed: it must be {others}steps (int >= {least}) or a share of training "
            "(float from 0 to 1)."
        )
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{name}={value!r} is not allowed: as a float it is a share of training, 0 to 1.")
