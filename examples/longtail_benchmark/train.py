# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One run: an arm, a seed, a size, a corpus; trained, measured, and recorded in a folder of its own.

    python examples/longtail_benchmark/train.py --arm cse_wide_counted --seed 0
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from arms import Arm, build_callback, build_model, count_parameters, for_size, label, read_arms
from blocks import training_blocks
from corpus import Corpus
from records import evaluate, open_folder, read_result, write_result
from stage import train_stage
from trainer import ExpertRatesTrainer, Stopwatch
from transformers import TrainerCallback, TrainingArguments, default_data_collator, set_seed

from modeling_cse.runs.folder import JsonLinesCallback
from modeling_cse.training import last_complete_checkpoint


HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """How large a model and how long a training: `config` of the base model, `training` arguments. `like` takes over
    a size beside it and merges mappings; null takes a value away."""

    name: str
    family: str
    config: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> "Size":
        """Reads `sizes/<name>.yaml`, or a file that is named with its ending."""
        path = Path(name) if name.endswith(".yaml") else HERE / "sizes" / f"{name}.yaml"
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        if (like := own.pop("like", None)) is not None:
            other = cls.load(str(path.with_name(f"{like}.yaml")))
            merged = {part: {**getattr(other, part), **own.get(part, {})} for part in ("config", "training")}
            kept = {part: {k: v for k, v in values.items() if v is not None} for part, values in merged.items()}
            own = {"family": other.family, **own, **kept}
        return cls(path.stem, **own)


def train(
    arm: Arm,
    seed: int,
    size: Size,
    corpus: Corpus,
    folder: Path,
    steps: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict | None:
    """
    Trains and measures an arm, or goes on where it stopped.

    Returns:
        What `result.json` holds; None if one of `callbacks` has stopped the training, to go on with the next call.

    Raises:
        ValueError: the folder holds another run, the corpus is of another family than the size, or the arm goes on
            from a run that is not finished.
    """
    if (known := read_result(folder)) is not None:
        return known
    if size.family != corpus.mixture.family:
        raise ValueError(
            f"size={size.name!r} is not allowed: it is of the family {size.family!r}, the corpus is of "
            f"{corpus.mixture.family!r}."
        )
    arm = for_size(arm, size.family, size.config)
    settings = {"arm": arm.settings(), "seed": seed, "size": asdict(size), "steps": steps}
    settings |= {"mixture": asdict(corpus.mixture)}
    if arm.start is not None:
        return train_stage(arm, seed, corpus, folder, settings, callbacks)
    open_folder(folder, settings)
    model = build_model(arm, size.family, size.config, corpus.tokenizer, seed)
    callback = build_callback(arm, seed)
    options = {**size.training, **arm.training}
    rate = options.pop("expert_rate", 1.0)
    if steps is not None:
        options["max_steps"] = steps
    stopwatch = Stopwatch(folder / "seconds.jsonl")
    checkpoint = last_complete_checkpoint(folder / "checkpoints", callback is not None)
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        save_total_limit=1,
        use_cpu=not torch.cuda.is_available(),
        resume_from_checkpoint=checkpoint,
        **options,
    )
    set_seed(seed)
    blocks, needed = training_blocks(label(arm, corpus.train, corpus.mixture.shares, seed), corpus, seed)
    trainer = ExpertRatesTrainer(
        model,
        args,
        train_dataset=blocks,
        data_collator=default_data_collator,
        callbacks=[*callbacks, *needed, JsonLinesCallback(folder / "metrics.jsonl"), stopwatch],
    )
    trainer.expert_rate = rate
    if callback is not None:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.finished:
        return None
    seconds = stopwatch.seconds
    trainer.save_model(str(folder / "model"))
    record = {
        "arm": arm.name,
        "seed": seed,
        "parameters": count_parameters(model),
        "seconds": round(seconds, 1),
        "resumed": checkpoint is not None,
        **evaluate(model, arm, corpus, folder, seed, args.bf16),
    }
    return write_result(folder, record)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of a run, which are also those of a line in a list of runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--output", type=Path, default=Path("runs/longtail"))
    parser.add_argument("--threads", type=int, default=1)
    return parser


def run(
    arguments: argparse.Namespace, corpus: Corpus | None = None, callbacks: Sequence[TrainerCallback] = ()
) -> dict | None:
    """Trains what the arguments of `build_parser` say; `corpus` spares reading it again."""
    arms = read_arms(arguments.arms)
    if arguments.arm not in arms:
        raise ValueError(f"arm={arguments.arm!r} is not allowed: it must be one of {sorted(arms)}.")
    arm, size = arms[arguments.arm], Size.load(arguments.size)
    folder = arguments.output / size.name / arguments.corpus.name / f"{arm.name}-{arguments.seed}"
    corpus = Corpus.load(arguments.corpus) if corpus is None else corpus
    return train(arm, arguments.seed, size, corpus, folder, arguments.steps, callbacks)


def main() -> None:
    """Trains one arm from the command line."""
    arguments = build_parser().parse_args()
    torch.set_num_threads(arguments.threads)
    record = run(arguments)
    print(arguments.arm, arguments.seed, record["seconds"], record["test"]["perplexity"])


if __name__ == "__main__":
    main()
