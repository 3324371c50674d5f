# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves in its folder: its settings, the losses of single tokens, its result."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm, label
from blocks import held_out_blocks
from corpus import Corpus
from measure import measure, summary
from origin import origin
from safetensors.numpy import save_file
from transformers import PreTrainedModel


SPLITS = ("validation", "test")


def read_result(folder: Path) -> dict | None:
    """What a finished run has written; None for another."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_result(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the result and its origin, whole or not at all: with it a run is finished. Returns what is read again."""
    partial = folder / "result.partial"
    partial.write_text(json.dumps({**record, "origin": origin()}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "result.json")
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """
    Makes a folder the home of a run.

    Raises:
        ValueError: it holds a run with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "run.json", json.dumps(settings, indent=1, sort_keys=True)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"folder={str(folder)!r} is not allowed: it holds a run with other settings.")
    path.write_text(text, encoding="utf-8")


def evaluate(model: PreTrainedModel, arm: Arm, corpus: Corpus, folder: Path, seed: int, bf16: bool) -> dict:
    """Measures on validation and test blocks, in the precision of training, and keeps the losses of single tokens."""
    causal, record = corpus.mixture.family == "gpt2", {}
    for split in SPLITS:
        # the labels of a control are told by the tokens, so masks come last
        blocks = held_out_blocks(label(arm, getattr(corpus, split), corpus.mixture.shares, seed), corpus)
        losses = measure(model, blocks, causal, bf16)
        record[split] = summary(losses)
        tensors = {"nll": losses.nll.astype(np.float16)}
        if not causal:
            tensors["predicted"] = losses.predicted
        tensors |= {f"experts.{site}": ids.astype(np.int8) for site, ids in losses.experts.items()}
        save_file(tensors, folder / f"{split}.safetensors")
    return record
