# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Flags of a run that takes seconds, and what it has logged."""

import json
from pathlib import Path


ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples" / "data"
TIMINGS = ("runtime", "per_second", "seconds")
FLAGS = {
    "train_file": DATA / "train.jsonl.gz",
    "validation_file": DATA / "validation.jsonl.gz",
    "domain_column": "domain",
    "max_train_samples": 120,
    "max_eval_samples": 9,
    "tokenizer_vocab_size": 800,
    "block_size": 64,
    "max_steps": 14,
    "per_device_train_batch_size": 4,
    "learning_rate": "3e-3",
    "logging_steps": 2,
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 7,
    "warmup": 5,
    "recluster_every": 5,
    "num_clusters": 3,
    "common_share": 0.5,  # of 16 texts, so that some cluster is rare whatever its words
    "sample_size": 16,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "compare_with_dense": True,
}
SMALL = {
    "gpt2": "n_embd=32,n_layer=3,n_head=4,n_positions=64",
    "bert": "hidden_size=32,num_hidden_layers=3,num_attention_heads=4,intermediate_size=64,max_position_embeddings=64",
}
SHORT = {"eval_strategy": "no", "eval_steps": None, "compare_with_dense": None, "max_steps": 8}


def flags(folder, family="gpt2", **changes):
    values = {**FLAGS, "config_overrides": SMALL[family], "output_dir": folder, **changes}
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def metrics(path):
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in entry.items() if not k.endswith(TIMINGS)} for entry in entries]
