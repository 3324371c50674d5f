# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Keeps finished runs with the project: a record of some kilobytes each, from which report.py makes its tables.

    python examples/longtail_benchmark/keep.py --size cpu --corpus runs/longtail/corpus/main

A record has all numbers of a run, its settings, command, day, machine and versions, so that a table grows over days
and machines. The folder of the run may go then, if no arm whose folder stays goes on from it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

from arms import Arm, for_size, read_arms
from corpus import GENERAL, Corpus
from run_folders import Run, read_runs
from run_records import BINS, TestBlocks, record_of

from modeling_cse.evaluation.frequency import quantile_bins


HERE = Path(__file__).parent
OF_THE_CORPUS = "corpus.json"
# How tasks were measured in records that do not say it, those until 2026-11-29.
WITH_COPIES = {"without_copies": False}


def starts(runs: list[Run]) -> list[tuple[Run, Run | None]]:
    """Each run with the one that it went on from: the arm of its `start`, of the same seed.

    Raises:
        ValueError: that run is not there.
    """
    by_name = {(run.arm.name, run.seed): run for run in runs}
    pairs = []
    for run in runs:
        start = by_name.get((run.arm.start, run.seed))
        if run.arm.start is not None and start is None:
            raise ValueError(f"start={run.arm.start!r} is not allowed: it has no finished run of seed {run.seed}.")
        pairs.append((run, start))
    return pairs


def bins_of(blocks: TestBlocks) -> list[dict]:
    """What the bins of sentence frequency hold: scores, blocks, and the share of each domain in them."""
    places, ends = quantile_bins(blocks.scores[1], BINS)
    rows = []
    for place, (lowest, highest) in enumerate(ends):
        inside = blocks.domains[places == place]
        shares = {domain: float((inside == domain).mean()) for domain in (*blocks.rare, GENERAL)}
        rows.append({"bin": place + 1, "lowest": lowest, "highest": highest, "blocks": len(inside), "domains": shares})
    return rows


def as_json(value: Any) -> Any:
    """Plain values. Numbers that are not finite become text, which JSON has no other way for."""
    if is_dataclass(value):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Writes plain values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def keep(runs: Path, corpus_folder: Path, results: Path, arms: dict[str, Arm] | None = None) -> list[Path]:
    """
    Writes `<size>/<corpus>/<arm>-<seed>.json` for each finished run, and `corpus.json` beside them.

    Args:
        runs: `<size>` folder with `<corpus>/<arm>-<seed>` folders below it.
        corpus_folder: of the corpus, whose name is that of the folder of runs.
        results: folder to write to.
        arms: those that a record's command knows by name.

    Returns:
        The records' files.

    Raises:
        ValueError: runs that do not belong to the corpus, or whose arm is kept, or stands in `arms`, with other
            settings.
    """
    corpus = Corpus.load(corpus_folder)
    finished = read_runs(runs / corpus_folder.name)
    if any(run.settings["mixture"] != asdict(corpus.mixture) for run in finished):
        raise ValueError(f"corpus={corpus_folder.name!r} is not allowed: its mixture is not that of the runs.")
    for run in finished if arms is not None else []:
        name, size = run.arm.name.removesuffix("_last"), run.settings["size"]
        known = for_size(arms[name], size["family"], size["config"]) if name in arms else None
        if known != replace(run.arm, name=name):
            raise ValueError(
                f"arm={name!r} is not allowed: seed {run.seed} ran with other settings than the arm has by now, so "
                "that the record's command would train another."
            )
    blocks, folder = TestBlocks.of(corpus), results / runs.name / corpus_folder.name
    records = {}
    for run, start in starts(finished):
        path = folder / f"{run.arm.name}-{run.seed}.json"
        records[path] = {**record_of(run, start, blocks), **run.result["origin"]}
    check_alike([*(record for path, record in _kept(folder).items() if path not in records), *records.values()])
    write_json(folder / OF_THE_CORPUS, {"frequency_bins": bins_of(blocks)})
    for path, record in records.items():
        write_json(path, record)
    return list(records)


def _kept(folder: Path) -> dict[Path, dict[str, Any]]:
    paths = (path for path in folder.glob("*.json") if path.name != OF_THE_CORPUS)
    return {path: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def read_records(folder: Path) -> list[dict[str, Any]]:
    """
    The records of a size and corpus, sorted by arm and seed.

    Raises:
        ValueError: as `check_alike`.
    """
    records = sorted(_kept(folder).values(), key=lambda record: (record["arm"], record["seed"]))
    check_alike(records)
    return records


def check_alike(records: list[dict[str, Any]]) -> None:
    """
    Raises:
        ValueError: records that cannot be compared: seeds of one arm with other settings, or another size, corpus or
            number of steps, or tasks that were measured in another way. Records that do not say how (those until
            2026-11-29) were measured with copies.
    """
    by_arm: dict[str, tuple] = {}
    for record in records:
        arm, seed, own = record["arm"], record["seed"], (record["settings"]["arm"], record["settings"]["steps"])
        if by_arm.setdefault(arm, own) != own:
            raise ValueError(f"arm={arm!r} is not allowed: seed {seed} has other settings than seeds before.")
    for name in ("size", "mixture", "steps"):
        # a stage of its own may go on for another number of steps
        alike = [record["settings"][name] for record in records if name != "steps" or record["start"] is None]
        others = [value for value in alike if value != alike[0]]
        if others:
            raise ValueError(f"{name}={others[0]!r} is not allowed beside {alike[0]!r}: a table has one for all runs.")
    by_method: dict[str, dict[str, Any]] = {}
    for record in records:
        for method in record["tasks"]:
            said = record.get("task_settings", {}).get(method) or WITH_COPIES
            own = {name: value for name, value in said.items() if name != "model"}  # each run has its own
            known = by_method.setdefault(method, {})
            if any(known.get(name, value) != value for name, value in own.items()):
                raise ValueError(
                    f"task_settings[{method!r}]={own!r} is not allowed in {record['arm']}-{record['seed']} beside "
                    f"{known!r}: it must be one for all runs of a table."
                )
            known.update(own)


def main(arguments: Sequence[str] | None = None) -> None:
    """Keeps runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--runs", type=Path, default=Path("runs/longtail"), help="folder with <size>/<corpus>/...")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml")
    given = parser.parse_args(arguments)
    for path in keep(given.runs / given.size, given.corpus, given.results, read_arms(given.arms)):
        print(path.relative_to(given.results))


if __name__ == "__main__":
    main()
