# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The Trainer of the benchmark, and the clock beside it."""

import json
import time
from pathlib import Path

from transformers import Trainer, TrainerCallback


class ExpertRatesTrainer(Trainer):
    """A Trainer whose experts may have a learning rate of their own."""

    expert_rate: float = 1.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.expert_rate != 1.0 and not getattr(self, "_split", False):
            self._split = True
            ids = {id(p) for name, p in self.model.named_parameters() if ".experts." in name}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in ids]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in ids]
                    optimizer.add_param_group({**group, "params": mine, "lr": group["lr"] * self.expert_rate})
        return optimizer

    def _run_epoch(self, *args, **kwargs):
        # Trainer takes one step too many when it goes on from a checkpoint of the last step, amid an epoch.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken; not if a callback has stopped the training."""
        return self.state.global_step >= self.state.max_steps


class Stopwatch(TrainerCallback):
    """
    Seconds of a training from the making of this callback on, with those that were spent before an interruption on
    what the run goes on from.

    Args:
        path: file of the seconds at every checkpoint.
    """

    def __init__(self, path: Path):
        self.path, self.start, self.before = path, time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Up to now."""
        return self.before + time.perf_counter() - self.start

    def on_train_begin(self, args, state, control, **kwargs):
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []
        self.before = {note["step"]: note["seconds"] for note in map(json.loads, lines)}.get(state.global_step, 0.0)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "seconds": self.seconds}) + "\n")
