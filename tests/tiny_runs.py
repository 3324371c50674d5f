# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Small Trainer runs, for the tests of the callback."""

import numpy as np
import torch
from tiny import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training import callback as callback_module
from modeling_cse.training.collecting import TEXTS


DROPOUT = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
# What depends on the clock; and Trainer's mean loss, which counts only the steps since it was resumed.
NOT_COMPARED = ("runtime", "per_second", "seconds", "total_flos", "train_loss")


# The domain of each of eight rows in turn: half of them are of the first, a quarter of each other one.
DOMAINS = (0, 0, 0, 0, 1, 1, 2, 2)


def rows(count: int = 64, length: int = 12, seed: int = 0) -> list[dict]:
    """Sequences from three vocabularies of unequal shares, each with its own number in front."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        domain = DOMAINS[number % 8]
        ids = torch.randint(0, 30, (length,), generator=generator) + 5 + 31 * domain
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made


def two_topics(seed: int = 0) -> list[dict]:
    """64 sequences, of eight in turn five are common, the others of a rare domain; its two topics share most words."""
    generator = np.random.default_rng(seed)
    common, rare = np.arange(5, 35), np.arange(36, 46)
    words = [common, np.append(rare, np.arange(50, 56)), np.append(rare, np.arange(60, 66))]
    ids = [torch.from_numpy(generator.choice(words[topic], 24)) for topic in np.tile([0, 0, 0, 0, 0, 1, 1, 2], 8)]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def settings(**changes) -> dict:
    """Arguments of a callback that fits at step 4 and at every second step after it."""
    return {"warmup": 4, "recluster_every": 2, "num_clusters": 3, "common_share": 0.4, "sample_size": 16, **changes}


def note_samples(monkeypatch) -> list[dict]:
    """Fills with what the fits of the runs to come look at, by site, a fit an entry; the texts as `TEXTS`."""
    noted, fit = [], callback_module.fit_layers

    def note(model, features, *args, **options):
        noted.append({**features, TEXTS: options["texts"]})
        return fit(model, features, *args, **options)

    monkeypatch.setattr(callback_module, "fit_layers", note)
    return noted


def make_trainer(folder, callback=None, *, model=None, data=None, callbacks=(), attach=True, **changes) -> Trainer:
    """Ten steps of eight rows, everything logged, nothing saved."""
    options = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "max_steps": 10,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    model = tiny_model("gpt2", **DROPOUT) if model is None else model
    arguments = TrainingArguments(**{**options, **changes})
    extra = list(callbacks) if attach or callback is None else [*callbacks, callback]
    trainer = Trainer(model, arguments, train_dataset=data or rows(), eval_dataset=rows(16, seed=9), callbacks=extra)
    if callback is not None and attach:
        callback.attach(trainer)
    return trainer


def train(folder, callback=None, *, resume=None, **options) -> Trainer:
    callback = ClusterExpertsCallback(**settings()) if callback is None else callback
    trainer = make_trainer(folder, callback, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def history(trainer: Trainer) -> list[dict]:
    """What was logged and must be the same in the same run."""
    return [
        {name: value for name, value in entry.items() if not any(part in name for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]


def fit_steps(trainer: Trainer) -> list[int]:
    """The steps at whose end clusters were fitted."""
    return [entry["step"] for entry in trainer.state.log_history if "cse/layer_1/ffn/clusters" in entry]


class Watcher(TrainerCallback):
    """Stands before the callback under test: notes what is logged, and calls `look(step, model)` after each step."""

    def __init__(self, look=None):
        self.logs: list[dict] = []
        self.look, self.seen = look, {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append({"step": state.global_step, **logs})

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.look is not None:
            self.seen[state.global_step] = self.look(model)
