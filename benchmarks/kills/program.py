# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The run that is killed: a tiny model, the callback, and what is left at the end, to the last bit."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_cse import (
    ClusterExpertsCallback,
    CSEBertConfig,
    CSEBertForMaskedLM,
    CSEGPT2Config,
    CSEGPT2ForCausalLM,
    last_complete_checkpoint,
)

from .places import Kill, Places, PlacesOfTheTrainer


VOCAB, LENGTH = 99, 12
GPT2_SIZES = {"vocab_size": VOCAB, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "pad_token_id": 0}
GPT2_SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "cse_combine": "replace", "cse_routing": "discriminant"}
BERT_SIZES = {"vocab_size": VOCAB, "max_position_embeddings": 16, "hidden_size": 16, "num_hidden_layers": 2}
BERT_SIZES |= {"num_attention_heads": 2, "intermediate_size": 32, "pad_token_id": 0}
BERT_SIZES |= {"cse_combine": "replace", "cse_routing": "sequence"}
MODELS = {
    "gpt2": (CSEGPT2Config, CSEGPT2ForCausalLM, GPT2_SIZES),
    "bert": (CSEBertConfig, CSEBertForMaskedLM, BERT_SIZES),
}
STEPS = 13
# What depends on the clock; and Trainer's mean loss, which counts only the steps since it was resumed.
NOT_COMPARED = ("runtime", "per_second", "seconds", "total_flos", "train_loss")

# What a run is: family and flags of the model, arguments of the callback, arguments of the Trainer. Fits are at steps
# 3, 7 and 11 (or once), each over the last steps before it; dropout and shuffling draw random numbers.
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2-ffn-recluster": {"family": "gpt2"},
    "gpt2-attention-ema-accumulated": {
        "family": "gpt2",
        "flags": {"cse_modules": ["attention"]},
        "clusters": {"update": "ema", "ema_decay": 0.95},
        "training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    },
    "gpt2-both-recluster+ema": {
        "family": "gpt2",
        "flags": {"cse_modules": ["attention", "ffn"]},
        "clusters": {"update": "recluster+ema", "ema_decay": 0.95},
        "training": {"save_total_limit": 2},
    },
    "gpt2-ffn-frozen-accumulated": {
        "family": "gpt2",
        "clusters": {"update": "frozen"},
        "training": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    },
    "gpt2-add-auto-warmup": {
        "family": "gpt2",
        "flags": {"cse_combine": "add", "cse_layers": "auto"},
        "clusters": {"warmup": "auto", "layer_budget": 1},
        "training": {"save_steps": 1, "save_total_limit": 2},
    },
    "gpt2-add-texts-by-evidence": {
        "family": "gpt2",
        "flags": {"cse_combine": "add", "cse_routing": "evidence"},
        "clusters": {"algorithm": "text"},
    },
    "bert-ffn-recluster-accumulated": {
        "family": "bert",
        "training": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    },
    "bert-attention-recluster+ema": {
        "family": "bert",
        "flags": {"cse_modules": ["attention"]},
        "clusters": {"update": "recluster+ema", "ema_decay": 0.95},
        "training": {"save_steps": 1},
    },
    "bert-both-spherical-epochs": {
        "family": "bert",
        "flags": {"cse_modules": ["attention", "ffn"]},
        "clusters": {"algorithm": "spherical"},
        "training": {"save_strategy": "epoch"},
    },
}


def rows(family: str, count: int = 40) -> list[dict[str, torch.Tensor]]:
    """Sequences of three vocabularies of unequal shares; for BERT masked for good. (A collator that draws masks from
    the global generator does so ahead of the checkpoint, and the Trainer restores that generator a batch late.)"""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        domain = (0, 0, 0, 0, 1, 1, 2, 2)[number % 8]
        ids = torch.randint(0, 30, (LENGTH,), generator=generator) + 5 + 31 * domain
        hidden = torch.rand(LENGTH, generator=generator) < (0.3 if family == "bert" else 0.0)
        labels = ids.masked_fill(~hidden, -100) if family == "bert" else ids
        made.append({"input_ids": ids.masked_fill(hidden, 3), "labels": labels})
    return made


