# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Where a curve that is measured while a model trains has its peak, said as soon as that is clear."""

import math

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


class PeakFinder:
    """
    Says when a noisy curve has passed its peak.

    Values are smoothed by a median over three in a row, which stands at the step of the middle one; so a single
    outlier never is the peak. The peak has passed when the last `patience` smoothed values all lie below the highest
    one by at least `margin`. A curve that only rises, or stays level, never passes: whoever asks needs a cap.

    Args:
        patience: smoothed values in a row, at least 1.
        margin: share of the highest value's magnitude, at least 0.
    """

    def __init__(self, patience: int = 3, margin: float = 0.1):
        if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
            raise ValueError(f"patience={patience!r} is not allowed: it must be an int >= 1.")
        if not isinstance(margin, int | float) or isinstance(margin, bool) or not margin >= 0:
            raise ValueError(f"margin={margin!r} is not allowed: it must be a number >= 0.")
        self.patience, self.margin = patience, margin
        self.steps: list[int] = []
        self.values: list[float] = []

    def add(self, step: int, value: float) -> None:
        """
        Adds the value of a step. One that is not finite is left out with a warning: a step whose gradients overflowed
        says nothing of where the peak is.

        Raises:
            ValueError: the step is not after the last one.
        """
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"step={step} is not allowed: it must be after step {self.steps[-1]}.")
        if not math.isfinite(value):
            logger.warning(f"the value {value} of step {step} is left out: it says nothing of where the peak is.")
            return
        self.steps.append(int(step))
        self.values.append(float(value))

    def smoothed(self) -> list[tuple[int, float]]:
        """(step, median of the values before, at and after it); neither the first nor the last step has one."""
        triples = zip(self.values, self.values[1:], self.values[2:], strict=False)
        return [(step, sorted(triple)[1]) for step, triple in zip(self.steps[1:], triples, strict=False)]

    @property
    def peak(self) -> tuple[int, float] | None:
        """Step and smoothed value of the highest point so far, the first of equal ones; None before three values."""
        return max(self.smoothed(), key=lambda point: point[1], default=None)

    @property
    def passed(self) -> bool:
        smoothed = self.smoothed()
        if len(smoothed) <= self.patience:
            return False
        highest = max(value for _, value in smoothed)
        limit = highest - self.margin * abs(highest)
        below = (value <= limit and value < highest for _, value in smoothed[-self.patience :])
        return all(below)

    def state(self) -> dict[str, torch.Tensor]:
        """`steps` (n,) int64 and `values` (n,) fp64, for a checkpoint."""
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "values": torch.tensor(self.values, dtype=torch.float64),
        }

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
        self.steps, self.values = state["steps"].tolist(), state["values"].tolist()


__all__ = ["PeakFinder"]
