# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Small runs that the tests start in several processes, and in one to compare with: `SCENARIOS` by name, each from a
folder to what a rank ended with. Launched as a script, it runs some of them in a process group:

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/scenarios.py FOLDER NAME [NAME ...]
"""

import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from tiny import EVIDENCE, tiny_model
from tiny_runs import Watcher, history, make_trainer, rows, settings, two_topics

from benchmarks.ranks import train as measured_run
from modeling_cse import ClusterExpertsCallback
from modeling_cse.sharding_cse import is_sharded, whole
from modeling_cse.training import warmup
from modeling_cse.training.consistency import GradientConsistency
from modeling_cse.training.gathering import gather_features, gather_texts, rank, world_size


GLOBAL_BATCH = 8
BOTH = {"cse_modules": ["attention", "ffn"]}
AT_ONCE = {"warmup": 0, "recluster_every": 3, "recluster_until": 6}  # of the second sample a part was read ahead


class SampleWatcher(ClusterExpertsCallback):
    """Notes, at each fit, which rows were sampled (their `given_clusters`, or all of their tokens), how many of them
    this rank had kept, and what was written."""

    def __init__(self, **options):
        super().__init__(**options)
        self.samples, self.kept, self.routers = [], [], []

    def _fit(self, optimizer):
        site = self._sites()[-1]
        store = self.collector.stores[site]
        sample = gather_features({site: store.as_it_is()}, self.sample_size)[site]
        texts = gather_texts(self.collector.texts.as_it_is(), self.sample_size)
        numbers = sample.labels if texts is None else texts.ids
        self.samples.append((numbers.tolist(), sample.embeddings))
        self.kept.append(0 if store.all() is None else len(store.all()))
        metrics = super()._fit(optimizer)
        state = self.base.state_dict().items()
        self.routers.append({name: t.clone() for name, t in state if ".router." in name or "evidence_router." in name})
        return metrics


class SplittingWatcher(SampleWatcher):
    """Finds two clusters in the first fit and three in the others, so that one falls in two."""

    def _fit(self, optimizer):
        self.settings = replace(self.settings, num_clusters=3 if self._has_clusters() else 2)
        return super()._fit(optimizer)


def numbered(made: list[dict]) -> list[dict]:
    """Rows that can be told apart in a sample: their number stands where clusters can be given."""
    return [{**row, "given_clusters": torch.tensor(number)} for number, row in enumerate(made)]


def masked_labels(made: list[dict]) -> list[dict]:
    """Rows of which few tokens count, row by row another number of them."""
    for number, row in enumerate(made):
        counted = torch.arange(len(row["labels"])) < 1 + number % 7
        row["labels"] = row["labels"].where(counted, -100)
    return made


def run(
    folder,
    *,
    model=None,
    update="recluster",
    accumulation=1,
    data=None,
    clusters=None,
    resume=None,
    callback_class=SampleWatcher,
    **options,
):
    """Ten steps of eight rows over all processes, with fits at steps 4, 6 and 8; without dropout."""
    decay = {"ema_decay": 0.9} if "ema" in update else {}
    callback = callback_class(**settings(update=update, **decay, **(clusters or {})))
    watcher = Watcher()
    options = {"learning_rate": 1e-3, "ddp_find_unused_parameters": False, **options}
    if world_size() > 1:
        options["ddp_backend"] = "gloo"
    trainer = make_trainer(
        folder,
        callback,
        model=tiny_model("gpt2") if model is None else model,
        data=numbered(rows()) if data is None else data,
        callbacks=[watcher],
        per_device_train_batch_size=GLOBAL_BATCH // world_size() // accumulation,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    trainer.train(resume_from_checkpoint=resume)
    own = trainer.accelerator.unwrap_model(trainer.model)
    logged = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in logged if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in logged if "grad_norm" in entry],
        "fits": [entry["step"] for entry in logged if "cse/seconds" in entry],
        "history": history(trainer),
        "samples": callback.samples,
        "kept": callback.kept,
        "routers": callback.routers,
        "state": own.state_dict(),
        "cse_layers": own.config.cse_layers,
    }


def first_padded(made: list[dict]) -> list[dict]:
    """Batches of which the second half, that of the last ranks, holds nothing but padding."""
    for number, row in enumerate(made):
        if number % GLOBAL_BATCH >= GLOBAL_BATCH // 2:
            row["attention_mask"] = torch.zeros_like(row["input_ids"])
            row["labels"] = torch.full_like(row["labels"], -100)
    return made


def automatic(folder):
    """The end of the warm-up and the layers are found, in a window that fits into a run of forty steps."""
    original, longest = GradientConsistency.__init__, warmup.LONGEST
    GradientConsistency.__init__ = lambda self, model, **options: original(self, model, window=64, **options)
    warmup.LONGEST = 0.6
    try:
        model = tiny_model("gpt2", cse_layers="auto")
        clusters = {"warmup": "auto", "recluster_every": 8, "layer_budget": 1}
        return run(folder, model=model, update="recluster+ema", clusters=clusters, max_steps=40)
    finally:
        GradientConsistency.__init__, warmup.LONGEST = original, longest


def resumed(folder, start=run, update="recluster+ema"):
    """A run that saved at step 7, and one that goes on from there."""
    saving = {"save_strategy": "steps", "save_steps": 7, "update": update}
    whole = start(folder, **saving)
    return {"whole": whole, "resumed": start(folder, **saving, resume=str(Path(folder) / "checkpoint-7"))}


@contextmanager
def sharding_on_a_cpu():
    """accelerate passes over an FSDP plugin where there is no accelerator, without a word. Its code for FSDP2 runs on
    CPUs too."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState._reset_state()
    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state()


