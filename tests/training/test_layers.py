# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `cse_layers="auto"` and of labels that come with the data."""

import pytest
import torch
from tiny import routed_modules, tiny_model, token_ids
from tiny_runs import rows, settings, train
from transformers import AutoModelForCausalLM

from modeling_cse import ClusterExpertsCallback, CSEGPT2ForCausalLM
from modeling_cse.dispatch_cse import Site


def clarity(trainer) -> dict[int, float]:
    """Of every candidate layer, at the first fit."""
    entry = next(entry for entry in trainer.state.log_history if "cse/seconds" in entry)
    names = {name for name in entry if name.endswith("/clarity")}
    return {layer: entry[f"cse/layer_{layer}/ffn/clarity"] for layer in range(len(names))}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("budget", [1, 2])
def test_the_clearest_layers_get_experts(tmp_path, family, budget):
    model = tiny_model(family, cse_layers="auto", **({"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}))
    assert [site.layer for site in routed_modules(model)] == [0, 1, 2, 3]
    trainer = train(tmp_path, ClusterExpertsCallback(**settings(layer_budget=budget)), model=model)
    found = clarity(trainer)
    wanted = sorted(sorted(found, key=found.get)[-budget:])
    assert model.config.cse_layers == wanted and [site.layer for site in routed_modules(model)] == wanted
    later = [entry for entry in trainer.state.log_history if "cse/seconds" in entry][1:]
    assert later and all(
        {name.split("/")[1] for name in entry if name.startswith("cse/layer")} == {f"layer_{i}" for i in wanted}
        for entry in later
    )


def test_two_layers_are_the_default_budget(tmp_path):
    model = tiny_model("gpt2", cse_layers="auto")
    train(tmp_path, ClusterExpertsCallback(**settings()), model=model)
    assert len(model.config.cse_layers) == 2


def test_other_layers_become_stock_layers_and_the_result_loads(tmp_path):
    model = tiny_model("gpt2", cse_layers="auto", cse_modules=["attention", "ffn"])
    train(tmp_path, ClusterExpertsCallback(**settings(layer_budget=1)), model=model)
    with torch.no_grad():
        logits = model.eval()(token_ids()).logits
    model.save_pretrained(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    assert [site.layer for site in routed_modules(loaded)] == model.config.cse_layers * 2
    assert sum(".experts.up_proj_bias" in name for name, _ in loaded.named_parameters()) == 1
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, logits)


def test_an_automatic_run_resumes_exactly(tmp_path):
    def run(resume=None):
        model = tiny_model("gpt2", cse_layers="auto")
        options = {"save_strategy": "steps", "save_steps": 1, "resume": resume}
        return train(tmp_path, ClusterExpertsCallback(**settings(layer_budget=1)), model=model, **options)

    whole = run()
    for step in (3, 5):
        again = run(resume=str(tmp_path / f"checkpoint-{step}"))
        assert again.model.config.cse_layers == whole.model.config.cse_layers
        ours, theirs = again.model.state_dict(), whole.model.state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in {*ours, *theirs})


def test_a_budget_chooses_among_the_layers_that_are_named(tmp_path):
    """Only they have room for experts meanwhile."""
    model = tiny_model("gpt2", n_layer=4, cse_layers=[1, -1])
    trainer = train(tmp_path, ClusterExpertsCallback(**settings(layer_budget=1)), model=model)
    entry = next(entry for entry in trainer.state.log_history if "cse/seconds" in entry)
    found = {layer: entry[f"cse/layer_{layer}/ffn/clarity"] for layer in (1, 3)}
    assert model.config.cse_layers == [max(found, key=found.get)]


# ---- labels that come with the data ---------------------------------------------------------------------------------


def labelled_rows(count: int = 64, **options) -> list[dict]:
    return [{**row, "given_clusters": (0, 0, 0, 0, 1, 1, 2, 2)[i % 8]} for i, row in enumerate(rows(count, **options))]


GIVEN = {"algorithm": "given", "update": "frozen", "num_clusters": None, "common_share": 0.4}


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_given_labels_choose_the_experts(tmp_path, family):
    """The column reaches the model although nothing but the signature of its heads names it."""
    model = tiny_model(family, cse_routing="given")
    trainer = train(tmp_path, ClusterExpertsCallback(**settings(**GIVEN)), model=model, data=labelled_rows())
    for module in routed_modules(trainer.model).values():
        experts = module.router.cluster_expert[:3].tolist()
        assert experts[0] == -1 and sorted(experts[1:]) == [0, 1]
    ids, labels = token_ids(5), torch.tensor([0, 1, 2, -1, 7])
    with torch.no_grad():
        clusters = model.eval()(ids, given_clusters=labels, output_cluster_ids=True).cluster_ids
        each = torch.stack([labels] * ids.shape[1], 1)
        same = model(ids, given_clusters=each, output_cluster_ids=True).cluster_ids
    for found, again in zip(clusters, same, strict=True):
        assert found.tolist() == [[label] * ids.shape[1] for label in (0, 1, 2, -1, -1)]
        assert torch.equal(found, again)


def test_labels_can_teach_a_causal_router(tmp_path):
    """Clusters from labels in training, routes from each token's own state: no label is needed afterwards."""
    model = tiny_model("gpt2")
    callback = ClusterExpertsCallback(**settings(**GIVEN, warmup=20))
    train(tmp_path, callback, model=model, data=labelled_rows(), max_steps=24)
    held = labelled_rows(16, seed=5)
    with torch.no_grad():
        clusters = model.eval()(torch.stack([row["input_ids"] for row in held]), output_cluster_ids=True).cluster_ids
    wanted = torch.tensor([row["given_clusters"] for row in held]).unsqueeze(1)
    assert (clusters[-1] == wanted).float().mean() > 0.9


@pytest.mark.parametrize(
    ("flags", "changes", "complaint"),
    [
        ({"cse_routing": "given"}, {}, "algorithm='kmeans' is not allowed with cse_routing='given'"),
        (
            {"cse_routing": "given"},
            {**GIVEN, "update": "recluster"},
            "update='recluster' is not allowed with cse_routing='given'",
        ),
    ],
)
def test_labels_and_settings_must_agree(tmp_path, flags, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        train(tmp_path, ClusterExpertsCallback(**settings(**changes)), model=tiny_model("gpt2", **flags))


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        (None, "given_clusters=None"),
        (torch.zeros(3, dtype=torch.long), r"given_clusters of shape \(3,\).*\(4,\) or \(4, 16\)"),
        (torch.zeros(4), "given_clusters of dtype torch.float32"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        tiny_model("gpt2", cse_routing="given")(token_ids(), given_clusters=labels)


def test_a_site_reads_what_it_writes():
    site = Site(12, "attention")
    assert str(site) == "layer_12/attention" and Site.parse(str(site)) == site
    for wrong in ("12/ffn", "layer_x/ffn", "layer_1/mlp", "layer_1"):
        with pytest.raises(ValueError, match="site="):
            Site.parse(wrong)


def test_automatic_layers_are_all_layers_until_then():
    model = CSEGPT2ForCausalLM(tiny_model("gpt2", cse_layers="auto").config)
    assert model.config.cse_layer_indices == [0, 1, 2]
