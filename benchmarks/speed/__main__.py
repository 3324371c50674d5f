# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
How fast a model with cluster experts is, beside a dense twin, transformers' own sparse layer and a loop over samples.

    python -m benchmarks.speed                                    # all shapes and measures on the CPU
    python -m benchmarks.speed --shapes 124m --dtype bf16         # adds to the same file
    python -m benchmarks.speed --device cuda --figure docs/figures/speed.png
    python -m benchmarks.speed --smoke                            # seconds, to see it run

All contenders of a shape have the same base weights, run in one process and in turn (A B C, B C A, ...), and differ
in the FFNs of the last two layers. Reported are medians, and medians and quartiles of the ratios to the dense twin
round by round. Measures:

    training      forward pass, backward pass, AdamW (fused); bf16 is autocast
    layer         forward and backward pass of one FFN alone
    memory        peak of a training step, without what experts themselves take (see memory.py, measures.py)
    prefill       a prompt into an empty cache; bf16 is a model in bf16
    decoding      a token after a prompt of 32
    reclustering  one fit of all layers, and its share of training time beside the steps between two fits

All contenders of a shape and their optimizers are in memory together: where that is too much, name fewer at a time
with `--contenders`; each is compared with the dense twin of its own rounds. Writes `benchmarks/results/speed.json`,
where a result takes the place of an older one of the same kind, and prints the Markdown table of what was measured.
Settings of glibc's allocator (MALLOC_...) are part of the kind.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from . import report, results
from .contenders import DENSE, NAMES, NEVER_COMPILED, build, dense_weights
from .measures import MEASURES, Options
from .reclustering import reclustering
from .shapes import SHAPES, Shape


RECLUSTERING = "reclustering"
NOT_COMPILED = ("memory", RECLUSTERING)
SMOKE = {"length": 64, "tokens": 8, "rounds": 3}
SMOKE_SEQUENCES = 256


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--measures", nargs="+", choices=[*MEASURES, RECLUSTERING])
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), help="dense always takes part")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 1])
    parser.add_argument("--decoding_batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to decode")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="in decoding")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.3, help="of the tokens that go to experts")
    parser.add_argument("--threads", type=int, help="default: as torch finds it")
    parser.add_argument("--compile", action="store_true", help="torch.compile, except for the loop over samples")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    parser.add_argument("--figure", type=Path, help="picture of all results in the file, as PNG")
    parser.add_argument("--smoke", action="store_true", help="the tiny shape, short and few rounds, in runs/")
    if "--smoke" in argv:
        parser.set_defaults(shapes=["tiny"], output=Path("runs/speed-smoke/speed.json"), **SMOKE)
    arguments = parser.parse_args(argv)
    if not 0 < arguments.share < 1:
        parser.error(f"--share {arguments.share} is not allowed: it must be between 0 and 1")
    if arguments.measures is None:
        left_out = NOT_COMPILED if arguments.compile else ()
        arguments.measures = [name for name in (*MEASURES, RECLUSTERING) if name not in left_out]
    elif arguments.compile and set(arguments.measures) & set(NOT_COMPILED):
        parser.error(f"--compile is not allowed with --measures {' '.join(NOT_COMPILED)}")
    return arguments


def measure(shape: Shape, arguments: argparse.Namespace, options: Options, steps: dict) -> Iterator[tuple[str, dict]]:
    """
    Names of measures and their records. Inference comes after training, because it may cast the weights.

    Args:
        steps: seconds of training steps by contender and batch, of earlier runs; those of this run are added.
    """
    base = dense_weights(shape)
    wanted = [name for name in NAMES if name == DENSE or name in arguments.contenders]
    if options.compile:
        wanted = [name for name in wanted if name not in NEVER_COMPILED]
    contenders = [build(name, shape, base, options.device, options.compile) for name in wanted]
    for name, take in MEASURES.items():
        if name not in arguments.measures:
            continue
        for record in take(shape, contenders, options):
            if name == "training":
                steps[record["contender"], record["batch"]] = record["seconds"]
            yield name, record
        torch.compiler.reset()
    if RECLUSTERING in arguments.measures:
        sequences = SMOKE_SEQUENCES if arguments.smoke else None
        for record in reclustering(contenders, options, steps, sequences):
            yield RECLUSTERING, record


def training_steps(found: dict, shape: str, options: Options) -> dict[tuple[str, int], float]:
    """Seconds of training steps by contender and batch, among results that are there."""
    alike = ("training", shape, options.device, options.dtype, options.length, options.compile, results.allocator())
    names = ("measure", "shape", "device", "dtype", "length", "compiled", "allocator")
    return {
        (record["contender"], record["batch"]): record["seconds"]
        for record in found["records"]
        if tuple(record[name] for name in names) == alike
    }


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    named = Options.__dataclass_fields__
    options = Options(**{name: value for name, value in vars(arguments).items() if name in named})
    run = results.describe_run(" ".join(["python -m benchmarks.speed", *argv]), options.device)
    fresh = []
    for name in arguments.shapes:
        steps = training_steps(results.read(arguments.output), name, options)
        for measured, record in measure(SHAPES[name], arguments, options, steps):
            fresh.append(results.complete(record, name, measured, options, run))
            # at once, so that a run that is broken off has not been for nothing
            results.write(arguments.output, results.merge(results.read(arguments.output), run, fresh[-1:]))
            print(f"{name} {measured} {record['batch'] or ''} {record['contender']}", file=sys.stderr)
    print(f"\n{report.table(fresh)}\n{arguments.output}")
    if arguments.figure:
        report.plot(results.read(arguments.output)["records"], arguments.figure)
        print(arguments.figure)


if __name__ == "__main__":
    main(sys.argv[1:])
