# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A run is one folder: its settings, its metrics as JSON lines, its checkpoints, its picture."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..analysis import read_metrics
from ..data import FreshMasks
from ..training.memory import replace_whole


# What the first runs and comparisons did not write down: one without it is gone on with as it is, and notes it then.
NOTED_SINCE = {"data.content", "config"}


class JsonLinesCallback(TrainerCallback):
    """Writes every log entry as a line of JSON, and after a resumption drops the lines of steps that are run again."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("".join(self._line(entry) for entry in state.log_history), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._line(state.log_history[-1]))

    @staticmethod
    def _line(entry: dict[str, Any]) -> str:
        return json.dumps(entry, sort_keys=True) + "\n"


class EpochCallback(TrainerCallback):
    """Tells a data set which epoch begins, or is gone on with."""

    def __init__(self, data: FreshMasks):
        self.data = data

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.data.set_epoch(int(state.epoch or 0))


class SettingsCallback(TrainerCallback):
    """Makes a folder the home of a run when its training begins. Last of all callbacks: what another one refuses then
    leaves the folder free for the command put right."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_settings(self.folder, self.settings)


def check_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """
    Looks whether a run may live in a folder; writes nothing.

    Raises:
        ValueError: it holds another run, or this one without the wish to resume it.
    """
    path = folder / "run.json"
    if not path.is_file():
        return
    if not resume:
        raise ValueError(
            f"output_dir={str(folder)!r} is not allowed: it holds a run already. Name another, remove it, or go on "
            "with --resume_from_checkpoint last."
        )
    before, now = json.loads(path.read_text(encoding="utf-8")), json.loads(_settings_text(settings))
    known = (before.keys() | now.keys()) - (NOTED_SINCE - before.keys())
    changed = sorted(name for name in known if before.get(name) != now.get(name))
    if changed:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a run with other settings of {changed}, so it cannot be resumed. Name "
            "another folder or remove it."
        )


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Makes a folder the home of a run: its settings go to `run.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _settings_text(settings)
    replace_whole(folder / "run.json", lambda path: path.write_text(text, encoding="utf-8"))


def ends_with(checkpoint: str, args: TrainingArguments) -> str:
    """
    The checkpoint whose weights a run ends with that has made its last step: with `load_best_model_at_end` the best
    one, which the Trainer goes back to.

    Args:
        checkpoint: of the last step.
        args: of the run.
    """
    if not args.load_best_model_at_end:
        return checkpoint
    best = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).best_model_checkpoint
    # by name: the folder of the run may have been moved
    return checkpoint if best is None else str(Path(checkpoint).parent / Path(best).name)


def note_interruption(folder: Path, name: str) -> None:
    """Writes down that a model of a run goes on from a checkpoint: the Trainer's clock knows its own process alone."""
    path = folder / "interrupted.json"
    names = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    text = json.dumps(sorted({*names, name})) + "\n"
    replace_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def training_seconds(folder: Path, name: str) -> float | None:
    """How long a model of a finished run was trained; None where it went on from a checkpoint."""
    path = folder / "interrupted.json"
    if path.is_file() and name in json.loads(path.read_text(encoding="utf-8")):
        return None
    entries = read_metrics(folder / name / "metrics.jsonl")
    return next((entry["train_runtime"] for entry in reversed(entries) if "train_runtime" in entry), None)


def _settings_text(settings: dict[str, Any]) -> str:
    return json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n"