def whole_state(run: dict) -> dict:
    """The same, with every parameter whole; and how many of them were spread."""
    sharded = sum(is_sharded(tensor) for tensor in run["state"].values())
    return {**run, "sharded": sharded, "state": {name: whole(tensor) for name, tensor in run["state"].items()}}


def sharded(folder, **options):
    """A run under FSDP2, as `fsdp=True` gives it."""
    with sharding_on_a_cpu():
        fsdp_config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
        return whole_state(run(folder, fsdp=True, fsdp_config=fsdp_config, **options))


def sharded_resumed(folder):
    def start(resume=None):
        model = tiny_model("gpt2", **BOTH)
        saving = {"save_strategy": "steps", "save_steps": 7, "update": "recluster+ema"}
        return sharded(folder, model=model, resume=resume, **saving)

    return {"whole": start(), "resumed": start(str(Path(folder) / "checkpoint-7"))}


def by_evidence(folder, start=run, clusters=None, **options):
    """Clusters of texts, read off each rank's own rows. A number in `given_clusters` would be taken for a route."""
    model = tiny_model("gpt2", **EVIDENCE, **BOTH)
    clusters = {"algorithm": "text", "sample_size": 32, **(clusters or {})}
    return start(folder, model=model, clusters=clusters, **{"data": rows(length=24), **options})


def sequential(made: list[dict]) -> dict:
    return {"data": made, "train_sampling_strategy": "sequential"}


def split(folder, start=run):
    """The rare cluster falls in two at the second fit: one half gets a copy of its expert, and of its moments."""
    options = {"callback_class": SplittingWatcher, **sequential(two_topics())}
    return by_evidence(folder, start, {"common_by": "size"}, **options)


def by_domain() -> list[dict]:
    """The first half of every batch is of the two common domains, the second half of the rare one."""
    made = numbered(rows(128))
    common = [row for row in made if row["input_ids"][0] < 67]
    rare = [row for row in made if row["input_ids"][0] >= 67]
    return [row for start in range(0, 64, 4) for row in [*common[start : start + 4], *(rare * 2)[start : start + 4]]]


SCENARIOS = {
    "measured": lambda folder: measured_run(folder, steps=15),
    "plain": lambda folder: run(folder, model=tiny_model("gpt2", **BOTH)),
    "evaluated": lambda folder: run(
        folder, model=tiny_model("gpt2", **BOTH), eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=4
    ),
    "clipped": lambda folder: run(folder, update="ema", max_grad_norm=0.05),
    "accumulated": lambda folder: run(folder, accumulation=2, gradient_checkpointing=True),
    "masked": lambda folder: run(
        folder, model=tiny_model("bert"), data=masked_labels(numbered(rows())), update="recluster+ema", accumulation=2
    ),
    "uneven": lambda folder: run(
        folder, data=numbered(rows(22)), accelerator_config={"even_batches": False}, clusters={"sample_size": 14}
    ),
    "one_sided": lambda folder: run(folder, **sequential(by_domain()), update="recluster+ema"),
    "padded": lambda folder: run(
        folder, **sequential(first_padded(numbered(rows()))), update="recluster+ema", clusters={"sample_size": 8}
    ),
    "automatic": automatic,
    "resumed": resumed,
    "by_evidence": by_evidence,
    "by_evidence_accumulated": lambda folder: by_evidence(folder, accumulation=2, gradient_checkpointing=True),
    "by_evidence_at_once": lambda folder: by_evidence(folder, clusters=AT_ONCE),
    "by_evidence_counted": lambda folder: by_evidence(folder, clusters={"sample_size": 16, "evidence_size": 44}),
    "sharded_at_once": lambda folder: by_evidence(folder, start=sharded, clusters=AT_ONCE),
    "split": split,
    "sharded_split": lambda folder: split(folder, sharded),
    "by_evidence_resumed": lambda folder: resumed(folder, by_evidence, "recluster"),
    "sharded": lambda folder: sharded(
        folder, model=tiny_model("gpt2", **BOTH), eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=4
    ),
    "sharded_everywhere": lambda folder: sharded(
        folder, model=tiny_model("gpt2", cse_layers=[0, 1, 2], cse_combine="add"), accumulation=2, update="ema"
    ),
    "whole_everywhere": lambda folder: run(
        folder, model=tiny_model("gpt2", cse_layers=[0, 1, 2], cse_combine="add"), accumulation=2, update="ema"
    ),
    "sharded_automatic": lambda folder: sharded(
        folder, model=tiny_model("gpt2", cse_layers="auto"), clusters={"layer_budget": 1}
    ),
    "sharded_resumed": sharded_resumed,
}


def main() -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder, *names = sys.argv[1:]
    for name in names:
        result = SCENARIOS[name](Path(folder) / name)
        torch.save(result, Path(folder) / f"{name}-{rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