def run(variant: str, folder: Path, kill: Kill | None, tell: int) -> dict[str, int]:
    """
    Trains from the last complete checkpoint in a folder, or from the start, and leaves `end.safetensors` and
    `end.json` there.

    Args:
        variant: a key of `VARIANTS`.
        folder: of the run.
        kill, tell: see `Places`.

    Returns:
        The places passed by kind.
    """
    chosen = VARIANTS[variant]
    config_class, model_class, sizes = MODELS[chosen["family"]]
    torch.manual_seed(0)
    model = model_class(config_class(**{**sizes, **chosen.get("flags", {})}))
    options = {"warmup": 3, "recluster_every": 4, "num_clusters": 3, "common_share": 0.4, "sample_size": 16}
    clusters = ClusterExpertsCallback(**{**options, **chosen.get("clusters", {})})
    training = {"per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    training |= {"max_steps": STEPS, "logging_steps": 1, "learning_rate": 5e-3, "seed": 1, "report_to": "none"}
    training |= {"use_cpu": True, "disable_tqdm": True, **chosen.get("training", {})}
    places = Places(folder, kill, tell)
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **training),
        train_dataset=rows(chosen["family"]),
        callbacks=[PlacesOfTheTrainer(places), End(clusters, folder)],
    )
    clusters.attach(trainer)
    trainer.add_callback(PlacesOfTheTrainer(places, folder / "done.txt"))
    places.install()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    return dict(places.passed)


class End(TrainerCallback):
    """Writes down all there is when training ends, before the callback under test takes its hooks off."""

    def __init__(self, clusters: ClusterExpertsCallback, folder: Path):
        self.clusters, self.folder = clusters, folder

    def on_train_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in _flat("", optimizer.state_dict())}
        tensors |= {f"memory.{name}": value for name, value in self.clusters.memory.tensors().items()}
        stores = self.clusters.collector.named_stores()
        for place, store in stores.items():
            features = store.as_it_is()
            if features is not None:
                tensors |= {f"features.{place}.{name}": value for name, value in vars(features).items()}
        tensors["random.torch"] = torch.get_rng_state()
        said = {
            "history": history(state.log_history),
            "schedule": lr_scheduler.state_dict(),
            "fits": self.clusters.memory.fits,
            "seen": {place: store.seen for place, store in stores.items()},
            "step": [state.global_step, state.epoch],
            "random.python": _digest(repr(random.getstate())),
            "random.numpy": _digest(repr(np.random.get_state(legacy=False)["state"]["key"].tolist())),
        }
        tensors = {name: value.clone().contiguous() for name, value in tensors.items()}
        save_file(tensors, self.folder / "end.safetensors")
        (self.folder / "end.json").write_text(json.dumps(said, default=str))


def history(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was logged and must be the same in the same run."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
        for entry in entries
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every number in nested dicts and lists, as a tensor by its path."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{prefix}.{key}", part)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _flat(f"{prefix}.{number}", part)
    elif isinstance(value, torch.Tensor):
        yield prefix, value
    elif isinstance(value, int | float):
        yield prefix, torch.tensor(value, dtype=torch.float64)


def differences(ours: Path, theirs: Path) -> list[str]:
    """What is not the same, to the bit, at the end of two runs."""
    one, other = (json.loads((folder / "end.json").read_text()) for folder in (ours, theirs))
    found = [name for name in one if one[name] != other[name]]
    tensors, wanted = (load_file(folder / "end.safetensors") for folder in (ours, theirs))
    found += sorted(tensors.keys() ^ wanted.keys())
    return found + [name for name in sorted(tensors.keys() & wanted.keys()) if not _same(tensors[name], wanted[name])]


def differences_of_checkpoints(ours: Path, theirs: Path) -> list[str]:
    """What is not the same, to the bit, in the checkpoints of the last step."""
    one, other = (folder / f"checkpoint-{STEPS}" for folder in (ours, theirs))
    histories = [
        history(json.loads((place / "trainer_state.json").read_text())["log_history"]) for place in (one, other)
    ]
    found = [] if histories[0] == histories[1] else ["history"]
    for name in ("model.safetensors", "cluster_state_rank0.safetensors"):
        tensors, wanted = load_file(one / name), load_file(other / name)
        found += sorted(tensors.keys() ^ wanted.keys())
        found += [key for key in sorted(tensors.keys() & wanted.keys()) if not _same(tensors[key], wanted[key])]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        found += [] if (one / name).read_bytes() == (other / name).read_bytes() else [name]
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()
