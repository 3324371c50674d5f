# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""bitsandbytes and torchao: what they quantise is routed as before, what they pass over is said, and no expert starts
from codes."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import EVIDENCE, activate, dense_model, expert_ids, routed_module, routed_modules, tiny_model, token_ids
from tiny_runs import settings, train
from torch import nn
from transformers import AutoModelForMaskedLM, BitsAndBytesConfig, TorchAoConfig
from transformers.utils import logging

from modeling_cse import ClusterExpertsCallback, fit_experts, from_dense
from modeling_cse.dispatch_cse import RoutedProjection, is_quantized
from modeling_cse.routing_cse import ClusterRouter


bitsandbytes = pytest.importorskip("bitsandbytes")
torchao = pytest.importorskip("torchao.quantization")

WIDE = {"gpt2": {"n_embd": 64, "n_head": 4}, "bert": {"hidden_size": 64, "intermediate_size": 128}}
CONFIGS: dict[str, Callable] = {
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao dynamic": lambda: TorchAoConfig(torchao.Int8DynamicActivationInt8WeightConfig()),
}
# torchao knows no Conv1D, of which GPT-2 is made: nothing of it would be quantised.
WORK = [(family, how) for family in ("gpt2", "bert") for how in CONFIGS if family == "bert" or "torchao" not in how]


def both_parts(family: str, **flags):
    return activate(tiny_model(family, cse_modules=["attention", "ffn"], **WIDE[family], **flags), noise=0.5)


def quantized(family: str, how: str, folder, model=None):
    model = both_parts(family) if model is None else model
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, quantization_config=CONFIGS[how]())


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """What the codes of a linear layer stand for, in its layout."""
    weight = getattr(module, "weight", None)
    if isinstance(module, bitsandbytes.nn.Linear8bitLt):
        return weight.data.float() * weight.SCB.view(-1, 1) / 127
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize() if isinstance(weight, torch.Tensor) and is_quantized(weight) else None


@torch.no_grad()
def with_weights_of(model, other):
    """The plain model with what the quantised weights of the other stand for."""
    reference, modules = copy.deepcopy(model), dict(other.named_modules())
    for name, module in reference.named_modules():
        weight = plain_weight(modules[name])
        if weight is not None:
            module.weight.copy_(weight if weight.shape == module.weight.shape and "c_proj" not in name else weight.T)
    return reference


@pytest.mark.parametrize(("family", "how"), WORK)
@pytest.mark.parametrize("flags", [{"cse_routing": "given"}, EVIDENCE], ids=["given", "evidence"])
def test_experts_answer_on_a_quantised_base(family, how, flags, tmp_path):
    """Logits are those of a plain model with the weights that the codes stand for, but for the rounding of what enters
    (int8, dynamic). Clusters are given, or read from the text: those of a token's state may change with that."""
    model, batch = both_parts(family, **flags), {"input_ids": token_ids()}
    batch |= {"given_clusters": torch.tensor([1, 2, 4, 0])} if flags["cse_routing"] == "given" else {}
    other = quantized(family, how, tmp_path / "plain", model)
    reference = with_weights_of(model, other)
    assert sum(map(is_quantized, other.parameters())) >= 8
    other.save_pretrained(tmp_path / "quantized")  # before a forward pass, in which bitsandbytes packs 4 bits anew
    with torch.no_grad():
        logits = other(**batch).logits
        error = (logits - reference(**batch).logits).norm() / logits.norm()
        base = reference(**{**batch, "given_clusters": torch.full((4,), -1)}).logits
        without = (logits - base).norm() / logits.norm()
        assert error < 0.12 and without > (0.5 if model.config.cse_combine == "add" else 1.0)
        again = type(model).from_pretrained(tmp_path / "quantized")
        torch.testing.assert_close(again(**batch).logits, logits, atol=1e-5, rtol=1e-5)
    for name, buffer in model.named_buffers():
        assert torch.equal(again.get_buffer(name), buffer) and again.get_buffer(name).dtype == buffer.dtype


