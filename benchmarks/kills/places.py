# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Where a run can be killed: it counts the places of each kind that it passes, and dies at the one it was told."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import torch
from transformers import TrainerCallback

from modeling_cse.clustering import fitting as clustering_fitting
from modeling_cse.training import callback, fitting, memory


# step: an event of the Trainer. fit: before or after a part of a re-clustering. save: before or after something is
# written, renamed or made in a checkpoint folder. rotation: before a file of an old checkpoint is deleted. torn: from
# outside, up to a few milliseconds after a save has begun a file. time: from outside, at any moment.
KINDS = ("step", "fit", "save", "rotation", "torn", "time")
EVENTS = ("step_begin", "substep_end", "pre_optimizer_step", "optimizer_step", "step_end", "epoch_end", "log")
PARTS_OF_A_FIT = (
    (callback, "gather_features"),
    (callback, "fit_layers"),
    (fitting, "fit_joint"),
    (fitting, "fit_layer"),
    (fitting, "write_fit"),
    (clustering_fitting, "find_clusters"),
    (callback, "start_moments"),
)
WRITING = os.O_WRONLY | os.O_RDWR


@dataclass
class Kill:
    """At the `number`-th place of a `kind` (from 1); `delay` in seconds is waited from outside for torn and time."""

    kind: str
    number: int = 0
    delay: float = 0.0


class Places:
    """
    Counts places in this process, and ends it at one of them.

    Args:
        folder: of the run.
        kill: where to end; None to count alone.
        tell: a file descriptor; a byte is written there where somebody outside is to kill this process.
    """

    def __init__(self, folder: Path, kill: Kill | None, tell: int):
        self.folder, self.kill, self.tell = str(folder), kill, tell
        self.passed: Counter[str] = Counter()

    def pass_by(self, kind: str) -> None:
        self.passed[kind] += 1
        if self.kill is None or self.kill.kind != kind or self.passed[kind] != self.kill.number:
            return
        if kind == "torn":
            os.write(self.tell, b"!")
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Puts counters around the parts of a fit, around whatever writes, and into the audit trail of the
        interpreter; for the rest of this process."""
        for module, name in PARTS_OF_A_FIT:
            setattr(module, name, self._around(getattr(module, name), "fit"))
        torch.save = self._around(torch.save, "save", "torn")
        memory.save_file = self._around(memory.save_file, "save", "torn")
        sys.addaudithook(self._audit)
        if self.kill is not None and self.kill.kind == "time":
            os.write(self.tell, b"!")

    def _around(self, function: Callable, *kinds: str) -> Callable:
        @wraps(function)
        def counted(*args, **kwargs):
            for kind in kinds:
                self.pass_by(kind)
            result = function(*args, **kwargs)
            self.pass_by(kinds[0])
            return result

        return counted

    def _audit(self, event: str, args: tuple) -> None:
        if event in ("os.remove", "os.rmdir"):
            self.pass_by("rotation")
        elif event in ("open", "os.rename", "os.mkdir") and f"{self.folder}/checkpoint-" in str(args[0]):
            if event != "open" or (isinstance(args[2], int) and args[2] & WRITING):
                self.pass_by("save")
                self.pass_by("torn")


class PlacesOfTheTrainer(TrainerCallback):
    """Passes by at the Trainer's events. One stands before the callback under test, one after it, which also notes
    the steps whose checkpoint is done, outside of this process."""

    def __init__(self, places: Places, done: Path | None = None):
        self.places, self.done = places, done
        for event in EVENTS:
            setattr(self, f"on_{event}", self._passing("step"))
        self.on_save = self._passing("save") if done is None else self._saved

    def _passing(self, kind: str) -> Callable:
        return lambda args, state, control, **kwargs: self.places.pass_by(kind)

    def _saved(self, args, state, control, **kwargs):
        with self.done.open("a") as file:
            file.write(f"{state.global_step}\n")
        self.places.pass_by("save")
