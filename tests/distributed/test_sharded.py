# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of training under FSDP2, in two processes: experts start, rest and resume in parts as they do whole."""

import pytest
import torch
from tiny import tiny_model

from benchmarks.ranks import different_tensors, relative_difference


slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(
    "spread, whole",
    [
        ("sharded", "plain"),
        ("sharded_everywhere", "whole_everywhere"),
        ("sharded_at_once", "by_evidence_at_once"),
        ("sharded_split", "split"),
    ],
)
def test_it_is_the_run_with_whole_parameters(outcome, spread, whole):
    """Copies and fresh experts, their moments, idle slots: each would show in the steps after a fit."""
    ranks, expected = outcome(spread, 2), outcome(whole, 2)[0]
    assert ranks[0]["sharded"] > 40  # parameters were spread
    assert not different_tensors([own["state"] for own in ranks])
    assert ranks[0]["fits"] == expected["fits"]
    assert relative_difference(ranks[0]["losses"], expected["losses"]) <= 1e-5
    for name, tensor in expected["state"].items():
        if ".router." in name or ".experts." in name and not name.endswith("bias"):
            assert torch.allclose(ranks[0]["state"][name].double(), tensor.double(), atol=1e-4), name


@slow
def test_a_resumed_run_is_the_unbroken_one(outcome):
    for own in outcome("sharded_resumed", 2):
        assert own["resumed"]["history"] == own["whole"]["history"] and own["whole"]["fits"] == [4, 6, 8]
        assert not different_tensors([own["whole"]["state"], own["resumed"]["state"]])


@slow
def test_layers_that_were_not_chosen_stay_while_they_are_spread(outcome):
    own = outcome("sharded_automatic", 2)[0]
    assert own["cse_layers"] == "auto"
    sizes = [tensor for name, tensor in own["state"].items() if name.endswith("cluster_sizes")]
    assert [bool(size.any()) for size in sizes].count(True) == 1 and len(sizes) == 3


@pytest.mark.parametrize("layers", [[], [0, 1, 2], [-1]])
def test_a_model_names_only_classes_that_it_has(family, layers):
    """accelerate refuses to spread a model that names a class of which it has no module."""
    model = tiny_model(family, cse_layers=layers)
    present = {type(module).__name__ for module in model.modules()}
    blocks = {"gpt2": {"GPT2Block", "CSEGPT2Block"}, "bert": {"BertLayer", "CSEBertLayer"}}[family]
    assert model._no_split_modules <= present
    assert model._no_split_modules & blocks == present & blocks