@pytest.mark.parametrize("how", CONFIGS)
def test_loading_says_what_is_not_quantised(family, how, tmp_path, caplog):
    model = both_parts(family)
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        other = quantized(family, how, tmp_path, model)
    logging.disable_propagation()
    inside = sum(p.numel() for module in routed_modules(model).values() for p in module.experts.parameters())
    (said,) = [record.message for record in caplog.records if "not quantised" in record.message]
    assert f"{inside:,} weights of theirs, {inside / model.num_parameters():.0%} of the model" in said
    if (family, how) not in WORK:
        assert "it is 100%" in said and not any(map(is_quantized, other.parameters()))


@pytest.mark.parametrize("part", [r"experts\.up_proj", r"experts\.out_proj", r"router\.centroids"])
def test_torchao_is_refused_for_experts_and_routers(part, tmp_path):
    both_parts("bert").save_pretrained(tmp_path)
    config = TorchAoConfig(torchao.FqnToConfig({f"re:.*{part}": torchao.Int8WeightOnlyConfig()}))
    with pytest.raises(ValueError, match=f"quantises .*{part}, which is not allowed"):
        AutoModelForMaskedLM.from_pretrained(tmp_path, quantization_config=config)


def test_torchao_in_place_keeps_the_routes():
    model, ids = both_parts("bert", cse_routing="discriminant"), token_ids()
    routes = expert_ids(model, model(ids, output_cluster_ids=True).cluster_ids)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert sum(isinstance(module, RoutedProjection) for module in model.modules()) == 8
    assert all(is_quantized(m.weight) for m in model.modules() if isinstance(m, RoutedProjection))
    assert not any(is_quantized(b) for m in model.modules() if isinstance(m, ClusterRouter) for b in (m.centroids,))
    with torch.no_grad():
        found = expert_ids(model, model(ids, output_cluster_ids=True).cluster_ids)
    assert (found == routes).float().mean() > 0.9 and (found >= 0).any()


def test_what_replaces_a_projection_behind_our_back_is_refused(family):
    """A projection that knows of no experts would answer for all tokens, and nobody would notice."""
    model = both_parts(family)
    attention = routed_module(model, 2, "attention")
    if family == "gpt2":
        attention.c_proj = nn.Linear(64, 64)
    else:
        attention.self.key = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="in the place of a projection that sends tokens"):
        model(token_ids())


def test_what_replaces_a_projection_by_set_submodule_is_routed(family):
    model, plain = both_parts(family), both_parts(family)
    for name, module in plain.named_modules():
        if isinstance(module, RoutedProjection):
            weight = module.weight if family == "bert" else module.weight.T
            linear = nn.Linear(*reversed(weight.shape))
            linear.weight, linear.bias = nn.Parameter(weight.detach().clone()), module.bias
            model.set_submodule(name, linear)
    with torch.no_grad():
        torch.testing.assert_close(model(token_ids()).logits, plain(token_ids()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "how"), [("gpt2", "int8"), ("gpt2", "nf4"), ("bert", "int8"), ("bert", "torchao")])
def test_no_expert_starts_from_codes(family, how, tmp_path):
    other = quantized(family, how, tmp_path / "plain")
    with pytest.raises(ValueError, match="Fit the clusters first"):
        routed_module(other, 2, "ffn").fill_expert(0, torch.Generator())
    with pytest.raises(ValueError, match="Fit the clusters first"):
        fit_experts(other, [{"input_ids": token_ids()}], sample_size=4, num_clusters=2)


def test_the_callback_refuses_a_quantised_base_at_the_start(tmp_path):
    model = tiny_model("bert", cse_modules=["ffn"])
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="Fit the clusters first"):
        train(tmp_path, ClusterExpertsCallback(**settings()), model=model)


def test_from_dense_refuses_a_quantised_model(family, tmp_path):
    dense = dense_model(family, **WIDE[family])
    dense.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantised weights is not allowed"):
        from_dense(str(tmp_path), [{"input_ids": token_ids(1, 8)[0]}] * 8, quantization_config=CONFIGS["int8"]())
    with pytest.raises(ValueError, match="quantised weights is not allowed"):
        from_dense(
            type(dense).from_pretrained(tmp_path, quantization_config=CONFIGS["nf4"]()),
            [{"input_ids": token_ids(1, 8)[0]}] * 8,
        )
