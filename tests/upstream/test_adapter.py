# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What upstream's tests are fed is what we say: every public class, with experts that tokens really reach."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny import expert_ids, first_tensor, routed_modules

import modeling_cse
from modeling_cse.evidence_cse import EvidenceRouter
from modeling_cse.experts_cse import CSEAttentionExperts, CSEExperts
from modeling_cse.routing_cse import ClusterRouter


ADAPTER = Path(__file__).with_name("adapter.py")
CHANGED = (
    *((router, "empty_state") for router in (ClusterRouter, EvidenceRouter)),
    *((experts, "init_weights") for experts in (CSEExperts, CSEAttentionExperts)),
)


def load(monkeypatch, **choices):
    """The adapter under choices of the environment; what it changes in the process is undone after the test."""
    for owner, name in CHANGED:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(sys, "path", list(sys.path))
    for table in ("PRETRAINING", "NEXT_SENTENCE_PREDICTION"):
        names = getattr(modeling_cse.modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")
        monkeypatch.setitem(names, "cse_bert", "")
    for name, value in choices.items():
        monkeypatch.setenv(f"CSE_UPSTREAM_{name}", value)
    spec = importlib.util.spec_from_file_location("upstream_adapter", ADAPTER)
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    return adapter


def classes(family) -> list:
    return [*family["classes"].values(), *family.get("extra_classes", [])]


@pytest.mark.parametrize("routing", ["discriminant", "sequence", "evidence"])
def test_every_public_class_is_there(monkeypatch, routing):
    adapter = load(monkeypatch, ROUTING=routing)
    public = {getattr(modeling_cse, name) for name in modeling_cse.__all__ if name.startswith(("CSEGPT2", "CSEBert"))}
    heads = {each for each in public if issubclass(each, torch.nn.Module)}
    given = {each for family in adapter.FAMILIES for each in classes(family)}
    assert heads <= given and {each.__name__ for each in given - heads} <= {"CSEBertLMHeadModel"}
    assert ("causal_lm" in adapter.BERT["classes"]) == (routing == "discriminant")


@pytest.mark.parametrize("modules", ["ffn", "attention", "both"])
@pytest.mark.parametrize("routing", ["discriminant", "sequence", "evidence"])
@pytest.mark.parametrize("combine", ["replace", "add"])
def test_experts_are_reached_and_matter_from_construction_on(monkeypatch, routing, combine, modules):
    adapter = load(monkeypatch, ROUTING=routing, COMBINE=combine, MODULES=modules)
    for family in adapter.FAMILIES:
        seen = set()
        for model_class in classes(family):
            torch.manual_seed(0)
            model = model_class(family["config_class"](**family["config_kwargs"])).eval()
            flags = (model.config.cse_routing, model.config.cse_combine, model.config.cse_modules)
            assert flags == (routing, combine, ["attention", "ffn"] if modules == "both" else [modules])
            # of the sizes and kinds of upstream's batches
            batch = {"input_ids": torch.randint(0, 99, (13, 7)), "token_type_ids": torch.randint(0, 16, (13, 7))}
            if "MultipleChoice" in model_class.__name__:
                batch = {name: tensor.unsqueeze(1) for name, tensor in batch.items()}
            with torch.no_grad():
                outputs = model(**batch, output_cluster_ids=True)
                experts = expert_ids(model, outputs.cluster_ids)
                state = {name: buffer.clone() for name, buffer in model.named_buffers() if "router." in name}
                model.init_weights()
                assert any("evidence_router." in name for name in state) == (routing == "evidence")
                assert all(torch.equal(buffer, dict(model.named_buffers())[name]) for name, buffer in state.items())
                for module in routed_modules(model).values():
                    module.router.cluster_expert.fill_(-1)
                dense = model(**batch)
            for site in experts:
                # thirteen whole texts of random tokens are alike: in one draw of weights all may take one way; and a
                # posterior nearly always has an expert at 0.1
                kinds = set(site.unique().tolist())
                assert kinds - {-1} and (routing != "discriminant" or (len(kinds) >= 3 and -1 in kinds)), model_class
                seen |= kinds
            # most of upstream's comparisons in fp32 allow 1e-5
            assert (first_tensor(outputs) - first_tensor(dense)).abs().max() > 5e-5, model_class
        assert (-1 in seen or routing == "evidence") and len(seen) >= 3


@pytest.mark.parametrize("name", ["ROUTING", "COMBINE", "MODULES"])
def test_an_unknown_choice_is_refused(monkeypatch, name):
    with pytest.raises(ValueError, match=f"CSE_UPSTREAM_{name}='given' is not allowed"):
        load(monkeypatch, **{name: "given"})


def test_nothing_of_it_stays_in_this_process():
    assert not ClusterRouter.empty_state(ClusterRouter(modeling_cse.CSEGPT2Config(n_embd=32)))["cluster_sizes"].any()
    assert not EvidenceRouter(modeling_cse.CSEGPT2Config(n_embd=32)).evidence.any()
    assert "upstream_adapter" not in sys.modules
