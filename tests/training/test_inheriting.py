# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises about a domain that falls into two clusters: the half that gets an expert of its own loses nothing."""

import numpy as np
import pytest
import torch
from test_moments import stepped
from tiny import routed_module, tiny_model
from tiny_runs import two_topics

from modeling_cse.clustering import ClusterSettings, RoutingFeatures
from modeling_cse.clustering.fitting import write_fit
from modeling_cse.clustering.joint import parents_of
from modeling_cse.clustering.ownership import Identities, Ownership
from modeling_cse.dispatch_cse import Site
from modeling_cse.training.fitting import fit_layers
from modeling_cse.training.memory import ClusterMemory
from modeling_cse.training.moments import start_moments


SITE = Site(1, "ffn")
NO_IDENTITIES = Identities.none(1)


def owning(*experts: int, filled: list[int]) -> Ownership:
    return Ownership(np.array(experts), filled, 0, NO_IDENTITIES, [], [])


@pytest.mark.parametrize(
    ("then", "parents"),
    [
        ([-1, -1, 0, 0, 0, 0], {1: 0}),
        ([-1, -1, 0, 0, 0, -1], {1: 0}),
        ([-1, -1, 0, 0, -1, 2], {}),  # half of them is not most of them
        ([-1, -1, -1, -1, -1, -1], {}),
        ([0, 0, -1, -1, -1, 0], {}),
    ],
)
def test_a_parent_has_served_most_of_the_texts(then, parents):
    labels = np.array([0, 0, 1, 1, 1, 1])
    lengths = np.full(6, 20)
    assert parents_of(owning(-1, 1, filled=[1]), labels, np.array(then), lengths) == parents
    assert parents_of(owning(-1, 1, filled=[]), labels, np.array(then), lengths) == {}


def test_long_texts_count_for_more():
    labels, then = np.array([0, 1, 1, 1, 1]), np.array([-1, -1, -1, -1, 0])
    assert parents_of(owning(-1, 1, filled=[1]), labels, then, np.array([20, 5, 5, 5, 20])) == {1: 0}
    assert parents_of(owning(-1, 1, filled=[1]), labels, then, np.array([20, 5, 5, 10, 20])) == {}


def test_texts_without_a_cluster_make_no_parent():
    labels, then = np.array([0, 1, -1, -1, -1]), np.array([-1, -1, 0, 0, 0])
    assert parents_of(owning(-1, 1, filled=[1]), labels, then, np.full(5, 20)) == {}


def features(ids: torch.Tensor) -> RoutingFeatures:
    tokens = torch.randn(len(ids), 8, 32, generator=torch.Generator().manual_seed(0))
    return RoutingFeatures(tokens.mean(1), tokens, torch.arange(8).expand(len(ids), 8), ids=ids)


def fit(model, memory: ClusterMemory, clusters: int, ids: torch.Tensor):
    settings, sampled = ClusterSettings("text", clusters, common_share=0.4), features(ids)
    sample = {site: sampled.without_ids() for site in model.transformer.routed_modules()}
    return fit_layers(model, sample, settings, memory, texts=sampled.without_states())


@pytest.mark.parametrize("combine", ["add", "replace"])
def test_the_half_that_splits_off_begins_as_a_copy(combine):
    """No logit changes by it where the gate is hard."""
    model = tiny_model("gpt2", cse_routing="evidence", cse_combine=combine, cse_gate="hard")
    memory, ids = ClusterMemory(), torch.stack([row["input_ids"] for row in two_topics()]).int()
    metrics, filled = fit(model, memory, 2, ids)
    assert filled[SITE] == {0: None} and metrics["cse/layer_1/ffn/inherited"] == 0
    experts = routed_module(model, 1).experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter[0].normal_(generator=torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in experts.named_parameters()}
    logits = model.eval()(ids.long()).logits
    metrics, filled = fit(model, memory, 3, ids)
    assert filled[SITE] == {1: 0} and metrics["cse/layer_1/ffn/inherited"] == 1
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter[0], before[name][0]) and torch.equal(parameter[1], before[name][0]), name
        assert torch.equal(parameter[2:], before[name][2:]), name
    assert routed_module(model, 1).router.cluster_expert[:3].sort().values.tolist() == [-1, 0, 1]
    assert torch.equal(model(ids.long()).logits, logits)


def test_slots_that_change_hands_among_each_other_are_read_before_they_are_written():
    """Two owners are gone, and their slots go to clusters that the other one has served."""
    model = tiny_model("gpt2", cse_routing="evidence", cse_combine="add")
    module = routed_module(model, 1)
    with torch.no_grad():
        for parameter in module.experts.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: parameter.detach().clone() for name, parameter in module.experts.named_parameters()}

    class Fit:
        ownership = owning(-1, 1, 0, filled=[0, 1])

        def router_state(self):
            return module.router.empty_state()

    Fit.ownership.parents = {0: 1, 1: 0}
    write_fit(module, Fit(), ClusterSettings("text", 3), 0, SITE)
    for name, parameter in module.experts.named_parameters():
        assert torch.equal(parameter[[0, 1]], before[name][[1, 0]]), name


def test_copies_of_an_expert_take_over_its_moments():
    model = tiny_model("gpt2", cse_combine="add")
    optimizer, routed = stepped(model), routed_module(model, 2)
    start_moments(optimizer, routed, {0: None, 1: None})
    states = [optimizer.state[parameter] for parameter in routed.experts.parameters()]
    for state in states:
        for name in ("exp_avg", "exp_avg_sq"):
            state[name][0].uniform_(generator=torch.Generator().manual_seed(2))
    before = [{name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")} for state in states]
    start_moments(optimizer, routed, {0: 1, 2: 0, 3: None})
    for state, then in zip(states, before, strict=True):
        for name, values in then.items():
            assert torch.equal(state[name][[0, 1, 2]], values[[1, 1, 0]])
            assert torch.equal(state[name][3], values[1]), "as one that begins from the base"
