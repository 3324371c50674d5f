# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What train.py leaves behind, read again."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm
from safetensors.numpy import load_file

from modeling_cse.analysis import read_metrics


@dataclass(frozen=True)
class Run:
    """
    A finished run.

    Fields:
        folder: where it lies: `<size>/<corpus>/<arm>-<seed>`. The last model of a domain stage lies in
            `<arm>_last-<seed>` and has its settings and log beside it, in that of the best one.
        settings: its `run.json`.
        result: its `result.json`.
    """

    folder: Path
    settings: dict[str, Any]
    result: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Run":
        """Reads a folder with a `result.json`."""
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        settings = json.loads((_home(folder) / "run.json").read_text(encoding="utf-8"))
        return cls(folder, {**settings, "arm": {**settings["arm"], "name": result["arm"]}}, result)

    @property
    def arm(self) -> Arm:
        return Arm(**self.settings["arm"])

    @property
    def seed(self) -> int:
        return self.settings["seed"]

    @property
    def family(self) -> str:
        return self.settings["size"]["family"]

    @property
    def shares(self) -> dict[str, float]:
        """The share of each domain in the training text."""
        return self.settings["mixture"]["shares"]

    @property
    def training(self) -> dict[str, Any]:
        """`TrainingArguments` of the size, and over them those of the arm."""
        return {**self.settings["size"]["training"], **self.settings["arm"]["training"]}

    @property
    def command(self) -> str:
        """What trains the same again."""
        steps = f" --steps {self.settings['steps']}" if self.settings["steps"] is not None else ""
        size, corpus = self.folder.parts[-3:-1]
        name = _home(self.folder).name.removesuffix(f"-{self.seed}")
        return (
            f"python examples/longtail_benchmark/train.py --arm {name} --seed {self.seed} --size {size} "
            f"--corpus runs/longtail/corpus/{corpus}{steps}"
        )

    @cached_property
    def log(self) -> list[dict]:
        """The entries of `metrics.jsonl`."""
        return read_metrics(_home(self.folder) / "metrics.jsonl")

    @property
    def seconds(self) -> float | None:
        """Of training; None where a resumed run kept no `seconds.jsonl`: its clock knows the last part only."""
        whole = not self.result["resumed"] or (_home(self.folder) / "seconds.jsonl").is_file()
        return self.result["seconds"] if whole else None

    @property
    def task_numbers(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Of `tasks.json`, which tasks.py writes: method ("probe", "finetune") to task to its numbers; empty where
        nothing was measured."""
        return {method: found["tasks"] for method, found in self._methods.items()}

    @property
    def task_settings(self) -> dict[str, dict[str, Any]]:
        """Method to how its tasks were measured, and the digest of the model that they were measured with."""
        return {method: found["settings"] for method, found in self._methods.items()}

    @property
    def _methods(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "tasks.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def accuracies(self) -> dict[str, dict[str, float]]:
        """Method to task to test accuracy."""
        return {
            method: {task: numbers["test"]["accuracy"] for task, numbers in found.items()}
            for method, found in self.task_numbers.items()
        }

    def token_losses(self, split: str = "test") -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
        """
        Returns:
            nats of each predicted token, float64 (N, T - 1) of a causal or (N, T) of a masked model, 0 for the others;
            which were predicted; and the expert of every token (N, T) by site.

        Raises:
            ValueError: the losses of a masked model do not say which tokens were predicted.
        """
        tensors = load_file(self.folder / f"{split}.safetensors")
        nll = tensors["nll"].astype(np.float64)
        if "predicted" not in tensors and self.family != "gpt2":
            raise ValueError(
                f"folder={str(self.folder)!r} is not allowed: the losses of a masked model need a tensor `predicted`."
            )
        predicted = tensors["predicted"].astype(bool) if "predicted" in tensors else np.ones(nll.shape, bool)
        experts = {name.removeprefix("experts."): ids for name, ids in tensors.items() if name.startswith("experts.")}
        return np.where(predicted, nll, 0.0), predicted, experts


def _home(folder: Path) -> Path:
    """Where the settings and the log of a run lie."""
    name, _, seed = folder.name.rpartition("-")
    return folder if (folder / "run.json").is_file() else folder.with_name(f"{name.removesuffix('_last')}-{seed}")


def read_runs(folder: Path) -> list[Run]:
    """The finished runs of a size and corpus by arm and seed. Those without `result.json` are still at work."""
    runs = [Run.load(path.parent) for path in folder.glob("*/result.json")]
    return sorted(runs, key=lambda run: (run.arm.name, run.seed))


__all__ = ["Run", "read_runs"]
