# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the long-tail benchmark's count of operations: PyTorch's own counter says the same of a real pass."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import SIZES, activate, routed_modules, tiny_model, token_ids
from torch.utils.flop_counter import FlopCounterMode

from modeling_cse.evaluation.switch import SwitchGPT2Config, SwitchGPT2ForCausalLM


# the benchmark is a folder of scripts, which find each other there
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"))

from cost import token_cost  # noqa: E402


ROWS, LENGTH = 4, 16


def counted(model, **inputs) -> float:
    """Operations a token, forward and backward, of a real pass."""
    ids = token_ids(ROWS, LENGTH)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return counter.get_total_flops() / (ROWS * LENGTH)


def shares(model, **inputs) -> dict[str, float]:
    """Site to the share of tokens with an expert."""
    with torch.no_grad():
        clusters = model.base_model(token_ids(ROWS, LENGTH), output_cluster_ids=True, **inputs).cluster_ids
    return {
        str(site): float(((found >= 0) & (module.router.cluster_expert[found] >= 0)).float().mean())
        for (site, module), found in zip(routed_modules(model).items(), clusters, strict=True)
    }


@pytest.mark.parametrize("modules", [["ffn"], ["attention", "ffn"]], ids="+".join)
@pytest.mark.parametrize(("family", "routing"), [("gpt2", "discriminant"), ("gpt2", "given"), ("bert", "given")])
def test_routed_models_cost_what_a_pass_takes(family, routing, combine, modules):
    flags = {"cse_routing": routing, "cse_combine": combine, "cse_modules": modules, "attn_implementation": "eager"}
    model = activate(tiny_model(family, **flags).train(), seed=1)
    model.set_experts_implementation("eager")
    inputs = {"given_clusters": torch.arange(ROWS)} if routing == "given" else {}
    routed = shares(model, **inputs)
    assert any(0 < share < 1 for share in routed.values())
    assert token_cost(model, LENGTH, routed).flops == pytest.approx(counted(model, **inputs))


def test_a_dense_model_costs_what_a_pass_takes(family):
    model = tiny_model(family, cse_layers=[], attn_implementation="eager").train()
    cost = token_cost(model, LENGTH, {})
    assert cost.flops == cost.dense_flops == pytest.approx(counted(model))
    assert cost.total == cost.active == sum(parameter.numel() for parameter in model.parameters())


def test_switch_costs_one_expert_a_token():
    config = SwitchGPT2Config(**SIZES["gpt2"], switch_num_experts=4, attn_implementation="eager")
    model = SwitchGPT2ForCausalLM(config).train()
    model.set_experts_implementation("eager")
    cost = token_cost(model, LENGTH, {})
    assert cost.flops == pytest.approx(counted(model))
    experts = sum(p.numel() for layer in model.transformer.h[1:] for p in layer.mlp.experts.parameters())
    assert cost.total - cost.active == experts * 3 / 4


def test_active_parameters_are_the_mean_over_routes():
    """One site, half of the tokens routed: half an expert more, and with `replace` half a base less."""
    for combine in ("add", "replace"):
        model = tiny_model("gpt2", cse_layers=[1], cse_combine=combine, cse_num_experts=2)
        (module,) = routed_modules(model).values()
        expert = sum(p.numel() for p in module.experts.parameters()) / 2
        base = sum(p.numel() for name in ("c_fc", "c_proj") for p in getattr(module, name).parameters())
        cost = token_cost(model, LENGTH, {"layer_1/ffn": 0.5})
        assert cost.active == cost.total - 1.5 * expert - (0.5 * base if combine == "replace" else 0)


def test_sites_that_the_model_lacks_are_refused():
    with pytest.raises(ValueError, match="layer_7/ffn"):
        token_cost(tiny_model("gpt2", cse_layers=[]), LENGTH, {"layer_7/ffn": 0.5})
