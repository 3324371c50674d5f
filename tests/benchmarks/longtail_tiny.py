# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The long-tail benchmark at a size for tests: made-up text of three domains, tiny models, runs of seconds."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import yaml


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"
# the files of an example find each other in their own folder
sys.path.append(str(EXAMPLES))

from comparisons import Roles  # noqa: E402
from corpus import Corpus, CorpusBuilder, HeldOutOverlap, Mixture  # noqa: E402


DOMAINS = {"general": ["general/news"], "legal": ["legal/court"], "medical": ["medical/notes"]}
SHARES = {"general": 0.6, "legal": 0.2, "medical": 0.2}
SIZES = {
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "attn_implementation": "eager"}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bert": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    | {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
TRAINING = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "lr_scheduler_type": "cosine"}
TRAINING |= {"warmup_steps": 2, "logging_steps": 1, "save_steps": 4}
STAGE = {"num_train_epochs": 3, "learning_rate": 2e-3, "warmup_steps": 1, "eval_steps": 2}
# The roles of these arms and of made-up records.
ROLES = Roles(default="cse", oracle="oracle", random="random", switch="switch", wide="dense_wide")
CSE = {"kind": "cse", "model": {"cse_layers": [1], "cse_combine": "add", "cse_num_experts": 4, "cse_expert_size": 16}}
CSE["clusters"] = {"warmup": 4, "recluster_every": 3, "num_clusters": 3, "sample_size": 16, "common_share": 0.3}
ARMS = {
    "dense": {"kind": "dense"},
    "dense_legal": {"like": "dense", "start": "dense", "domain": "legal", "training": STAGE},
    "switch": {"kind": "switch", "model": {"switch_layers": [1], "switch_num_experts": 2}},
    "cse": CSE,
    "cse_legal": {"like": "cse", "clusters": None, "start": "cse", "domain": "legal"}
    | {"training": {**STAGE, "weight_decay": 0.0}},
    "oracle": {"like": "cse", "control": "oracle"},
}


def write_text(folder: Path, documents: int = 400) -> Path:
    """`<source>.jsonl.gz` files: each domain draws from words of its own."""
    for number, (sources,) in enumerate(DOMAINS.values()):
        draws = np.random.default_rng(number)
        words = ["".join(draws.choice(list("abcdefghijklmnop"), 4)) for _ in range(40)]
        path = folder / f"{sources}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": " ".join(draws.choice(words, 30))}) + "\n")
    return folder


def build_corpus(text: Path, folder: Path, **changes) -> Corpus:
    """A corpus of 128 training blocks of 32 tokens."""
    values = {"tokens": 4096, "held_out": 256, "block_size": 32, "document_size": 64, "vocab_size": 300, **changes}
    CorpusBuilder(Mixture(DOMAINS, SHARES, **values), text, HeldOutOverlap({})).build(folder)
    return Corpus.load(folder)


def write_settings(folder: Path, family: str = "gpt2", **training) -> tuple[Path, Path]:
    """The files of arms and size."""
    arms, size = folder / "arms.yaml", folder / "tiny.yaml"
    arms.write_text(yaml.safe_dump(ARMS, sort_keys=False))
    values = {"family": family, "config": SIZES[family], "training": {**TRAINING, **training}}
    size.write_text(yaml.safe_dump(values, sort_keys=False))
    return arms, size


def losses(folder: Path) -> dict[int, float]:
    """The logged training losses of a run by step."""
    entries = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}
