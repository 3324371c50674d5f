# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
The quickstart's model and text with clusters of hidden states: once with each way to keep them, and with both
controls, against one dense twin.

    python benchmarks/modes.py                       # about twelve minutes on two cores; goes on where it stopped
    python benchmarks/modes.py --seeds 0 1 2         # more seeds
    python benchmarks/modes.py --smoke               # a few steps, to see it run

Writes `benchmarks/results/modes.json` and prints the table of the README. Further flags go to the runs.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from modeling_cse import CSEGPT2ForCausalLM
from modeling_cse.runs import GPT2, pretrain


RECIPE = "configuration/recipes/quickstart.yaml"
# Clusters of hidden states as the quickstart had them when this was written.
CLUSTERS = ["--cse_routing", "discriminant", "--algorithm", "kmeans", "--num_clusters", "4", "--common_share", "0.7"]
CLUSTERS += ["--warmup", "0.3", "--sample_size", "512"]
MODES = {
    "recluster": ["--update", "recluster"],
    "ema": ["--update", "ema"],
    "frozen": ["--update", "frozen"],
    "random": ["--control", "random"],
    "oracle": ["--control", "oracle"],
}
SMOKE = ["--max_steps", "12", "--warmup", "4", "--recluster_every", "4", "--sample_size", "128", "--eval_steps", "12"]


def run_mode(mode: str, seed: int, folder: Path, flags: list[str]) -> dict:
    """One run, or what it left behind. The first mode trains the dense twin, whose sizes the random control takes."""
    place = folder / f"{mode}-{seed}"
    if (place / "report.json").is_file():
        return json.loads((place / "report.json").read_text())
    first = mode == next(iter(MODES))
    argv = [RECIPE, "--output_dir", str(place), "--seed", str(seed), *CLUSTERS, *MODES[mode]]
    argv += ["--compare_with_dense", str(first)]
    if mode == "random":
        sizes = cluster_shares(folder / f"{next(iter(MODES))}-{seed}" / "cse")
        argv += ["--random_shares", *map(repr, sizes)]
    return pretrain(GPT2, [*argv, *flags])


def cluster_shares(folder: Path) -> list[float]:
    """Share of the sequences in each cluster of the last router of a saved model, the largest first."""
    model = CSEGPT2ForCausalLM.from_pretrained(folder)
    router = list(model.base_model.routed_modules().values())[-1].router
    sizes = router.cluster_sizes[router.cluster_sizes > 0].double()
    return (sizes / sizes.sum()).sort(descending=True).values.tolist()


def compare(reports: dict[str, dict]) -> dict[str, dict[str, dict[str, float]]]:
    """By mode and domain: perplexity, its ratio to the dense twin's, and the share of tokens that go to experts."""
    dense = reports[next(iter(MODES))]["perplexity"]["dense"]
    return {
        mode: {
            domain: {
                "perplexity": value,
                "over_dense": value / dense[domain],
                **({"routed": sum(report["routing"][domain])} if domain in report["routing"] else {}),
            }
            for domain, value in report["perplexity"]["cse"].items()
        }
        for mode, report in reports.items()
    }


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown: a row a mode, the mean ratio over seeds by domain, and where tokens of each domain go."""
    seeds = list(results)
    domains = list(results[seeds[0]][next(iter(MODES))])
    named = [domain for domain in domains if domain != "all"]
    rows = [["perplexity over the dense twin's", *domains, "routed: " + " / ".join(named)]]
    rows.append(["---", *["---:"] * (len(domains) + 1)])
    for mode in MODES:
        ratios = [[results[seed][mode][domain]["over_dense"] for seed in seeds] for domain in domains]
        routed = [statistics.mean(results[seed][mode][domain]["routed"] for seed in seeds) for domain in named]
        cells = [f"{statistics.mean(each):.3f}" + _spread(each) for each in ratios]
        rows.append([f"`{mode}`", *cells, " / ".join(f"{share:.0%}" for share in routed)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _spread(values: list[float]) -> str:
    return f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/modes"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/modes.json"))
    parser.add_argument("--smoke", action="store_true")
    arguments, flags = parser.parse_known_args()
    if arguments.smoke:
        arguments.folder, arguments.output = Path("runs/modes-smoke"), Path("runs/modes-smoke/modes.json")
        flags = [*SMOKE, *flags]
    results = {}
    for seed in arguments.seeds:
        reports = {mode: run_mode(mode, seed, arguments.folder, flags) for mode in MODES}
        results[str(seed)] = compare(reports)
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    record = {
        "command": " ".join(["python", "benchmarks/modes.py", *sys.argv[1:]]),
        "commit": revision,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n{arguments.output}")


if __name__ == "__main__":
    main()
