# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What more experts, more clusters and larger samples cost, on this machine's CPU.

    python benchmarks/scaling.py                            # all parts
    python benchmarks/scaling.py --parts experts            # some; the others stay in the file as they are
    python benchmarks/scaling.py --parts experts --experts 4 512 --tokens 131072 --output more.json --figure more.png
    python benchmarks/scaling.py --smoke                    # seconds: a few small points, figures mean nothing

- experts: forward and backward of one FFN with 4 to 512 experts, a token (scaling_experts.py);
- clusters: the router with 4 to 4,096 clusters, a token (scaling_clusters.py);
- reclustering: one fit of one site by the size of its sample; and k-means alone against others at equal inertia.

Medians and quartiles over interleaved rounds. Writes a JSON file, a picture, and prints Markdown tables.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy
import scipy
import sklearn
import torch
import transformers
from scaling_clusters import measure_clusters, measure_kmeans, measure_reclustering
from scaling_experts import PRECISIONS, measure_experts
from scaling_report import draw, tables


ROUNDS = 7
SIZES = {
    "experts": {"width": 256, "expert_width": 256, "experts": (4, 16, 64, 128, 256, 512)}
    | {"tokens": (4096, 32768), "routed": (1.0, 0.3), "precisions": PRECISIONS, "profiled": 3},
    "clusters": {"clusters": (4, 16, 64, 256, 1024, 4096), "widths": (256, 768), "tokens": 4096},
    "reclustering": {"reservoirs": (512, 2048, 8192, 32768), "widths": (256, 768)}
    | {"kmeans_rows": (2048, 8192), "kmeans_clusters": (8, 64)},
}
SMOKE = {
    "experts": {"width": 32, "expert_width": 32, "experts": (4, 8), "tokens": (512,), "routed": (1.0, 0.3)}
    | {"precisions": PRECISIONS, "profiled": 1},
    "clusters": {"clusters": (4, 64), "widths": (32,), "tokens": 512},
    "reclustering": {"reservoirs": (64, 256), "widths": (32,), "kmeans_rows": (256,), "kmeans_clusters": (4,)},
}
PARTS = tuple(SIZES)


def provenance() -> dict:
    """What figures depend on besides the code below."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    modules = (torch, transformers, sklearn, numpy, scipy)
    return {
        "command": " ".join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "commit": revision,
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {module.__name__: module.__version__ for module in modules},
    }


def measure(part: str, sizes: dict, rounds: int) -> dict[str, list[dict]]:
    """The curves of a part by name, each a list of points."""
    if part == "experts":
        return {"experts": measure_experts(sizes, rounds)}
    if part == "clusters":
        return {"clusters": measure_clusters(sizes, rounds)}
    return {"reclustering": measure_reclustering(sizes, rounds), "kmeans": measure_kmeans(sizes, rounds)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=None, help=f"default {ROUNDS}; 2 with --smoke")
    parser.add_argument("--output", type=Path, default=None, help="default benchmarks/results/scaling.json")
    parser.add_argument("--figure", type=Path, default=None, help="default docs/figures/scaling.png")
    parser.add_argument("--experts", type=int, nargs="+", help="numbers of experts, for the part of that name")
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens a step, for the same part")
    parser.add_argument("--smoke", action="store_true", help="by default writes to runs/scaling-smoke")
    arguments = parser.parse_args(argv)
    places = {True: ("runs/scaling-smoke", "runs/scaling-smoke"), False: ("benchmarks/results", "docs/figures")}
    results_folder, figures_folder = map(Path, places[arguments.smoke])
    output = arguments.output or results_folder / "scaling.json"
    figure = arguments.figure or figures_folder / "scaling.png"
    rounds = arguments.rounds or (2 if arguments.smoke else ROUNDS)
    results = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        sizes = dict((SMOKE if arguments.smoke else SIZES)[part])
        if part == "experts":
            sizes |= {name: vars(arguments)[name] for name in ("experts", "tokens") if vars(arguments)[name]}
        results[part] = {**provenance(), "rounds": rounds, "sizes": sizes, "curves": measure(part, sizes, rounds)}
        # after each part: what is measured is kept
        output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    written = json.loads(output.read_text(encoding="utf-8"))
    results = {part: written[part] for part in PARTS if part in written}
    draw(results, figure)
    print(f"{tables(results)}\n{output}\n{figure}")


if __name__ == "__main__":
    main()
