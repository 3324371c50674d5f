# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
The domain stage: a finished model trained further on the text of one long-tail domain alone, the same blocks that it
was trained on in its mixture, for several epochs, with a fresh optimizer and schedule.

The domain's validation loss is measured at fixed intervals. Two models come out, each in a run folder of its own: the
best on validation (`<arm>-<seed>`, stopped early without a limit of patience) and the last (`<arm>_last-<seed>`). Both
are measured on all domains, which shows what was forgotten. Of a CSE model the stage trains the experts alone: text
that goes to no expert keeps its logits.
"""

import json
import shutil
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from arms import Arm, count_parameters, model_class
from blocks import held_out_blocks, training_blocks
from corpus import Corpus
from datasets import Dataset
from records import SPLITS, evaluate, open_folder, write_result
from torch import nn
from trainer import ExpertRatesTrainer, Stopwatch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from modeling_cse.runs.folder import JsonLinesCallback
from modeling_cse.training import last_complete_checkpoint


def train_stage(
    arm: Arm,
    seed: int,
    corpus: Corpus,
    folder: Path,
    settings: dict[str, Any],
    callbacks: Sequence[TrainerCallback] = (),
) -> dict | None:
    """
    Trains and measures a stage, or goes on where it stopped.

    Args:
        arm: an arm with `start` and `domain`.
        seed: also that of the run that it starts from.
        corpus: the corpus of that run.
        folder: `<arm>-<seed>`; the run that it starts from lies beside it, and the last model will.
        settings: of the run: `size`, `steps` (in place of the epochs) and others that `run.json` keeps.
        callbacks: for the Trainer.

    Returns:
        What `result.json` of the best model holds; None if a callback has stopped the training.

    Raises:
        ValueError: the run to start from is not finished, there are no blocks of the domain, or the folder holds
            another run.
    """
    start = folder.with_name(f"{arm.start}-{seed}")
    if not (start / "result.json").is_file():
        raise ValueError(f"start={arm.start!r} is not allowed yet: {str(start)!r} holds no finished run.")
    seen = corpus.train.select(rows_read(start, len(corpus.train)))
    train_rows, held_out = (_of_domain(blocks, arm.domain) for blocks in (seen, corpus.validation))
    open_folder(folder, settings)
    model = _read_model(start / "model", arm, settings["size"])
    if arm.kind == "cse":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." in name)
    stopwatch = Stopwatch(folder / "seconds.jsonl")
    checkpoint = last_complete_checkpoint(folder / "checkpoints", clusters=False)
    args = _arguments(arm, seed, settings, folder / "checkpoints", checkpoint)
    set_seed(seed)
    blocks, needed = training_blocks(train_rows, corpus, seed)
    trainer = ExpertRatesTrainer(
        model,
        args,
        train_dataset=blocks,
        eval_dataset=held_out_blocks(held_out, corpus).remove_columns("domain"),
        data_collator=default_data_collator,
        callbacks=[*callbacks, *needed, JsonLinesCallback(folder / "metrics.jsonl"), stopwatch],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if not trainer.finished:
        return None
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    common = {"seed": seed, "parameters": count_parameters(model), "seconds": round(stopwatch.seconds, 1)}
    common |= {"resumed": checkpoint is not None, "blocks": len(train_rows), "validation_loss_by_step": losses}
    last = folder.with_name(f"{arm.name}_last-{seed}")
    last_step, best_step = trainer.state.global_step, trainer.state.best_global_step
    last.mkdir(parents=True, exist_ok=True)
    last_model = _read_model(folder / "checkpoints" / f"checkpoint-{last_step}", arm, settings["size"])
    measured: dict[int, tuple[Path, dict]] = {}
    # the best model's result is written last: with it the run is finished
    for kept, place, step in ((last_model.to(model.device), last, last_step), (model, folder, best_step)):
        kept.save_pretrained(place / "model")
        if step not in measured:
            measured[step] = place, evaluate(kept, arm, corpus, place, seed, args.bf16)
        source, figures = measured[step]
        for split in SPLITS if source != place else ():  # the last model is the best one
            shutil.copyfile(source / f"{split}.safetensors", place / f"{split}.safetensors")
        record = {"arm": place.name.removesuffix(f"-{seed}"), **common, "step": step, **figures}
        written = write_result(place, record)
    return written


def rows_read(run: Path, rows: int) -> list[int]:
    """
    Which of its rows a run of the benchmark was trained on, in ascending order: all of them after an epoch, otherwise
    those that a Trainer of its seed and batches draws first.

    Args:
        run: folder of the run.
        rows: how many rows its training data have.
    """
    settings = json.loads((run / "run.json").read_text(encoding="utf-8"))
    options = {**settings["size"]["training"], **settings["arm"]["training"]}
    steps = settings["steps"] or options.get("max_steps", -1)
    if steps < 0:
        return list(range(rows))
    batches = ("per_device_train_batch_size", "gradient_accumulation_steps")
    args = TrainingArguments(
        output_dir=str(run / "checkpoints"),
        seed=settings["seed"],
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        **{name: options[name] for name in batches if name in options},
    )
    numbered = Dataset.from_dict({"row": range(rows)})
    trainer = Trainer(nn.Identity(), args, train_dataset=numbered, data_collator=default_data_collator)
    drawn = islice(trainer.get_train_dataloader(), steps * args.gradient_accumulation_steps)
    return sorted(row for batch in drawn for row in batch["row"].tolist())


def _of_domain(blocks: Dataset, domain: str) -> Dataset:
    rows = [row for row, name in enumerate(blocks["domain"]) if name == domain]
    if not rows:
        raise ValueError(
            f"domain={domain!r} is not allowed: no block is of it alone, they are of {sorted(set(blocks['domain']))}."
        )
    return blocks.select(rows)


def _read_model(folder: Path, arm: Arm, size: dict[str, Any]) -> PreTrainedModel:
    kwargs = {name: size["config"][name] for name in ("attn_implementation",) if name in size["config"]}
    return model_class(arm, size["family"]).from_pretrained(folder, **kwargs)


def _arguments(
    arm: Arm, seed: int, settings: dict[str, Any], output: Path, checkpoint: str | None
) -> TrainingArguments:
    options = {**settings["size"]["training"], "max_steps": settings["steps"] or -1, **arm.training}
    return TrainingArguments(
        output_dir=str(output),
        seed=seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        resume_from_checkpoint=checkpoint,
        eval_strategy="steps",
        prediction_loss_only=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        save_total_limit=2,  # with 1 the last checkpoint would be deleted for the best one
        **{**options, "save_strategy": "steps", "save_steps": options["eval_steps"]},
    )
