# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises to those who watch a run in TensorBoard: the metrics of every fit are there, at its step."""

import pytest
from tiny_runs import fit_steps, settings, train

from modeling_cse import ClusterExpertsCallback


event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_cluster_metrics_are_events_at_their_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = train(tmp_path, ClusterExpertsCallback(**settings()), report_to="tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.out.tfevents.*")}
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    logged = {
        f"train/{name}": {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        for name in ("cse/layer_1/ffn/clusters", "cse/layer_2/ffn/share_routed", "cse/layer_2/ffn/clarity", "loss")
    }
    assert set(logged["train/cse/layer_1/ffn/clusters"]) == set(fit_steps(trainer)) == {4, 6, 8}
    assert set(logged["train/loss"]) == set(range(1, 11))
    for name, wanted in logged.items():
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(wanted, rel=1e-6)
