# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `warmup="auto"`: it ends after the peak it measured, at its cap without one, and resumes exactly."""

import logging
import math

import pytest
import torch
from tiny import activate, tiny_model
from tiny_runs import fit_steps, history, make_trainer, note_samples, settings, train

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training import callback as module
from modeling_cse.training import warmup
from modeling_cse.training.consistency import GradientConsistency


STEPS = 40


@pytest.fixture
def small(monkeypatch):
    """Windows that fit into a run of forty steps, eight sequences each: a measurement at every other step."""
    original = GradientConsistency.__init__
    monkeypatch.setattr(
        GradientConsistency, "__init__", lambda self, model, **options: original(self, model, window=64, **options)
    )
    monkeypatch.setattr(warmup, "LONGEST", 0.6)


def curve(monkeypatch, peak: int):
    """Gradient consistency as if it peaked at a step."""
    measure = GradientConsistency.measure

    def planted(self):
        measured = measure(self)
        return measured and {**measured, "gradient_consistency": 1 - abs(self.step + 1 - peak) / 20}

    monkeypatch.setattr(GradientConsistency, "measure", planted)


def run(folder, **options):
    callback = ClusterExpertsCallback(**settings(warmup="auto", recluster_every=100))
    return train(folder, callback, max_steps=STEPS, **options)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_it_measures_what_is_consistency(tmp_path, small, family):
    trainer = run(tmp_path, model=tiny_model(family))
    name = "cse/gradient_consistency"
    measured = {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
    first = fit_steps(trainer)[0]
    assert list(measured) == list(range(8, max(measured) + 1, 2)) and max(measured) <= first <= 24
    assert all(-1 <= value <= 1 for value in measured.values()) and len(set(measured.values())) > 3


def test_the_first_fit_follows_the_peak(tmp_path, small, monkeypatch):
    curve(monkeypatch, peak=10)
    # three smoothed values well below the peak: at 14, 16 and 18, known at 20; two more steps collect the sample
    assert fit_steps(run(tmp_path)) == [22]


def test_without_a_peak_it_ends_at_the_cap_and_says_so(tmp_path, small, monkeypatch, caplog):
    curve(monkeypatch, peak=100)
    with caplog.at_level(logging.WARNING):
        assert fit_steps(run(tmp_path)) == [math.ceil(0.6 * STEPS)]
    assert "no clear peak in the first 60%" in caplog.text


def test_a_sample_that_leaves_no_room_for_a_peak_is_named(tmp_path, small, caplog):
    """The curve is not to blame: 24 steps are the most, and 24 of them read the sample."""
    callback = ClusterExpertsCallback(**settings(warmup="auto", sample_size=192, recluster_every=100))
    with caplog.at_level(logging.WARNING):
        assert fit_steps(train(tmp_path, callback, max_steps=STEPS)) == [24]
    assert "sample_size=192 takes 24 steps to read" in caplog.text and "no clear peak" not in caplog.text


def test_where_no_room_is_left_the_sample_is_filled_up_with_text_that_is_read_ahead(tmp_path, small, monkeypatch):
    noted = note_samples(monkeypatch)
    callback = ClusterExpertsCallback(**settings(warmup="auto", sample_size=60, update="frozen", recluster_every=100))
    monkeypatch.setattr(warmup, "LONGEST", 0.1)
    train(tmp_path, callback, model=tiny_model("gpt2", cse_routing="evidence"), max_steps=STEPS)
    assert [len(next(iter(sample.values()))) for sample in noted] == [60], "four steps read 32"


def test_evidence_is_counted_on_the_texts_of_the_whole_warm_up(tmp_path, small, monkeypatch):
    curve(monkeypatch, peak=10)
    counted = []
    own = settings(warmup="auto", update="frozen", recluster_every=100, evidence_size=1000)
    fit = module.fit_layers
    note = lambda *args, texts, **options: counted.append(texts) or fit(*args, texts=texts, **options)  # noqa: E731
    monkeypatch.setattr(module, "fit_layers", note)
    train(tmp_path, ClusterExpertsCallback(**own), model=tiny_model("gpt2", cse_routing="evidence"), max_steps=STEPS)
    (texts,) = counted
    assert len(texts) == 22 * 8


def test_the_last_fit_may_not_lie_before_the_latest_first_one(tmp_path, small):
    callback = ClusterExpertsCallback(**settings(warmup="auto", recluster_until=23))
    with pytest.raises(ValueError, match="recluster_until=23 is not allowed with warmup='auto': .* 24, the latest"):
        train(tmp_path, callback, max_steps=STEPS)


def test_a_dense_checkpoint_behind_the_cap_is_fitted_as_soon_as_there_is_a_sample(tmp_path, small):
    make_trainer(tmp_path, max_steps=31, save_strategy="steps", save_steps=30).train()
    assert fit_steps(run(tmp_path, resume=str(tmp_path / "checkpoint-30"))) == [33]


def test_measuring_changes_nothing(tmp_path, small):
    """A run whose warm-up is as long, but was given."""
    automatic = run(tmp_path)
    first = fit_steps(automatic)[0]
    callback = ClusterExpertsCallback(**settings(warmup=first, recluster_every=100))
    given = train(tmp_path, callback, max_steps=STEPS)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (automatic, given)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("step", [5, 9, 21, 23])
def test_a_resumed_warm_up_ends_at_the_same_step(tmp_path, small, monkeypatch, step):
    """Before the window is full, while measuring, between the end and the fit, after it."""
    curve(monkeypatch, peak=10)
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    whole = run(tmp_path, **options)
    again = run(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **options)
    assert fit_steps(again) == fit_steps(whole) == [22]
    assert [e for e in history(again) if "loss" in e] == [e for e in history(whole) if "loss" in e]
    ours, theirs = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_model_with_clusters_needs_no_warm_up(tmp_path):
    with pytest.raises(ValueError, match="warmup='auto' is not allowed for a model that has clusters"):
        run(tmp_path, model=activate(tiny_model("gpt2")))
