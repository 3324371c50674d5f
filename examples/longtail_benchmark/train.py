# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One run: an arm, a seed, a size, a corpus; trained, measured, and recorded in a folder of its own.

    python examples/longtail_benchmark/train.py --arm cse --seed 0
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file
from transformers import PreTrainedModel, Trainer, TrainingArguments, default_data_collator, set_seed

from modeling_cse.runs.folder import JsonLinesCallback
from modeling_cse.training import last_complete_checkpoint

from arms import Arm, build_callback, build_model, count_parameters, label, read_arms
from corpus import Corpus
from measure import measure, summary


HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """How large a model and how long a training: `config` of the base model, `training` arguments."""

    name: str
    family: str
    config: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> "Size":
        """Reads `sizes/<name>.yaml`."""
        return cls(name, **yaml.safe_load((HERE / "sizes" / f"{name}.yaml").read_text(encoding="utf-8")))


class ExpertRatesTrainer(Trainer):
    """A Trainer whose experts may have a learning rate of their own."""

    expert_rate: float = 1.0

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.expert_rate != 1.0 and not getattr(self, "_split", False):
            self._split = True
            ids = {id(p) for name, p in self.model.named_parameters() if ".experts." in name}
            for group in list(optimizer.param_groups):
                mine = [p for p in group["params"] if id(p) in ids]
                if mine:
                    group["params"] = [p for p in group["params"] if id(p) not in ids]
                    optimizer.add_param_group({**group, "params": mine, "lr": group["lr"] * self.expert_rate})
        return optimizer


def train(arm: Arm, seed: int, size: Size, corpus: Corpus, folder: Path, steps: int | None = None) -> dict:
    """Trains and measures an arm, or goes on where it stopped. Returns what `result.json` holds."""
    result = folder / "result.json"
    if result.is_file():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"arm": asdict(arm), "seed": seed, "size": asdict(size), "mixture": asdict(corpus.mixture), "steps": steps}
    check = folder / "run.json"
    text = json.dumps(settings, indent=1, sort_keys=True)
    if check.is_file() and check.read_text() != text:
        raise ValueError(f"folder={str(folder)!r} is not allowed: it holds a run with other settings.")
    check.write_text(text)
    model = build_model(arm, size.family, size.config, corpus.tokenizer, seed)
    callback = build_callback(arm, seed)
    options = {**size.training, **arm.training}
    rate = options.pop("expert_rate", 1.0)
    if steps is not None:
        options["max_steps"] = steps
    clock = time.perf_counter()
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
    blocks = label(arm, corpus.train, corpus.mixture.shares, seed)
    blocks = blocks.map(lambda batch: {"labels": batch["input_ids"]}, batched=True).remove_columns("domain")
    trainer = ExpertRatesTrainer(
        model,
        args,
        train_dataset=blocks,
        data_collator=default_data_collator,
        callbacks=[JsonLinesCallback(folder / "metrics.jsonl")],
    )
    trainer.expert_rate = rate
    if callback is not None:
        callback.attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - clock
    trainer.save_model(str(folder / "model"))
    record = {
        "arm": arm.name,
        "seed": seed,
        "parameters": count_parameters(model),
        "seconds": round(seconds, 1),
        "resumed": checkpoint is not None,
        **evaluate(model, arm, size, corpus, folder, seed),
    }
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, result)
    return record


def evaluate(model: PreTrainedModel, arm: Arm, size: Size, corpus: Corpus, folder: Path, seed: int) -> dict:
    """Measures on validation and test blocks, and keeps the losses of single tokens in the folder."""
    record = {}
    for split in ("validation", "test"):
        blocks = label(arm, getattr(corpus, split), corpus.mixture.shares, seed)
        losses = measure(model, blocks, size.family == "gpt2")
        record[split] = summary(losses)
        tensors = {"nll": losses.nll.astype(np.float16)}
        tensors |= {f"experts.{site}": ids.astype(np.int8) for site, ids in losses.experts.items()}
        save_file(tensors, folder / f"{split}.safetensors")
    return record


def main() -> None:
    """Trains one arm from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, default=HERE / "arms.yaml")
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--output", type=Path, default=Path("runs/longtail"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arm = read_arms(arguments.arms)[arguments.arm]
    size = Size.load(arguments.size)
    folder = arguments.output / size.name / arguments.corpus.name / f"{arm.name}-{arguments.seed}"
    record = train(arm, arguments.seed, size, Corpus.load(arguments.corpus), folder, arguments.steps)
    print(arm.name, arguments.seed, record["seconds"], record["test"]["perplexity"])


if __name__ == "__main__":
    main()
