# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the long-tail benchmark's count of operations: PyTorch's own counter says the same of a real pass."""

import json
import sys
from pathlib import Path

import pytest
import torch
from longtail_tiny import build_corpus, write_settings, write_text
from tiny import SIZES, activate, routed_modules, tiny_model, token_ids
from torch.utils.flop_counter import FlopCounterMode

from modeling_cse.evaluation.switch import SwitchGPT2Config, SwitchGPT2ForCausalLM


# the benchmark is a folder of scripts, which find each other there
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples" / "longtail_benchmark"))

import arms  # noqa: E402
import train  # noqa: E402
from cost import ReadAhead, read_ahead, run_cost, token_cost  # noqa: E402
from run_folders import Run  # noqa: E402

from modeling_cse.training import callback as callback_module  # noqa: E402


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


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cost")
    text = write_text(folder / "text")
    made = {family: build_corpus(text, folder / family, family=family) for family in ("gpt2", "bert")}
    return made | {"short": build_corpus(text, folder / "short", document_size=20)}


def trained(tmp_path, monkeypatch, corpus, name, clusters, model=None) -> tuple[Run, list[tuple[int, int]]]:
    """A finished run of 12 steps of 8 rows, and what each reading ahead took: texts, and operations by PyTorch."""
    seen = []

    def counting(collector, *arguments):
        with FlopCounterMode(display=False) as counter:
            callback_module_read_ahead(collector, *arguments)
        seen.append((min(store.seen for store in collector.stores.values()), counter.get_total_flops()))

    callback_module_read_ahead = callback_module.read_ahead
    monkeypatch.setattr(callback_module, "read_ahead", counting)
    family = corpus.mixture.family
    known, size = write_settings(tmp_path, family)
    arm = arms.read_arms(known)[name]
    arm.clusters.update(clusters)
    # PyTorch counts no operations of fused attention on a CPU
    arm.model.update({"attn_implementation": "eager", **(model or {})} if arm.kind == "cse" else {})
    folder = tmp_path / "runs" / f"{name}-0"
    train.train(arm, 0, train.Size.load(str(size)), corpus, folder)
    return Run.load(folder), seen


@pytest.mark.parametrize(("name", "warmup", "sample", "rows"), [("cse", 4, 50, 18), ("oracle", 0, 50, 50)])
def test_what_is_read_ahead_costs_what_its_passes_take(
    tmp_path, monkeypatch, corpora, family, name, warmup, sample, rows
):
    clusters = {"warmup": warmup, "sample_size": sample}
    run, seen = trained(tmp_path, monkeypatch, corpora[family], name, clusters)
    cost = run_cost(run, None, corpora[family].tokenizer)
    assert seen == [(rows, cost.read_ahead.flops)] and cost.read_ahead.rows == rows and not cost.read_ahead.at_most
    steps = 32 * 8 * (warmup * cost.per_token.dense_flops + (12 - warmup) * cost.per_token.flops)
    assert cost.flops == pytest.approx(steps + cost.read_ahead.flops)
    # a record holds the same settings, so that what it lacks can be told from them
    assert read_ahead(json.loads((run.folder / "run.json").read_text())) == cost.read_ahead


@pytest.mark.parametrize(
    ("name", "clusters", "model"),
    [
        ("dense", {}, {}),
        ("cse", {"sample_size": 32}, {}),  # the warm-up reads as many
        ("cse", {"sample_size": 50, "algorithm": "kmeans"}, {"cse_routing": "discriminant", "cse_gate": "hard"}),
        ("cse", {"sample_size": 50, "layer_budget": 1}, {"cse_layers": [0, 1]}),
    ],
)
def test_a_run_that_reads_nothing_ahead_pays_nothing_for_it(tmp_path, monkeypatch, corpora, name, clusters, model):
    run, seen = trained(tmp_path, monkeypatch, corpora["gpt2"], name, clusters, model)
    assert not seen and read_ahead(run.settings) == ReadAhead()


def test_rows_of_several_texts_are_read_until_there_are_enough(tmp_path, monkeypatch, corpora):
    clusters, model = {"warmup": 0, "sample_size": 100}, {"cse_separator_token_id": "end"}
    run, seen = trained(tmp_path, monkeypatch, corpora["short"], "cse", clusters, model)
    ((texts, flops),) = seen
    bound = read_ahead(run.settings)
    assert texts >= 100 and 0 < flops < bound.flops and bound.rows == 100 and bound.at_most


def test_a_run_without_a_number_of_steps_is_as_long_as_its_epochs(corpora):
    """128 rows in batches of 8: a warm-up of a tenth of 32 steps is 4 of them."""
    training = {"per_device_train_batch_size": 8, "num_train_epochs": 2}
    arm = {"name": "cse", "kind": "cse", "clusters": {"warmup": 0.1, "sample_size": 50}, "model": {"cse_layers": [1]}}
    size = {"family": "gpt2", "config": {"n_layer": 2, "n_embd": 32, "n_head": 2}, "training": training}
    mixture = vars(corpora["gpt2"].mixture)
    settings = {"arm": arm, "seed": 0, "size": size, "mixture": mixture, "steps": None}
    assert read_ahead(settings).rows == 50 - 4 * 8
    assert read_ahead({**settings, "steps": 10}).rows == 50 - 8
