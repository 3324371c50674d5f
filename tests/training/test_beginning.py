# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a run whose warm-up was not named: none where there are clusters, also when it is resumed, and clusters
from a whole sample do not give way to those of a few batches."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset
from tiny import tiny_model
from tiny_runs import fit_steps, history, note_samples, rows, settings, train

from modeling_cse import ClusterExpertsCallback, fit_experts


DATA = rows(length=24)


def callback(**changes) -> ClusterExpertsCallback:
    return ClusterExpertsCallback(**settings(**{"warmup": None, "recluster_every": 4, **changes}))


def stream():
    return Dataset.from_list(DATA).with_format("torch").to_iterable_dataset()


def with_clusters(routing: str):
    model = tiny_model("gpt2", cse_routing=routing)
    fit_experts(model, [{"input_ids": torch.stack([row["input_ids"] for row in DATA])}], num_clusters=3)
    return model


@pytest.mark.parametrize(
    ("model", "changes", "data", "fits"),
    [
        (lambda: tiny_model("gpt2", cse_routing="evidence"), {}, DATA, [1, 5, 9]),
        (lambda: tiny_model("gpt2", cse_routing="evidence"), {}, stream(), [1, 5, 9]),
        (lambda: tiny_model("gpt2", cse_routing="discriminant"), {}, DATA, [1, 5, 9]),
        (lambda: with_clusters("evidence"), {}, stream(), [4, 8]),
        (lambda: with_clusters("discriminant"), {}, DATA, [4, 8]),
        (lambda: with_clusters("discriminant"), {"update": "ema"}, DATA, [1]),
    ],
    ids=["evidence", "a stream", "states", "clusters", "clusters of states", "averages"],
)
def test_it_begins_at_once_where_there_are_clusters(tmp_path, model, changes, data, fits):
    own = callback(**changes)
    trainer = train(tmp_path, own, model=model(), data=data)
    assert sorted(steps_of(trainer)) == fits
    assert own.schedule.warmup == (0.1 if fits[0] == 1 else 0), "what the card of the model says"


def steps_of(trainer) -> set[int]:
    """The steps at whose end a layer was fitted, whichever was chosen."""
    return {entry["step"] for entry in trainer.state.log_history if "cse/seconds" in entry}


@pytest.mark.parametrize(
    ("model", "fits"),
    [
        (lambda: with_clusters("evidence"), {3, 6, 9}),
        (lambda: tiny_model("gpt2", cse_routing="evidence"), {1, 4, 7}),
        (lambda: tiny_model("gpt2", cse_routing="discriminant"), {1, 4, 7}),
    ],
    ids=["clusters", "evidence", "states"],
)
def test_a_resumed_run_has_fits_when_the_uninterrupted_one_has(tmp_path, model, fits):
    """All have clusters in the checkpoint, but not all had some when they began."""
    saving = {"save_strategy": "steps", "save_steps": 4, "data": DATA}
    whole = train(tmp_path / "whole", callback(recluster_every=3), model=model(), **saving)
    place = tmp_path / "again" / "checkpoint-4"
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", place)
    again = train(tmp_path / "again", callback(recluster_every=3), model=model(), resume=str(place), **saving)
    assert steps_of(whole) == fits and history(again) == history(whole)


@pytest.fixture
def samples(monkeypatch) -> list[dict]:
    """What the fits of a run look at."""
    return note_samples(monkeypatch)


def sizes(samples: list[dict]) -> list[int]:
    return [len(next(iter(sample.values()))) for sample in samples]


def test_clusters_of_texts_are_found_again_on_a_whole_sample(tmp_path, samples):
    """Training reads eight texts a step: the first of these fits would have 32 of 48."""
    train(tmp_path, callback(sample_size=48), model=with_clusters("evidence"), data=DATA)
    assert sizes(samples) == [48, 48]


@pytest.mark.parametrize(
    ("routing", "data", "sample", "fits"),
    [
        ("discriminant", DATA, 48, [8]),
        ("discriminant", DATA, 32, [4, 8]),
        ("evidence", stream(), 64, [8]),
        ("evidence", stream(), 72, []),
    ],
)
def test_what_cannot_be_read_ahead_is_waited_for(tmp_path, samples, caplog, routing, data, sample, fits):
    with caplog.at_level(logging.WARNING):
        trainer = train(tmp_path, callback(sample_size=sample), model=with_clusters(routing), data=data)
    assert fit_steps(trainer) == fits and sizes(samples) == [sample] * len(fits)
    said = f"sample_size={sample} sequences by step 4: the clusters that the model has are kept until "
    assert (said + ("step 8" if fits else "its end") in caplog.text) == (fits != [4, 8])
    assert all(each.router.num_clusters == 3 for each in trainer.model.base_model.routed_modules().values())


def test_a_resumed_run_waits_as_the_uninterrupted_one_does(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "data": DATA}
    own = {"sample_size": 48, "recluster_every": 3}
    whole = train(tmp_path / "whole", callback(**own), model=with_clusters("discriminant"), **saving)
    place = tmp_path / "again" / "checkpoint-2"
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", place)
    again = train(
        tmp_path / "again", callback(**own), model=with_clusters("discriminant"), resume=str(place), **saving
    )
    assert steps_of(whole) == {6, 9} and history(again) == history(whole)


def test_a_callback_is_used_again_for_another_model(tmp_path):
    own = callback()
    first = train(tmp_path / "a", own, model=with_clusters("discriminant"), data=DATA)
    second = train(tmp_path / "b", own, model=tiny_model("gpt2", cse_routing="discriminant"), data=DATA)
    assert fit_steps(first) == [4, 8] and fit_steps(second) == [1, 5, 9]
