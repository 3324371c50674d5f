# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Runs a plan on a device that is lent in legs of minutes: each leg goes on where the last one stopped.

    python examples/longtail_benchmark/lease.py plan.txt --minutes 9 --state runs/gpu --output results/gpu

A line of the plan is what one calls train.py with (without --output). Runs follow each other in one process, a corpus
is read once. When the time is nearly over, the run in work saves a checkpoint and the leg ends. `--state` holds
checkpoints, and must be there again in the next leg; `--output` gets what keep.py makes records of (results, settings,
logs, losses of test tokens), and `lease.json` (date, machine, versions, legs); models only with --models. Ends with 0
when the plan is done, with 3 when there is more to do.
"""

import argparse
import json
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path

from corpus import Corpus
from origin import origin
from records import read_result
from train import build_parser, run
from transformers import TrainerCallback
from work import read_lines


MORE_TO_DO = 3
# What keep.py reads.
KEPT = ("result.json", "run.json", "metrics.jsonl", "seconds.jsonl", "test.safetensors")


class TimeLimit(TrainerCallback):
    """
    Saves and stops a training when the time is over.

    Args:
        deadline: on the clock of `time.monotonic`, in seconds.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() >= self.deadline:
            control.should_save = control.should_training_stop = True


def lease(plan: list[str], state: Path, output: Path, seconds: float, models: bool = False) -> list[str]:
    """
    Works through a plan for so many seconds, less the time that a step, a save or a measurement takes beyond them.

    Args:
        plan: lines as for train.py.
        state: folder of runs and checkpoints.
        output: folder of what is kept.
        seconds: after them no run is begun, and the one in training stops.
        models: whether finished models are kept too.

    Returns:
        The lines that are not finished.
    """
    begun, deadline = datetime.now(UTC), time.monotonic() + seconds
    corpora: dict[Path, Corpus] = {}
    left, done = [], []
    for line in plan:
        arguments = build_parser().parse_args([*line.split(), "--output", str(state)])
        if time.monotonic() >= deadline:
            left.append(line)
            continue
        if arguments.corpus not in corpora:
            corpora[arguments.corpus] = Corpus.load(arguments.corpus)
        record = run(arguments, corpora[arguments.corpus], [TimeLimit(deadline)])
        (left if record is None else done).append(line)
        print("stopped" if record is None else "finished", line, flush=True)
    keep(state, output, models)
    note(output, {"begun": begun.isoformat(timespec="seconds"), "seconds": seconds, "finished": done, "left": left})
    return left


def keep(state: Path, output: Path, models: bool) -> None:
    """Copies what is worth keeping of the finished runs."""
    for result in sorted(state.rglob("result.json")):
        if read_result(result.parent) is None:
            continue
        target = output / result.parent.relative_to(state)
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (result.parent / name).is_file():  # the last model of a stage has a result alone
                shutil.copyfile(result.parent / name, target / name)
        if models:
            shutil.copytree(result.parent / "model", target / "model", dirs_exist_ok=True)


def note(output: Path, leg: dict) -> None:
    """Adds a leg to `lease.json`."""
    path = output / "lease.json"
    output.mkdir(parents=True, exist_ok=True)
    legs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    path.write_text(json.dumps([*legs, leg | origin()], indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Runs one leg from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", action="store_true", help="keep the models too")
    options = parser.parse_args(arguments)
    left = lease(read_lines(options.plan), options.state, options.output, 60 * options.minutes, options.models)
    return MORE_TO_DO if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
