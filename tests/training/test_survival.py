# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of long runs: nothing is held on to, no number goes bad, and the log says what became of each cluster."""

import logging

import numpy as np
import pytest
import torch
from tiny import routed_module, tiny_model

from benchmarks.long_run import EVENTS, OBJECTS, TENSOR_BYTES, TENSORS, growth, run
from modeling_cse.clustering import ClusterSettings, RoutingFeatures
from modeling_cse.dispatch_cse import Site
from modeling_cse.training.fitting import fit_layers
from modeling_cse.training.memory import ClusterMemory


SITE = Site(1, "ffn")
# Where domains lie; A is the largest.
PLACES = np.random.default_rng(0).normal(size=(4, 32)) * 4


class Life:
    """A router through fits of samples with given numbers of sequences of domains A to D."""

    def __init__(self, patience: int = 3, experts: int = 4, algorithm: str = "kmeans"):
        self.model = tiny_model("gpt2", cse_num_experts=experts)
        self.memory, self.patience, self.algorithm = ClusterMemory(), patience, algorithm
        self.generator = np.random.default_rng(1)

    def fit(self, *counts: int) -> dict[str, float]:
        """Metrics of a fit; `experts` then tells the expert of each domain, None where it has no cluster."""
        domains = np.repeat(np.arange(len(counts)), counts)
        tokens = PLACES[domains][:, None] + 0.1 * self.generator.normal(size=(len(domains), 8, 32))
        tokens = torch.from_numpy(tokens).float()
        features = RoutingFeatures(tokens.mean(1), tokens, torch.arange(8).expand(len(domains), 8))
        number = len(set(domains)) if self.algorithm == "kmeans" else None
        settings = ClusterSettings(self.algorithm, number, common_share=0.4, patience=self.patience)
        metrics, self.filled = fit_layers(self.model, {SITE: features}, settings, self.memory)
        router = routed_module(self.model, 1).router
        distance = np.linalg.norm(PLACES[:, None] - router.centroids[: router.num_clusters].numpy()[None], axis=-1)
        self.experts = [
            int(router.cluster_expert[row.argmin()]) if row.min() < 1 else None for row in distance
        ]
        return {name.removeprefix("cse/layer_1/ffn/"): value for name, value in metrics.items()}


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "modeling_cse")
    return caplog


def test_a_dead_cluster_is_waited_for_and_then_loses_its_expert(log):
    life = Life()
    life.fit(50, 30, 20)
    assert sorted(life.experts[1:3]) == [0, 1] and life.experts[0] == -1 and not log.messages
    for absent in (1, 1):
        metrics = life.fit(60, 30)
        assert (metrics["absent"], metrics["released"]) == (absent, 0)
    assert [line.count("were not found; their experts are kept") for line in log.messages] == [1, 1]
    metrics = life.fit(60, 30)
    assert (metrics["absent"], metrics["released"]) == (0, 1)
    assert "in 3 fits in a row" in log.messages[-1] and log.records[-1].levelno == logging.WARNING


def test_a_domain_that_comes_back_in_time_has_its_own_expert_again():
    life = Life()
    life.fit(50, 30, 20)
    before = life.experts
    life.fit(60, 30)
    life.fit(50, 30, 20)
    assert life.experts == before and life.filled == {SITE: {}}


def test_a_late_domain_gets_a_free_expert_and_others_keep_theirs():
    life = Life()
    life.fit(50, 30, 20)
    before = life.experts[:3]
    metrics = life.fit(45, 25, 15, 15)
    assert life.experts[:3] == before and life.experts[3] == 2
    assert metrics["experts"] == 3 and metrics["unserved"] == 0 and life.filled == {SITE: {2: None}}


def test_a_late_domain_takes_the_expert_of_a_dead_one_and_the_log_says_so(log):
    life = Life(patience=1, experts=2)
    life.fit(50, 30, 20)
    slot = life.experts[2]
    metrics = life.fit(50, 30, 0, 20)
    assert life.experts[3] == slot and life.filled == {SITE: {slot: None}} and metrics["released"] == 1
    assert log.messages == [
        f"layer_1/ffn: the clusters of experts [{slot}] were absent or common in 1 fits in a row (patience) and lost "
        f"them; [{slot}] start anew for other clusters."
    ]


@pytest.mark.parametrize("algorithm", ["kmeans", "dbscan", "hdbscan"])
def test_one_giant_cluster_is_survived_and_told(log, algorithm):
    life = Life(algorithm=algorithm)
    metrics = life.fit(80)
    assert metrics["clusters"] == 1 and metrics["largest_share"] == 1 and metrics["share_routed"] == 0
    assert "all 80 sampled sequences are in one cluster" in log.messages[0]
    assert all(torch.isfinite(buffer).all() for buffer in routed_module(life.model, 1).router.buffers())
    life.algorithm = "kmeans"
    assert life.fit(50, 30)["experts"] == 1


def test_equal_sequences_are_one_cluster_with_finite_scores(log):
    life = Life()
    tokens = torch.ones(40, 8, 32)
    features = RoutingFeatures(tokens.mean(1), tokens, torch.arange(8).expand(40, 8))
    settings = ClusterSettings(num_clusters=3, common_share=0.4)
    fit_layers(life.model, {SITE: features}, settings, life.memory)
    router = routed_module(life.model, 1).router
    assert router.num_clusters == 1 and all(torch.isfinite(buffer).all() for buffer in router.buffers())
    assert "are in one cluster" in log.messages[0]
    assert life.fit(50, 30, 20)["experts"] == 2


def test_nothing_is_held_on_to_and_no_number_goes_bad(tmp_path):
    """The long run of `benchmarks.long_run`, at 300 steps with twenty fits: domains appear and vanish, and for a while
    there is but one text."""
    watch, told = run(steps=300, fit_every=15, look_every=15, folder=tmp_path, algorithm="dbscan")
    assert watch.bad == [] and watch.losses == 300 and watch.fits == 19
    looks = watch.samples[3:-1]  # every one at the same place between two fits, when the same things are alive
    assert np.ptp(looks[:, TENSORS]) <= 30  # idle slots are held aside, if there are any
    assert np.ptp(looks[:, TENSOR_BYTES]) < 0.5 * looks[:, TENSOR_BYTES].min()
    assert np.ptp(looks[len(looks) // 2 :, OBJECTS]) < 100  # where the process is young, torch still makes its own
    assert all(told[name] > 0 for name in EVENTS if name != "poor agreement")


def test_growth_is_told_from_noise():
    steps, noise = np.arange(200), np.random.default_rng(0).integers(-50, 50, 200)
    still = growth(np.stack([100 * steps, 600_000 + noise], axis=1), settled=2000)
    leak = growth(np.stack([100 * steps, 600_000 + 3 * steps + noise], axis=1), settled=2000)
    assert abs(still["slope_kib_per_1000_steps"]) < 3 * still["standard_error"]
    assert leak["slope_kib_per_1000_steps"] == pytest.approx(30, abs=3 * leak["standard_error"])
