# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the tensor- and expert-parallel plans, in two processes: the model of one, spread, and nothing else."""

import os
import re
from pathlib import Path

import pytest
import torch
from parallel_plans import CASES
from safetensors.torch import load_file
from tiny import tiny_model, token_ids
from tiny_runs import settings
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.distributed import DistributedConfig
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from benchmarks.ranks import launch
from modeling_cse import ClusterExpertsCallback
from modeling_cse.experts_cse import CSEExperts
from modeling_cse.training import fit_experts


TESTS = Path(__file__).resolve().parents[1]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
FFN_EXPERTS = ".mlp.experts."

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
        launch(2, [str(TESTS / "distributed" / "parallel_plans.py"), str(folder)], timeout=120)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [torch.load(folder / f"rank-{number}.pt") for number in (0, 1)]


@slow
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_one_process(ranks, name):
    case = CASES[name]
    for number, outcome in enumerate(ranks):
        expected = case.answer(case.model(), number)
        assert torch.allclose(outcome[name]["logits"], expected["logits"], **TOLERANCE)
        assert outcome[name]["gradients"].keys() == expected["gradients"].keys()
        assert bool(expected["gradients"]) == case.trained
        for parameter, gradient in expected["gradients"].items():
            assert torch.allclose(outcome[name]["gradients"][parameter], gradient, **TOLERANCE), parameter


@slow
@pytest.mark.parametrize("name", CASES)
def test_each_process_holds_its_half(ranks, name):
    """Every tensor of FFN experts under expert parallelism, other parameters under a tensor-parallel plan."""
    case = CASES[name]
    sizes = {parameter: tensor.numel() for parameter, tensor in case.model().named_parameters()}
    held = [outcome[name]["held"] for outcome in ranks]
    assert all(held[0][parameter] + held[1][parameter] >= sizes[parameter] for parameter in held[0])
    of_experts = {parameter for parameter in sizes if FFN_EXPERTS in parameter}
    if case.sizes.get("ep_size"):
        assert all(2 * half[parameter] == sizes[parameter] for half in held for parameter in of_experts)
    if case.sizes.get("tp_size"):
        others = held[0].keys() - of_experts
        of_bert = 12 if "attention" in case.flags.get("cse_modules", ()) else 36
        assert len(others) == {"gpt2": 1, "bert": of_bert}[case.family]
        assert all(half[other] < sizes[other] for half in held for other in others if other.endswith("weight"))


@slow
def test_a_text_grows_as_in_one_process(ranks):
    """Token by token: the way of the single token must not be taken where its expert may be elsewhere."""
    model = CASES["gpt2-expert-replace"].model()
    expected = model.generate(token_ids(1, 8), max_new_tokens=8, do_sample=False)
    assert all(torch.equal(outcome["generated"], expected) for outcome in ranks)


@slow
def test_it_is_saved_whole(ranks, folder):
    before, after = (load_file(folder / "saved" / part / "model.safetensors") for part in ("", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@slow
@pytest.mark.parametrize(
    "what, says",
    [
        ("callback", "ep_size=2 is not allowed where clusters are fitted"),
        ("tensor", "tp_size=2 is not allowed where clusters are fitted"),
        ("expert", "ep_size=2 is not allowed where clusters are fitted"),
        ("heads", "tp_size=2 is not allowed: it must divide num_attention_heads=1"),
        ("slots", "Cannot evenly shard 3 experts across 2"),
        ("pipeline", "pp_size=2 is not allowed"),
    ],
)
def test_what_cannot_be_is_refused(ranks, what, says):
    for outcome in ranks:
        assert says in str(outcome["refusals"][what])


@slow
def test_the_block_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    page = (TESTS.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    before = tiny_model("gpt2")
    before.save_pretrained(tmp_path / "model")
    says = "\nassert model.transformer.h[-1].mlp.experts.up_proj.to_local().shape[0] == 2  # of four slots\n"
    (tmp_path / "program.py").write_text(block.replace('"runs/mine/cse"', repr(str(tmp_path / "model"))) + says)
    assert before.config.cse_num_experts == 4
    launch(2, [str(tmp_path / "program.py")], timeout=120)


def test_every_rule_names_something(family):
    model = tiny_model(family)
    names = {replace_layer_number_by_wildcard(name) for name, _ in (*model.named_modules(), *model.named_parameters())}
    assert model.tp_plan.keys() | model.ep_plan.keys() <= names
    assert {name.rpartition(".")[2] for name in model.ep_plan} == {*CSEExperts.WEIGHTS, "experts"}


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}])
def test_clusters_are_not_fitted_under_a_plan(tmp_path, sizes):
    model = tiny_model("gpt2")
    model.config.distributed_config = DistributedConfig(**sizes)
    with pytest.raises(ValueError, match="_size=2 is not allowed where clusters are fitted"):
        fit_experts(model, [{"input_ids": token_ids()}])
    with pytest.raises(ValueError, match="_size=2 is not allowed where clusters are fitted"):
        callback, arguments = ClusterExpertsCallback(**settings()), TrainingArguments(tmp_path, max_steps=10)
        callback.on_train_begin(arguments, TrainerState(max_steps=10), TrainerControl(), model=model)
