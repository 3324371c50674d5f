# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `cse_gate`: for how much an expert counts, where it is not asked, and what is refused."""

import pytest
import torch
from tiny import OWNERS, activate, routed_module, routed_modules, tiny_config, tiny_model, token_ids

from modeling_cse.configuration_cse import ROUTINGS
from modeling_cse.routing_cse import RoutingContext


FAMILIES = ("gpt2", "bert")
SOFT = {"cse_gate": "posterior", "cse_combine": "add"}
CLUSTERS = 16


def given_model(family: str, **flags):
    return activate(tiny_model(family, cse_routing="given", **{**SOFT, **flags}))


def told(chances: dict[int, float], rows: int = 1, length: int = 4) -> torch.Tensor:
    """The same probabilities for all tokens."""
    given = torch.zeros(rows, length, CLUSTERS)
    for cluster, chance in chances.items():
        given[..., cluster] = chance
    return given


@torch.no_grad()
def seen(module, states: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Base alone, and base with experts, of a module whose context is this."""
    return module.base_ffn(states), module.routed_ffn(states, RoutingContext(given_clusters=given))


OWNED = [cluster for cluster, expert in enumerate(OWNERS) if expert >= 0]
COMMON = [cluster for cluster, expert in enumerate(OWNERS) if expert < 0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("static", [False, True])
def test_an_expert_counts_for_its_probability(family, static, monkeypatch):
    if static:
        for place in ("routing_cse", "dispatch_cse", "experts_cse"):
            monkeypatch.setattr(f"modeling_cse.{place}.shapes_may_depend_on_data", lambda tensor: False)
    module = routed_module(given_model(family), 1)
    states = torch.randn(1, 4, module.router.hidden_size, generator=torch.Generator().manual_seed(0))
    base, whole = seen(module, states, told({OWNED[0]: 1.0}))
    _, half = seen(module, states, told({OWNED[0]: 0.5, COMMON[0]: 0.5}))
    _, less = seen(module, states, told({OWNED[0]: 0.3, COMMON[0]: 0.7}))
    _, none = seen(module, states, told({OWNED[0]: 0.09, COMMON[0]: 0.91}))
    assert (whole - base).abs().max() > 0.01
    torch.testing.assert_close(half - base, 0.5 * (whole - base), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(less - base, 0.3 * (whole - base), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(none, base, atol=0, rtol=0)


@torch.no_grad()
def test_the_likeliest_cluster_with_an_expert_answers():
    module = routed_module(given_model("gpt2"), 1)
    given = told({COMMON[0]: 0.6, OWNED[0]: 0.15, OWNED[1]: 0.25}, length=1)
    _, clusters, experts, weights = module.router(torch.zeros(1, 1, 32), RoutingContext(given_clusters=given))
    assert clusters.tolist() == [[OWNED[1]]] and experts.tolist() == [[OWNERS[OWNED[1]]]]
    assert weights.item() == pytest.approx(0.25)
    given = told({COMMON[0]: 0.85, OWNED[0]: 0.09, OWNED[1]: 0.06}, length=1)
    _, clusters, experts, _ = module.router(torch.zeros(1, 1, 32), RoutingContext(given_clusters=given))
    assert clusters.tolist() == [[COMMON[0]]] and experts.tolist() == [[-1]]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_labels_count_in_full(family):
    """Controls with labels are the same under both gates."""
    ids, labels = token_ids(), torch.tensor([OWNED[0], COMMON[0], OWNED[1], -1])
    soft, hard = given_model(family), given_model(family, cse_gate="hard")
    ours, theirs = (model.base_model(ids, given_clusters=labels)[0] for model in (soft, hard))
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("modules", [["attention"], ["ffn", "attention"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_experts_count_for_as_much(family, modules):
    model, ids = given_model(family, cse_modules=modules), token_ids(1, 4)
    dense = model.base_model(ids, given_clusters=told({COMMON[0]: 1.0}))[0]
    off = [
        (model.base_model(ids, given_clusters=told({OWNED[0]: chance, COMMON[0]: 1 - chance}))[0] - dense).norm()
        for chance in (0.05, 0.2, 0.6, 1.0)
    ]
    assert off[0] == 0 and 0 < off[1] < off[2] < off[3]


@torch.no_grad()
def test_a_discriminant_gives_probabilities_too():
    model = activate(tiny_model("gpt2", **SOFT))
    ids = token_ids()
    outputs = model(ids, output_router_logits=True, output_cluster_ids=True)
    for module, logits, clusters in zip(
        routed_modules(model).values(), outputs.router_logits, outputs.cluster_ids, strict=True
    ):
        chance = logits.softmax(-1).masked_fill(module.router.cluster_expert < 0, 0).view(*ids.shape, -1)
        asked = chance.amax(-1) >= 0.1
        assert torch.equal(clusters[asked], chance.argmax(-1)[asked]) and asked.any()


def test_probabilities_pass_the_gradient_of_experts_alone():
    """Nothing of the router learns; an expert that counts for half learns half as much."""
    model = given_model("gpt2").train()
    module, grads = routed_module(model, 1), []
    states = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    for chance in (1.0, 0.5):
        module.zero_grad()
        given = told({OWNED[0]: chance, COMMON[0]: 1 - chance})
        module.routed_ffn(states, RoutingContext(given_clusters=given)).sum().backward()
        grads.append(module.experts.down_proj_bias.grad.clone())
    torch.testing.assert_close(grads[1], 0.5 * grads[0])
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"cse_gate": "soft"}, "cse_gate='soft' is not allowed"),
        ({"cse_gate": "posterior"}, "cse_gate='posterior' is not allowed with cse_combine='replace'"),
        ({**SOFT, "cse_routing": "sequence"}, "cse_routing='sequence'"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("gpt2", **flags)


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_the_default_is_posterior_where_evidence_adds(combine):
    found = {routing: tiny_config("gpt2", cse_routing=routing, cse_combine=combine).gate for routing in ROUTINGS}
    assert found == {routing: "hard" for routing in ROUTINGS} | ({"evidence": "posterior"} if combine == "add" else {})
    assert tiny_config("gpt2", cse_routing="evidence", cse_combine="add", cse_gate="hard").gate == "hard"


def test_probabilities_of_another_form_are_refused():
    ids = token_ids(1, 4)
    with pytest.raises(ValueError, match=r"given_clusters of shape \(1, 4, 3\) and floating type"):
        given_model("gpt2")(ids, given_clusters=torch.ones(1, 4, 3))
    with pytest.raises(ValueError, match="given_clusters of dtype torch.float32 is not allowed with cse_gate='hard'"):
        given_model("gpt2", cse_gate="hard")(ids, given_clusters=told({0: 1.0}))
