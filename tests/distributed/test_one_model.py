# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of data-parallel training: all ranks have one model, and it is that of one process."""

import pytest
import torch

from benchmarks.ranks import different_tensors, relative_difference


TOLERANCE = 1e-5
WITH_TWO = ["measured", "plain", "clipped", "accumulated", "masked", "one_sided", "padded", "automatic"]
OF_EVIDENCE = ["by_evidence", "by_evidence_accumulated", "by_evidence_at_once", "by_evidence_counted"]
WITH_TWO += [*OF_EVIDENCE, "split"]
CASES = [(name, 2) for name in WITH_TWO] + [(name, 4) for name in ("measured", "plain", "clipped")]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name, processes", CASES + [("uneven", 2)])
def test_every_parameter_and_buffer_is_the_same_on_every_rank(outcome, name, processes):
    ranks = outcome(name, processes)
    assert not different_tensors([own["state"] for own in ranks])
    sizes = [tensor for key, tensor in ranks[0]["state"].items() if key.endswith("cluster_sizes")]
    assert sizes and all((size > 0).sum() == 3 for size in sizes)


@pytest.mark.parametrize("name, processes", CASES)
def test_losses_are_those_of_one_process(outcome, name, processes):
    one, ours = outcome(name), outcome(name, processes)[0]
    assert ours["fits"] == one["fits"] and len(ours["fits"]) == (1 if name == "clipped" else len(one["fits"]))
    assert len(ours["losses"]) == len(one["losses"]) >= 10
    assert relative_difference(ours["losses"], one["losses"]) <= TOLERANCE
    assert relative_difference(ours["grad_norms"], one["grad_norms"]) <= 10 * TOLERANCE


@pytest.mark.parametrize("name, processes", CASES)
def test_clusters_and_owners_are_those_of_one_process(outcome, name, processes):
    one, ours = outcome(name)["state"], outcome(name, processes)[0]["state"]
    assert one.keys() == ours.keys()
    for key in (key for key in one if "router." in key):
        assert torch.allclose(ours[key].double(), one[key].double(), rtol=1e-3, atol=1e-4), key
        if key.endswith(("cluster_sizes", "cluster_expert")):
            assert torch.equal(ours[key], one[key]), key


@pytest.mark.parametrize("name", OF_EVIDENCE)
def test_evidence_is_that_of_one_process_to_the_bit_at_every_fit(outcome, name):
    """It is counted over the tokens of the same texts, whoever has seen them."""
    one, ranks = outcome(name), outcome(name, 2)
    assert len(one["routers"]) == 3 and all(own["samples"][0][0] == one["samples"][0][0] for own in ranks)
    for own in ranks:
        for ours, expected in zip(own["routers"], one["routers"], strict=True):
            for key in ("evidence_router.evidence", "evidence_router.log_shares"):
                assert torch.equal(ours[key], expected[key]) and expected[key].any()
    shares = [entry.get("cse/layer_1/ffn/share_routed") for entry in one["history"]]
    assert all(0 < share < 1 for share in shares if share is not None) and len(set(shares)) > 1


def test_an_expert_is_copied_as_in_one_process(outcome):
    """Otherwise the tests above would not see it."""
    for run in (outcome("split"), *outcome("split", 2)):
        copies = [entry.get("cse/layer_1/ffn/inherited") for entry in run["history"]]
        assert [number for number in copies if number is not None] == [0, 1, 0]


def test_clipping_counts_the_gradient_of_all_ranks(outcome):
    """Clipping changed these steps: otherwise the test above would not see it."""
    assert min(outcome("clipped", 2)[0]["grad_norms"]) > 0.05


def test_the_automatic_warm_up_and_layers_are_those_of_one_process(outcome):
    one, ranks = outcome("automatic"), outcome("automatic", 2)
    assert all(own["cse_layers"] == one["cse_layers"] and len(own["cse_layers"]) == 1 for own in ranks)
    assert one["fits"][0] <= 24 and all(own["fits"] == one["fits"] for own in ranks)
    measured, expected = (
        [entry["cse/gradient_consistency"] for entry in run["history"] if "cse/gradient_consistency" in entry]
        for run in (ranks[0], one)
    )
    assert len(measured) > 3 and measured == pytest.approx(expected, rel=1e-3)


def test_evaluation_inside_training_changes_nothing(outcome):
    evaluated, plain = ([outcome(name), *outcome(name, 2)] for name in ("evaluated", "plain"))
    for with_it, without in zip(evaluated, plain, strict=True):
        assert with_it["losses"] == without["losses"] and with_it["grad_norms"] == without["grad_norms"]
        assert with_it["fits"] == without["fits"]
        assert not different_tensors([with_it["state"], without["state"]])
        assert any("eval_loss" in entry for entry in with_it["history"])
