# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of text that is read ahead: clusters are found on it where training has read too little or nothing, nothing
else changes, and a run without a warm-up says where that cannot be."""

import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import routed_modules, tiny_model
from tiny_runs import DROPOUT, Watcher, fit_steps, history, make_trainer, note_samples, rows, settings, train
from torch.utils.data import DataLoader
from transformers import default_data_collator

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training import FeatureCollector, ahead
from modeling_cse.training.collecting import TEXTS


TEXT = {"common_share": 0.4, "num_clusters": 3, "sample_size": 32, "warmup": 0, "recluster_every": 4}
DATA = rows(length=24)


def evidence_model(**flags):
    return tiny_model("gpt2", cse_routing="evidence", **flags)


def callback(**changes) -> ClusterExpertsCallback:
    return ClusterExpertsCallback(**settings(**{**TEXT, **changes}))


def clusters_of(model) -> list[int]:
    return [module.router.num_clusters for module in routed_modules(model).values()]


def test_clusters_are_there_before_the_first_step(tmp_path):
    watcher = Watcher(clusters_of)
    trainer = train(tmp_path, callback(), model=evidence_model(), data=DATA, callbacks=[watcher])
    assert watcher.seen[0] == [3, 3] and fit_steps(trainer) == [0, 4, 8]
    first = next(entry for entry in trainer.state.log_history if "cse/layer_1/ffn/clusters" in entry)
    assert first["cse/layer_1/ffn/experts"] == 2 and first["cse/layer_1/ffn/agreement"] > 0.8
    assert trainer.model.training, "the mode of training"


@pytest.fixture
def samples(monkeypatch) -> list:
    """What the fits of a run look at."""
    return note_samples(monkeypatch)


def texts(samples: list) -> list[torch.Tensor]:
    """The tokens of the samples, without those before them that evidence is counted on."""
    return [sample[TEXTS].ids[-len(next(iter(sample.values()))) :] for sample in samples]


def test_the_next_fit_is_not_left_with_what_came_since(tmp_path, samples):
    train(tmp_path, callback(recluster_every=2), model=evidence_model(), data=DATA, max_steps=7)
    ids = texts(samples)
    assert [len(each) for each in ids] == [32] * 4, "fits before step 1, and after steps 2, 4 and 6"
    assert torch.equal(ids[1][:16], ids[0][16:]) and not torch.equal(ids[1][16:], ids[0][16:])
    seen = [tuple(row["input_ids"].tolist()) for row in DATA]
    drawn = [seen.index(tuple(text)) for text in ids[0].tolist()]
    assert len(set(drawn)) == 32 and drawn != sorted(drawn)


@pytest.mark.parametrize(("warmup", "ahead"), [(1, 24), (3, 8), (4, 0), (5, 0)])
def test_what_a_short_warm_up_has_read_is_filled_up(tmp_path, samples, warmup, ahead):
    """Of 32 sequences; a step reads eight."""
    train(tmp_path, callback(warmup=warmup, update="frozen"), model=evidence_model(), data=DATA, max_steps=7)
    (ids,) = texts(samples)
    drawn = np.random.default_rng(0).permutation(len(DATA))[:ahead]
    assert len(ids) == 32 and ids[:ahead].tolist() == [DATA[row]["input_ids"].tolist() for row in drawn]


@pytest.mark.parametrize(("flags", "changes"), [({}, {"layer_budget": 1}), ({"cse_routing": "discriminant"}, {})])
def test_states_of_an_untrained_model_fill_nothing_up(tmp_path, samples, flags, changes):
    model = tiny_model("gpt2", **{"cse_routing": "evidence", **flags})
    train(tmp_path, callback(warmup=2, update="frozen", **changes), model=model, data=DATA)
    assert len(next(iter(samples[0].values()))) == 16


def test_labels_of_the_data_are_taken_as_they_are(tmp_path):
    labels = (0, 0, 0, 0, 1, 1, 2, 2)
    data = [{**row, "given_clusters": labels[number % 8]} for number, row in enumerate(DATA)]
    own = ClusterExpertsCallback(warmup=0, update="frozen", algorithm="given", common_share=0.4, sample_size=32)
    trainer = train(tmp_path, own, model=tiny_model("gpt2", cse_routing="given"), data=data)
    assert fit_steps(trainer) == [0] and clusters_of(trainer.model) == [3, 3]


def test_training_sees_the_rows_and_draws_that_it_would_see_without(tmp_path):
    """Experts begin at zero: the first loss is that of the dense warm-up, dropout and order of the rows included."""
    losses = []
    for warmup in (0, 4):
        own = callback(warmup=warmup)
        trainer = train(tmp_path / str(warmup), own, model=evidence_model(**DROPOUT), data=DATA, max_steps=5)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] == losses[1][0] and losses[0][4] != losses[1][4]


def test_random_numbers_of_data_and_collator_are_given_back():
    def collate(batch):
        random.random(), np.random.rand(), torch.rand(())
        return default_data_collator(batch)

    def numbers():
        return random.random(), np.random.rand(), float(torch.rand(()))

    model, found = evidence_model(), []
    for look in (False, True):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if look:
            collector = FeatureCollector(model, 32)
            collector.attach()
            ahead.read_ahead(collector, model, DataLoader(DATA, collate_fn=collate), 8, 32, seed=0)
            assert all(len(store) == 32 for store in collector.stores.values())
        found.append(numbers())
    assert found[0] == found[1]


def test_a_collator_with_a_generator_of_its_own_draws_as_it_would_without():
    class Collator:
        generator = None

        def __call__(self, batch):
            self.generator = self.generator or torch.Generator().manual_seed(3)
            torch.rand(3, generator=self.generator)
            return default_data_collator(batch)

    model, collate = evidence_model(), Collator()
    collector = FeatureCollector(model, 32)
    collector.attach()
    ahead.read_ahead(collector, model, DataLoader(DATA, collate_fn=collate), 8, 32, seed=0)
    assert all(len(store) == 32 for store in collector.stores.values())
    assert collate.generator is None, "workers make one each"


def test_choices_of_a_question_are_read_ahead_as_rows(tmp_path, samples):
    model = tiny_model("bert", "ForMultipleChoice", cse_routing="evidence", cse_combine="add")
    data = [
        {name: torch.stack([one[name], other[name]]) for name in ("input_ids", "attention_mask")} | {"labels": 0}
        for one, other in zip(DATA[::2], DATA[1::2], strict=True)
    ]
    train(tmp_path, callback(update="frozen"), model=model, data=data, max_steps=2)
    assert len(texts(samples)[0]) == 32 and clusters_of(model) == [3, 3]


@pytest.mark.parametrize(("routing", "fits", "seen"), [("evidence", [6], 32), ("discriminant", [9], 32)])
def test_a_checkpoint_without_clustering_leaves_no_sample_too_small(tmp_path, samples, routing, fits, seen):
    """The first fit is due at step 6; a dense run was saved at step 5."""
    model = tiny_model("gpt2", cse_routing=routing)
    saving = {"data": DATA, "save_strategy": "steps", "save_steps": 5}
    make_trainer(tmp_path, model=model, **{**saving, "max_steps": 5}).train()
    own = callback(warmup=6, update="frozen")
    trainer = train(tmp_path, own, model=model, resume=str(tmp_path / "checkpoint-5"), max_steps=12, **saving)
    assert fit_steps(trainer) == fits and len(next(iter(samples[0].values()))) == seen


def test_generators_of_accelerators_are_left_alone(monkeypatch):
    """Nothing here gives them back."""
    seeded = []
    for device, name in ((torch.cuda, "manual_seed_all"), (torch.xpu, "manual_seed_all"), (torch.mps, "manual_seed")):
        monkeypatch.setattr(device, name, seeded.append)
    with ahead._random_numbers_kept(3):
        drawn = torch.rand(3)
    assert torch.equal(drawn, torch.rand(3, generator=torch.Generator().manual_seed(3))) and not seeded


@pytest.mark.parametrize(("processes", "passes"), [(1, 2), (2, 4)])
def test_processes_read_as_many_batches_however_many_documents_they_hold(monkeypatch, processes, passes):
    """Rows of three documents: one process has enough after two batches, of two none may stop before the other."""
    model, data = evidence_model(cse_separator_token_id=3), []
    for row in DATA:
        ids = row["input_ids"].clone()
        ids[[7, 15]] = 3
        data.append({**row, "input_ids": ids})
    monkeypatch.setattr(ahead, "world_size", lambda: processes)
    collector, calls = FeatureCollector(model, 64), []
    collector.attach()
    model.base_model.register_forward_pre_hook(lambda *args: calls.append(1))
    loader = DataLoader(data, collate_fn=default_data_collator)
    ahead.read_ahead(collector, model, loader, 8 // processes, 32, seed=0)
    assert len(calls) == passes and {store.seen for store in collector.stores.values()} == {48}


@pytest.mark.parametrize("count", [32, 37])
def test_any_number_of_processes_reads_the_same_rows(monkeypatch, count):
    loader = DataLoader(DATA, collate_fn=lambda batch: [int(row["input_ids"].sum()) for row in batch])

    def read(processes: int, batch_size: int) -> list[int]:
        monkeypatch.setattr(ahead, "world_size", lambda: processes)
        each = []
        for number in range(processes):
            monkeypatch.setattr(ahead, "rank", lambda number=number: number)
            each.append(list(ahead._batches(loader, batch_size, count, seed=3)))
        assert len({len(batches) for batches in each}) == 1, "forward passes wait for each other"
        return [row for batches in zip(*each, strict=True) for batch in batches for row in batch]

    one = read(1, 8)
    assert len(one) == len(set(one)) == count
    assert read(2, 4) == one[: len(read(2, 4))] and len(read(2, 4)) >= count - 1


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7, "data": DATA}
    whole = train(tmp_path / "whole", callback(), model=evidence_model(), **saving)
    place = tmp_path / "again" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", place)
    again = train(tmp_path / "again", callback(), model=evidence_model(), resume=str(place), **saving)
    assert history(again) == history(whole)
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def stream():
    return Dataset.from_list(DATA).with_format("torch").to_iterable_dataset()


@pytest.mark.parametrize(
    ("flags", "changes", "data"),
    [
        ({"cse_routing": "discriminant"}, {}, DATA),
        ({"cse_routing": "evidence"}, {"layer_budget": 1}, DATA),
        ({"cse_routing": "evidence"}, {}, None),
    ],
)
def test_where_states_are_needed_or_data_are_a_stream_it_is_refused(tmp_path, flags, changes, data):
    trainer = make_trainer(tmp_path, callback(**changes), model=tiny_model("gpt2", **flags), data=data or stream())
    with pytest.raises(ValueError, match="warmup=0 is not allowed for a model without clusters.*no layer_budget"):
        trainer.train()
