# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""`warmup="auto"`: the dense warm-up ends where the gradient consistency of the long tail peaks."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from transformers.utils import logging

from .collecting import FeatureCollector
from .consistency import GradientConsistency
from .peaks import PeakFinder


logger = logging.get_logger(__name__)

# The peak is looked for in this share of training; without one the warm-up ends there.
LONGEST = 0.3
# Measurements while a window fills: they overlap, so that the curve is smooth and a peak is seen early.
PER_WINDOW = 4


class AutomaticWarmup:
    """
    Measures gradient consistency while a model trains densely, and says when the first fit is due.

    Args:
        model: a CSE model or head without clusters.
        max_steps: of training.
        step_sequences: sequences of one optimizer step, over all processes.
        collecting_steps: steps that routing features are collected for before the fit.
        ignored_tokens: see `GradientConsistency`.
    """

    def __init__(
        self,
        model: nn.Module,
        max_steps: int,
        step_sequences: int,
        collecting_steps: int,
        ignored_tokens: Iterable[int] = (),
    ):
        self.consistency = GradientConsistency(model, ignored_tokens=ignored_tokens)
        self.peaks = PeakFinder()
        self.interval = max(1, math.ceil(self.consistency.window / step_sequences / PER_WINDOW))
        self.collecting_steps = collecting_steps
        self.last = max_steps - 1
        self.latest = min(math.ceil(LONGEST * max_steps), self.last)
        self.has_room = 1 + collecting_steps < self.latest
        self.first_fit: int | None = None

    def attach(self) -> None:
        """Starts measuring, if the end is not known yet."""
        if self.first_fit is None:
            self.consistency.attach()

    def warn_of_room(self, sample_size: int) -> None:
        """Says at the start of training if collecting a sample leaves no step to look for a peak in."""
        if self.first_fit is None and not self.has_room:
            logger.warning(
                f"sample_size={sample_size} takes {self.collecting_steps} steps to read, and warmup='auto' has "
                f"{self.latest}, {LONGEST:.0%} of training: it ends there without looking for a peak. Choose a "
                "smaller sample_size, or a warmup in steps."
            )

    def detach(self) -> None:
        self.consistency.detach()

    def begin(self, step: int) -> None:
        """Before an optimizer step."""
        self.consistency.step = step

    def end(self, step: int) -> dict[str, float]:
        """After an optimizer step, on every process: measures when it is time, and sets `first_fit` once it is clear.

        Returns:
            What was measured, by the names under which it is logged.
        """
        if self.first_fit is not None:
            return {}
        measured = self.consistency.measure() if step % self.interval == 0 else None
        if measured is not None:
            self.peaks.add(step, measured["gradient_consistency"])
        peak = self.peaks.peak
        if peak is not None and self.peaks.passed:
            self.first_fit = min(step + self.collecting_steps, self.latest)
            logger.info(f"gradient consistency peaked at step {peak[0]}: first fit at {self.first_fit}.")
        elif step + self.collecting_steps >= self.latest:
            # behind it where a run was resumed that did not measure: as soon as there is a sample
            behind = max(step + 1, min(step + self.collecting_steps, self.last))
            self.first_fit = self.latest if step < self.latest else behind
            if self.has_room:
                logger.warning(
                    f"gradient consistency has no clear peak in the first {LONGEST:.0%} of training: warmup='auto' "
                    f"ends at step {self.first_fit}."
                )
        if self.first_fit is not None:
            self.detach()
        return {f"cse/{name}": value for name, value in (measured or {}).items()}

    def state(self) -> dict[str, torch.Tensor]:
        """What a resumed run must know, for a checkpoint."""
        known = {"first_fit": torch.tensor(-1 if self.first_fit is None else self.first_fit)}
        known |= {f"peaks_{name}": tensor for name, tensor in self.peaks.state().items()}
        if self.first_fit is None:
            known |= {f"consistency_{name}": tensor for name, tensor in self.consistency.state().items()}
        return known

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Takes up what `state` gave."""
        first_fit = int(state["first_fit"])
        self.first_fit = None if first_fit < 0 else first_fit
        self.peaks.load(_under("peaks_", state))
        if self.first_fit is None:
            self.consistency.load(_under("consistency_", state))


def detach_what_is_left(base: nn.Module) -> None:
    """Takes the hooks off a base model that a training has left there which an exception ended (an interrupt in a
    notebook): they would go on measuring."""
    for hook in list(base._forward_pre_hooks.values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, FeatureCollector | GradientConsistency):
            owner.detach()


def _under(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


__all__ = ["AutomaticWarmup", "detach_what_is_left"]
