# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Kills tiny runs with SIGKILL at random places, once or several times, lets them go on from their last complete
checkpoint, and compares the end with that of the run that nobody disturbed.

    python -m benchmarks.kills --count 50 --seed 0

Writes `benchmarks/results/kills.json`. Exits with 1 if a continuation differed in a bit, or a checkpoint that was
done was lost. Wants `os.fork`: everything is imported once, and each run is a fork.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.survival_record import RESULTS, write_record
from modeling_cse import last_complete_checkpoint

from .places import KINDS, Kill
from .program import STEPS, VARIANTS, differences, differences_of_checkpoints, run


# Of ten points, so many are of each kind.
SHARES = {"step": 3, "fit": 2, "save": 2, "rotation": 1, "torn": 1, "time": 1}
PATIENCE = 300.0


def launch(variant: str, folder: Path, kill: Kill | None) -> bool:
    """
    One run in a forked process.

    Returns:
        Whether it was killed; else it came to its end.

    Raises:
        RuntimeError: it failed by itself, or hangs.
    """
    folder.mkdir(exist_ok=True)
    listen, tell = os.pipe()
    child = os.fork()
    if child == 0:
        _child(variant, folder, kill, listen, tell)
    os.close(tell)
    deadline = time.monotonic() + PATIENCE
    if select.select([listen], [], [], PATIENCE)[0] and os.read(listen, 1):
        time.sleep(kill.delay)
        os.kill(child, signal.SIGKILL)
    os.close(listen)
    status = None
    while status is None and time.monotonic() < deadline:
        ended, code = os.waitpid(child, os.WNOHANG)
        status = code if ended else None
        time.sleep(0.002)
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise RuntimeError(f"{variant} hangs: {(folder / 'log.txt').read_text()[-2000:]}")
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"{variant} failed: {(folder / 'log.txt').read_text()[-3000:]}")
    return False


def _child(variant: str, folder: Path, kill: Kill | None, listen: int, tell: int) -> None:
    os.close(listen)
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        begin = time.monotonic()
        passed = run(variant, folder, kill, tell)
        (folder / "passed.json").write_text(json.dumps({**passed, "seconds": time.monotonic() - begin}))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def draw(kind: str, passed: dict[str, float], generator: random.Random) -> Kill:
    """A place of a kind, any of those that the undisturbed run passed by."""
    if kind == "time":
        return Kill(kind, delay=generator.uniform(0.0, passed["seconds"]))
    delay = generator.uniform(0.0, 0.005) if kind == "torn" else 0.0
    return Kill(kind, generator.randint(1, passed[kind]), delay)


def last_done(folder: Path) -> int:
    """The last step whose checkpoint a run had finished when it was killed, 0 for none."""
    path = folder / "done.txt"
    return int(path.read_text().split()[-1]) if path.is_file() and path.read_text().strip() else 0


def disturb(
    number: int, kind: str, variant: str, whole: Path, folder: Path, generator: random.Random
) -> dict[str, Any]:
    """One kill point: a run, killed up to three times, and its end."""
    passed = json.loads((whole / "passed.json").read_text())
    if not passed.get(kind, 1):
        raise ValueError(f"{variant} has no place of kind {kind!r}")
    kills, resumed, lost = [], [], []
    wanted = generator.choices([1, 2, 3], weights=[6, 3, 1])[0]
    while len(kills) < wanted and (not resumed or resumed[-1] < STEPS):
        # a run that goes on passes fewer places: a later kill may find none, and the run comes to its end
        kill = draw(kind if not kills else generator.choice(KINDS), passed, generator)
        if not launch(variant, folder, kill):
            if kills:
                break
            passed["seconds"] /= 2  # it was faster than the undisturbed run was
            shutil.rmtree(folder)
            continue
        kills.append(asdict(kill))
        checkpoint = last_complete_checkpoint(folder)
        step = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
        resumed.append(step)
        if step < last_done(folder):
            lost.append([last_done(folder), step])
    if resumed and resumed[-1] == STEPS:
        # nothing is left to do, but the Trainer (5.23) looks for the end only after a step, and would make one more
        found = differences_of_checkpoints(folder, whole)
    else:
        if not (folder / "end.json").is_file():
            launch(variant, folder, None)
        found = differences(folder, whole)
    return {"point": number, "kind": kind, "variant": variant, "kills": kills, "resumed_from": resumed} | {
        "lost": lost,
        "differences": found[:10],
        "bit_exact": bool(kills) and not found,
    }


def choose(count: int, generator: random.Random) -> list[tuple[str, str]]:
    """Kind and variant of every point: kinds by their shares, variants in turn."""
    deck = [kind for kind, share in SHARES.items() for _ in range(share)]
    kinds = [deck[number % len(deck)] for number in range(count)]
    generator.shuffle(kinds)
    order = list(VARIANTS)
    generator.shuffle(order)
    return [(kind, order[number % len(order)]) for number, kind in enumerate(kinds)]


def kill_runs(count: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """All kill points, each with what came of it."""
    torch.set_num_threads(1)  # before any fork: a pool of threads does not survive one
    generator = random.Random(seed)
    points = []
    for number, (kind, variant) in enumerate(choose(count, generator)):
        whole = folder / f"whole-{variant}"
        if not (whole / "passed.json").is_file():
            launch(variant, whole, None)
        place = folder / f"point-{number}"
        points.append(disturb(number, kind, variant, whole, place, generator))
        if points[-1]["bit_exact"]:
            shutil.rmtree(place)
        print(json.dumps(points[-1]), flush=True)
    return points


def summary(points: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    return {
        "seed": seed,
        "points": len(points),
        "bit_exact": sum(point["bit_exact"] for point in points),
        "kills": sum(len(point["kills"]) for point in points),
        "checkpoints_lost": sum(len(point["lost"]) for point in points),
        "points_by_kind": dict(Counter(point["kind"] for point in points)),
        "kills_by_kind": dict(Counter(kill["kind"] for point in points for kill in point["kills"])),
        "points_by_variant": dict(Counter(point["variant"] for point in points)),
        "each": points,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kill points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "kills.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        points = kill_runs(options.count, options.seed, Path(folder).resolve())
    results = summary(points, options.seed)
    write_record(options.output, "benchmarks.kills", results)
    print(f"{results['bit_exact']} of {len(points)} bit-exact, {results['kills']} kills")
    sys.exit(0 if results["bit_exact"] == len(points) and not results["checkpoints_lost"] else 1)


if __name__ == "__main__":
    main()
