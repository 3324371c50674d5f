# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""When one run fits its clusters: the schedule in steps, and what an automatic warm-up or a resume makes of it."""

import math

from .schedule import FitSchedule
from .warmup import AutomaticWarmup


class FitPlan:
    """
    The fits of one run.

    Args:
        schedule: resolved for the model.
        max_steps: of training.
        step_sequences: sequences of an optimizer step, over all processes.
        sample_size: sequences of a sample, over all processes.
        begun_at: the step at which sequences began to be kept: 0, or that of a checkpoint which has none.

    Fields:
        first: the step of the first fit, if the schedule says it.
        automatic: a warm-up that finds that step while training; None where the schedule says it.
        made_up: the step at which a resumed run makes up for a first fit that its checkpoint lacks.
    """

    def __init__(self, schedule: FitSchedule, max_steps: int, step_sequences: int, sample_size: int, begun_at: int):
        self.schedule = schedule
        self.max_steps = max_steps
        self.step_sequences = step_sequences
        self.sample_size = sample_size
        self.begun_at = begun_at
        self.first = schedule.first_fit(max_steps)
        self.automatic: AutomaticWarmup | None = None
        self.made_up: int | None = None

    @property
    def first_fit(self) -> int | None:
        """The step of the first fit; None while an automatic warm-up goes on."""
        return self.first if self.automatic is None else self.automatic.first_fit

    def next_fit(self, step: int) -> int | None:
        """The first step after `step` at whose end clusters are fitted; None if there is none, or it is not known."""
        if self.made_up is not None and step < self.made_up:
            return self.made_up
        return None if self.first_fit is None else self.schedule.next_fit(self.first_fit, step, self.max_steps)

    def steps_for(self, sequences: int) -> int:
        """Optimizer steps that read so many sequences."""
        return math.ceil(sequences / self.step_sequences)

    def missing_at_first_fit(self) -> int:
        """Sequences that training will not have read by then of those that make a sample."""
        due = self.first_fit if self.made_up is None else self.made_up
        return 0 if due is None else self.sample_size - (due - self.begun_at) * self.step_sequences

    def make_up_for_first_fit(self, step: int, ahead: bool) -> str | None:
        """
        Plans for a run that is resumed from a checkpoint without clusters, behind the first fit, or so shortly before
        it that less text than it would have had is to be read till then: clusters are found as soon as there is a
        sample, and from then on when they would have been.

        Args:
            step: of the checkpoint.
            ahead: whether the sample is filled up with text that is read ahead.

        Returns:
            What is to be said of it; None where nothing is to be made up for.
        """
        first, sampled = self.first, self.steps_for(self.sample_size)
        if step == 0 or first is None:
            return None
        behind = step >= first
        short = self.begun_at == step and not ahead and first - step < min(sampled, first)
        if not behind and not short:
            return None
        self.made_up = min(step + (sampled if behind else min(sampled, first)), self.max_steps - 1)
        return (
            f"the checkpoint of step {step} has no clusters{'' if behind else ' and no sample of text'}, and the "
            f"first fit {'was' if behind else 'is'} due at step {first}: it is made up for at step {self.made_up}."
        )


__all__ = ["FitPlan"]
