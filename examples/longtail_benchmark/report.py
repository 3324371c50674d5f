# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From the records of finished runs to the answer: one JSON file, one page of tables, pictures.

    python examples/longtail_benchmark/report.py --size cpu --corpus main

Numbers are those of the test split; the validation split serves choosing. What no run stands behind is "not measured".
"""

import argparse
import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import report_tables as tables
from comparisons import (
    Comparisons,
    Record,
    Roles,
    ahead_of,
    all_text,
    at_position,
    flops_ratio,
    in_bin,
    perplexity,
    share_curve,
    total_flops,
)
from corpus import GENERAL
from judgement import judge
from keep import OF_THE_CORPUS, read_records, write_json
from report_figures import draw_positions, draw_ratios, draw_shares
from run_records import LONG_TAIL


HERE = Path(__file__).parent


def share_rows(results: Path, corpus: str, roles: Roles) -> list[dict]:
    """The gain by share, from the records of this corpus and of those named `share-*` beside it."""
    corpora = {place.name: read_records(place) for place in sorted({results / corpus, *results.glob("share-*")})}
    return share_curve({name: records for name, records in corpora.items() if records}, roles)


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
            }
            | {"all text": comparisons.ratio(arm, all_text)},
            "share_of_oracle": comparisons.share_of_oracle(arm, perplexity(LONG_TAIL)),
            "flops_a_token_over_baseline": flops_ratio(comparisons, arm),
            # a stage's settings do not tell what the run before it read
            "flops_over_baseline": comparisons.ratio(arm, total_flops) if arm in comparisons.scratch else None,
            "read_ahead": ahead_of(comparisons.of(arm)[0]) if arm in comparisons.scratch else None,
            "long_tail_by_position": {
                place: comparisons.ratio(arm, at_position(place)) for place in first["by_position"]
            },
            "by_frequency": {
                n: [comparisons.ratio(arm, in_bin(place, n)) for place in places] for n, places in bins.items()
            },
        }
        for arm in comparisons.arms
    }


def page(title: str, results: dict, comparisons: Comparisons, pictures: list[str]) -> str:
    """The Markdown page."""
    roles = comparisons.roles
    named = ", ".join(f"{role} `{arm}`" for role, arm in asdict(roles).items())
    parts = [
        f"# {title}\n",
        f"`{results['command']}`\n\n{origins(comparisons.records)}\n",
        f"{len(comparisons.records)} finished runs. Arms by role: {named}. All numbers are of the test split. Ratios "
        f"are perplexities over `{roles.baseline}`'s, paired by seed, geometric means; in brackets Student's 95 % "
        "interval over seeds, Fieller's for shares of a gain; one seed has none.\n",
        "## Against what was asked for\n",
        tables.judgement_table(results["judgement_rows"]),
        "## Arms\n",
        "All text: the perplexity over the whole mixture, in which each domain counts by its share of the training "
        "text. FLOPs a token: forward and backward, counted, over the baseline's, with experts on. FLOPs in all: the "
        "whole training's over the baseline's, the steps before the experts and what is read ahead for the first "
        "clusters included; read ahead: its share of them (records until 2026-11-29 lack it: it follows from their "
        f"settings). Active parameters: the mean over routes. {seconds_from(comparisons)} A cell that is of other "
        "seeds than its row says of how many.\n",
        tables.main_table(comparisons),
        pairs_of_two_machines(comparisons),
        "Perplexities, means over seeds:\n",
        tables.absolute_table(comparisons),
        "## By position in the block\n",
        "Long tail; position of the token that predicts; in parentheses the share of the oracle's gain there, and the "
        "seeds that the oracle has too where they are fewer.\n",
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
        "Accuracy in percent; in parentheses points over dense. Cells of other seeds than their row say of how many. "
        "Linear probe:\n",
        tables.task_table(comparisons, "probe"),
        "Full fine-tuning:\n",
        tables.task_table(comparisons, "finetune"),
        "The metrics that the probe's penalty and the learning rate are chosen by, where they are not accuracies. "
        "Records until 2026-11-29 lack them. Linear probe:\n",
        tables.own_metric_table(comparisons, "probe"),
        "Full fine-tuning:\n",
        tables.own_metric_table(comparisons, "finetune"),
        "## Forgetting\n",
        "Perplexity after a domain stage over that before.\n",
        tables.forgetting_table(comparisons),
        "## By a domain's share\n",
        tables.share_table(results["shares"]),
        *(f"![{name}]({name})\n" for name in pictures),
    ]
    return "\n".join(parts)


def seconds_from(comparisons: Comparisons) -> str:
    """Which runs the seconds are of."""
    others = {record["machine"] for record in comparisons.records} - {comparisons.machine}
    alone = f", on {comparisons.machine} alone, where most of `{comparisons.roles.baseline}` ran" if others else ""
    return f"Seconds: of runs that were not resumed{alone}."


def origins(records: list[Record]) -> str:
    """When and where the runs were made, and with which versions."""
    lines = []
    for machine in dict.fromkeys(record["machine"] for record in records):
        mine = [record for record in records if record["machine"] == machine]
        days = sorted({record["date"] for record in mine})
        lines.append(f"{len(mine)} runs on {machine}, {' to '.join(dict.fromkeys((days[0], days[-1])))}")
    found = {f"{name} {number}" for record in records for name, number in record["versions"].items()}
    codes = Counter(record["code"] for record in records if "code" in record)
    of_code = [f"code {name} ({count} runs)" for name, count in sorted(codes.items())]
    if codes.total() < len(records):
        of_code.append(f"{len(records) - codes.total()} runs do not say of which code between two releases")
    parts = [*lines, ", ".join(sorted(found)), ", ".join(of_code)]
    return "; ".join(parts) + "." if records else "No runs yet."


def pairs_of_two_machines(comparisons: Comparisons) -> str:
    """Which ratios of the main table are of runs that were made on different machines."""
    pairs = {arm: comparisons.apart(arm, comparisons.roles.baseline) for arm in comparisons.scratch}
    told = [f"`{arm}` (seed {', '.join(map(str, seeds))})" for arm, seeds in pairs.items() if seeds]
    if not told:
        return f"Every run is compared with a `{comparisons.roles.baseline}` of its own machine.\n"
    return f"On another machine than their `{comparisons.roles.baseline}`: {', '.join(told)}.\n"


def write_report(results: Path, size: str, corpus: str, roles: Roles, output: Path | None = None) -> Path:
    """
    Reads the records of a size and corpus and writes `<size>-<corpus>.json`, `.md` and `.png` files.

    Args:
        results: folder with `<size>/<corpus>/<arm>-<seed>.json` (keep.py).
        size: of the models.
        corpus: of the runs.
        roles: which arm is what.
        output: folder to write to; default: `results`.

    Returns:
        The page.

    Raises:
        ValueError: no corpus was kept under this name, or records that do not belong together.
    """
    folder, output, name = results / size / corpus, output or results, f"{size}-{corpus}"
    if not (folder / OF_THE_CORPUS).is_file():
        raise ValueError(f"corpus={corpus!r} is not allowed: keep.py has kept no runs of size {size!r} on it.")
    comparisons = Comparisons(read_records(folder), roles)
    other = {role: arm for role, arm in asdict(roles).items() if arm != getattr(Roles(), role)}
    options = " ".join(f"--{option} {shlex.quote(value)}" for option, value in other.items())
    found = {
        "command": f"python examples/longtail_benchmark/report.py --size {size} --corpus {corpus} {options}".strip(),
        "roles": asdict(roles),
        "runs": len(comparisons.records),
        "comparisons": compare(comparisons),
        **json.loads((folder / OF_THE_CORPUS).read_text(encoding="utf-8")),
        "shares": share_rows(results / size, corpus, roles),
        "judgement_rows": judge(comparisons),
    }
    write_json(output / f"{name}.json", found)
    drawn = {
        f"{name}-ratios.png": draw_ratios(comparisons, output / f"{name}-ratios.png"),
        f"{name}-positions.png": draw_positions(comparisons, output / f"{name}-positions.png"),
        f"{name}-shares.png": draw_shares(found["shares"], output / f"{name}-shares.png"),
    }
    pictures = [picture for picture, made in drawn.items() if made]
    place = output / f"{name}.md"
    title = f"The long-tail benchmark: size `{size}`, corpus `{corpus}`"
    place.write_text(page(title, found, comparisons, pictures), encoding="utf-8")
    return place


def main(arguments: Sequence[str] | None = None) -> None:
    """Reports from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--corpus", default="main")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of keep.py's records")
    parser.add_argument("--output", type=Path, help="default: the same")
    for role, arm in asdict(Roles()).items():
        parser.add_argument(f"--{role}", default=arm, help=f"name of the arm; default {arm}")
    given = parser.parse_args(arguments)
    roles = Roles(**{role: getattr(given, role) for role in asdict(Roles())})
    print(write_report(given.results, given.size, given.corpus, roles, given.output).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
