# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From the folders of finished runs to the answer: one JSON file, one page of tables, pictures.

    python examples/longtail_benchmark/report.py --size cpu --corpus runs/longtail/corpus/main --machine "2 CPU cores"

Numbers are those of the test split; the validation split serves choosing. What no run stands behind is "not measured".
"""

import argparse
import datetime
import json
import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import report_tables as tables
from comparisons import Comparisons, Roles, at_position, flops_ratio, in_bin, perplexity, share_curve
from corpus import GENERAL, Corpus
from judgement import judge
from report_figures import draw_positions, draw_ratios, draw_shares
from run_folders import Run, read_runs
from run_records import BINS, LONG_TAIL, TestBlocks, record_of, with_long_tail

import modeling_cse
from modeling_cse.evaluation.frequency import quantile_bins


HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "numpy", "scipy", "scikit-learn")


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


def share_rows(folder: Path, corpus: str, roles: Roles) -> list[dict]:
    """The gain by share, from the runs on this corpus and on those named `share-*` beside it."""
    corpora = {}
    for place in sorted({folder / corpus, *folder.glob("share-*")}):
        runs = read_runs(place)
        if runs:
            corpora[place.name] = [
                {
                    "arm": run.arm.name,
                    "seed": run.seed,
                    "shares": run.shares,
                    "perplexity": with_long_tail(run.result["test"]["perplexity"]),
                }
                for run in runs
            ]
    return share_curve(corpora, roles)


def compare(comparisons: Comparisons) -> dict[str, dict]:
    """The comparisons behind the tables, by arm."""
    if not comparisons.records:
        return {}
    first = comparisons.records[0]
    bins = {n: range(len(values)) for n, values in first["by_frequency"].items()}
    return {
        arm: {
            "seeds": sorted(record["seed"] for record in comparisons.of(arm)),
            "perplexity_over_baseline": {
                name: comparisons.ratio(arm, perplexity(name)) for name in (*comparisons.domains, LONG_TAIL, GENERAL)
            },
            "share_of_oracle": comparisons.share_of_oracle(arm, perplexity(LONG_TAIL)),
            "flops_a_token_over_baseline": flops_ratio(comparisons, arm),
            "long_tail_by_position": {
                place: comparisons.ratio(arm, at_position(place)) for place in first["by_position"]
            },
            "by_frequency": {
                n: [comparisons.ratio(arm, in_bin(place, n)) for place in places] for n, places in bins.items()
            },
        }
        for arm in comparisons.arms
    }


def as_json(value: Any) -> Any:
    """Plain values. Numbers that are not finite become text, which JSON has no other way for."""
    if is_dataclass(value):
        return as_json(asdict(value))
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def page(title: str, results: dict, comparisons: Comparisons, pictures: list[str]) -> str:
    """The Markdown page."""
    roles = comparisons.roles
    named = ", ".join(f"{role} `{arm}`" for role, arm in asdict(roles).items())
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [
        f"# {title}\n",
        f"`{results['command']}`\n\n{results['date']}; runs on {results['machine']}; {versions}.\n",
        f"{len(comparisons.records)} finished runs. Arms by role: {named}. All numbers are of the test split. Ratios "
        f"are perplexities over `{roles.baseline}`'s, paired by seed, geometric means; in brackets Student's 95 % "
        "interval over seeds, Fieller's for shares of a gain; one seed has none.\n",
        "## Against what was asked for\n",
        tables.judgement_table(results["judgement_rows"]),
        "## Arms\n",
        "FLOPs a token: forward and backward, counted, over the baseline's, with experts on. Active parameters: the "
        "mean over routes. Seconds: of runs that were not resumed.\n",
        tables.main_table(comparisons),
        "Perplexities, means over seeds:\n",
        tables.absolute_table(comparisons),
        "## By position in the block\n",
        "Long tail; position of the token that predicts; in parentheses the share of the oracle's gain there.\n",
        tables.position_table(comparisons),
        "## By sentence frequency\n",
        "Bins of equally many test blocks, rarest first, by the mean relative frequency of a block's tokens in the "
        "training text.\n",
        tables.bin_table(results["frequency_bins"]),
        tables.frequency_table(comparisons),
        "## Routing\n",
        "A block's route is the most frequent of its tokens' experts; AMI: adjusted mutual information with the "
        "domains; normalised: purity from 0 (no better than the largest domain's share) to 1.\n",
        tables.purity_table(comparisons),
        "## Tasks\n",
        "Accuracy in percent; in parentheses points over dense. Linear probe:\n",
        tables.task_table(comparisons, "probe"),
        "Full fine-tuning:\n",
        tables.task_table(comparisons, "finetune"),
        "## Forgetting\n",
        "Perplexity after a domain stage over that before.\n",
        tables.forgetting_table(comparisons),
        "## By a domain's share\n",
        tables.share_table(results["shares"]),
        *(f"![{name}]({name})\n" for name in pictures),
    ]
    return "\n".join(parts)


def write_report(runs: Path, corpus_folder: Path, output: Path, roles: Roles, machine: str, command: str) -> Path:
    """
    Reads the finished runs of a size and corpus and writes `<size>-<corpus>.json`, `.md` and `.png` files.

    Args:
        runs: `<size>` folder with `<corpus>/<arm>-<seed>` folders below it.
        corpus_folder: of the corpus, whose name is that of the folder of runs.
        output: folder to write to.
        roles: which arm is what.
        machine: the runs', in words.
        command: what to note as the command.

    Returns:
        The page.

    Raises:
        ValueError: runs that do not belong together, or to the corpus.
    """
    corpus = Corpus.load(corpus_folder)
    finished = read_runs(runs / corpus_folder.name)
    if any(run.settings["mixture"] != asdict(corpus.mixture) for run in finished):
        raise ValueError(f"corpus={corpus_folder.name!r} is not allowed: its mixture is not that of the runs.")
    blocks = TestBlocks.of(corpus)
    comparisons = Comparisons([record_of(run, start, blocks) for run, start in starts(finished)], roles)
    name = f"{runs.name}-{corpus_folder.name}"
    results = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": {"modeling_cse": modeling_cse.__version__, **{each: version(each) for each in PACKAGES}},
        "roles": asdict(roles),
        "runs": comparisons.records,
        "comparisons": compare(comparisons),
        "frequency_bins": bins_of(blocks),
        "shares": share_rows(runs, corpus_folder.name, roles),
        "judgement_rows": judge(comparisons),
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(as_json(results), indent=1, allow_nan=False)
    (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    drawn = {
        f"{name}-ratios.png": draw_ratios(comparisons, output / f"{name}-ratios.png"),
        f"{name}-positions.png": draw_positions(comparisons, output / f"{name}-positions.png"),
        f"{name}-shares.png": draw_shares(results["shares"], output / f"{name}-shares.png"),
    }
    pictures = [picture for picture, made in drawn.items() if made]
    place = output / f"{name}.md"
    title = f"The long-tail benchmark: size `{runs.name}`, corpus `{corpus_folder.name}`"
    place.write_text(page(title, results, comparisons, pictures), encoding="utf-8")
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    """Reports from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--runs", type=Path, default=Path("runs/longtail"), help="folder with <size>/<corpus>/...")
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--machine", required=True, help='what the runs ran on, in words: "2 CPU cores"')
    for role, arm in asdict(Roles()).items():
        parser.add_argument(f"--{role}", default=arm, help=f"name of the arm; default {arm}")
    given = sys.argv[1:] if arguments is None else list(arguments)
    parsed = parser.parse_args(given)
    roles = Roles(**{role: getattr(parsed, role) for role in asdict(Roles())})
    # where runs and corpora lie on this machine is nobody's business
    shown = {"size": parsed.size, "runs": f"runs/{parsed.runs.name}"}
    shown |= {"corpus": f"runs/longtail/corpus/{parsed.corpus.name}", "machine": parsed.machine, **asdict(roles)}
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in shown.items())
    command = f"python examples/longtail_benchmark/report.py {options}"
    place = write_report(parsed.runs / parsed.size, parsed.corpus, parsed.output, roles, parsed.machine, command)
    print(place.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
