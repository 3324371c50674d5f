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
        not_before: clusters that the model had from the beginning are kept until this step.
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
        self.not_before = 0

    @property
    def first_fit(self) -> int | None:
        """The step of the first fit; None while an automatic warm-up looks for it."""
        if self.automatic is None:
            return self.first
        looks = self.automatic.first_fit is None and self.automatic.has_room
        return None if looks else self.automatic.first_fit or self.automatic.latest

    def next_fit(self, step: int) -> int | None:
        """The first step after `step` at whose end clusters are fitted; None if there is none, or it is not known."""
        if self.made_up is not None and step < self.made_up:
            return self.made_up
        if self.first_fit is None:
            return None
        fit = self.schedule.next_fit(self.first_fit, step, self.max_steps)
        while fit is not None and fit < self.not_before:
            fit = self.schedule.next_fit(self.first_fit, fit, self.max_steps)
        return fit

    def is_near(self, step: int, sequences: int) -> bool:
        """Whether the step after `step` belongs to those whose sequences a fit reads, the last so many before it; with
        more than a sample each does until an automatic warm-up has said when it ends."""
        fit = self.next_fit(step)
        if fit is None:
            return self.first_fit is None and sequences > self.sample_size
        return fit - step <= self.steps_for(sequences)

    def steps_for(self, sequences: int) -> int:
        """Optimizer steps that read so many sequences."""
        return math.ceil(sequences / self.step_sequences)

    def missing(self, has_clusters: bool) -> int:
        """Sequences of a sample that training will not have read by its next fit.

        Args:
            has_clusters: whether the model has some already, so that with `warmup=0` that fit is the second.
        """
        due = self.next_fit(self.begun_at) if has_clusters or self.made_up is not None else self.first_fit
        return 0 if due is None else self.sample_size - max(0, due - self.begun_at) * self.step_sequences

    def keep_until_sampled(self) -> str | None:
        """
        Plans for a model that has clusters from the beginning and of whose data nothing is read ahead: until training
        has read a sample they stay, because what they were found on was larger than what could be fitted.

        Returns:
            What is to be said of it; None where each fit has its sample anyway.
        """
        asked = self.next_fit(0)
        self.not_before = self.steps_for(self.sample_size)
        planned = self.next_fit(0)
        if planned == asked:
            return None
        return (
            f"training has read less than sample_size={self.sample_size} sequences by step {asked}: the clusters that "
            f"the model has are kept until {'its end' if planned is None else f'step {planned}'}."
        )

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
        if step == 0 or first is None or first == 0 and ahead:  # the last one: as before a first step
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
