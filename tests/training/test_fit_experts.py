# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of fit_experts: it finds the planted domains, changes no logit, and leaves no other trace."""

import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score
from tiny import dense_model, routed_module, routed_modules, tiny_model

from modeling_cse import fit_experts


def domains(each: int = 40, length: int = 24, seed: int = 0) -> tuple[list[dict], torch.Tensor]:
    """Batches of eight rows from three vocabularies that share no token, padded unequally; the domain of each row."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(each)[torch.randperm(3 * each, generator=generator)]
    ids = torch.randint(0, 30, (len(labels), length), generator=generator) + 5 + 31 * labels.unsqueeze(1)
    mask = torch.ones_like(ids)
    mask[::3, -6:] = 0
    ids = ids.masked_fill(mask == 0, 0)
    batches = [
        {"input_ids": ids[i : i + 8], "attention_mask": mask[i : i + 8], "labels": ids[i : i + 8]}
        for i in range(0, len(ids), 8)
    ]
    return batches, labels


@torch.no_grad()
def knowing(model):
    """A model whose embeddings tell the three vocabularies apart, as those of a trained model do."""
    table = model.get_input_embeddings().weight
    for domain in range(3):
        table[5 + 31 * domain : 36 + 31 * domain] += 0.5 * torch.eye(32)[domain]
    return model


@torch.no_grad()
def clusters_of_rows(model, batches) -> torch.Tensor:
    """The cluster that most tokens of a row got, (layers, rows)."""
    found = []
    for batch in batches:
        ids = model(**batch, output_cluster_ids=True).cluster_ids
        mask = batch["attention_mask"].bool()
        modes = [torch.stack([row[own].mode().values for row, own in zip(layer, mask, strict=True)]) for layer in ids]
        found.append(torch.stack(modes))
    return torch.cat(found, 1)


def test_planted_domains_are_found(family, routing):
    model = knowing(tiny_model(family, cse_routing=routing))
    metrics = fit_experts(model, domains()[0], num_clusters=3, common_share=0.3)
    fresh, labels = domains(seed=1)
    for layer, clusters in zip((1, 2), clusters_of_rows(model, fresh), strict=True):
        assert adjusted_mutual_info_score(labels.numpy(), clusters.numpy()) > 0.9
        assert metrics[f"cse/layer_{layer}/ffn/clusters"] == 3
        assert metrics[f"cse/layer_{layer}/ffn/agreement"] > 0.8
        assert 0 < metrics[f"cse/layer_{layer}/ffn/share_routed"] < 1


def test_no_logit_changes(family, routing, combine):
    model, (batches, _) = tiny_model(family, cse_routing=routing, cse_combine=combine), domains()
    with torch.no_grad():
        before = model(**batches[0]).logits
        fit_experts(model, batches, num_clusters=3, common_share=0.3)
        after = model(**batches[0], output_cluster_ids=True)
    assert all((ffn.router.cluster_expert >= 0).any() for ffn in routed_modules(model).values())
    if combine == "add":
        assert torch.equal(after.logits, before)
    else:
        torch.testing.assert_close(after.logits, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
def test_mode_hooks_and_random_numbers_stay(family, training):
    model, (batches, _) = tiny_model(family).train(training), domains()
    state = torch.random.get_rng_state()
    fit_experts(model, batches, num_clusters=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropout_plays_no_part():
    flags = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    models = [tiny_model("gpt2", **flags).train(mode) for mode in (True, False)]
    for model in models:
        fit_experts(model, domains()[0], num_clusters=3)
    first, second = (routed_module(model, 2).router for model in models)
    assert torch.equal(first.centroids, second.centroids)


def test_same_seed_same_result(family):
    states = []
    for _ in range(2):
        model = tiny_model(family, cse_combine="add")
        fit_experts(model, domains()[0], num_clusters=3, common_share=0.3, seed=4)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_sample_size_bounds_what_is_read():
    read = []

    def endless():
        while True:
            read.append(1)
            yield domains()[0][0]

    fit_experts(tiny_model("gpt2"), endless(), num_clusters=2, sample_size=20)
    assert len(read) == 3


def test_embeddings_serve_as_input():
    model, (batches, _) = tiny_model("gpt2"), domains()
    twin = tiny_model("gpt2")
    fit_experts(twin, batches, num_clusters=3)
    embedded = [
        {"inputs_embeds": model.transformer.wte(b["input_ids"]).detach(), "attention_mask": b["attention_mask"]}
        for b in batches
    ]
    fit_experts(model, embedded, num_clusters=3)
    assert torch.equal(routed_module(model, 2).router.centroids, routed_module(twin, 2).router.centroids)


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batch_is_refused(batches):
    with pytest.raises(ValueError, match="no sequence reached"):
        fit_experts(tiny_model("gpt2"), batches)


def test_fewer_sequences_than_clusters_are_refused_and_nothing_is_written():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="num_clusters=9 is more than the 8 sequences"):
        fit_experts(model, domains()[0][:1], num_clusters=9)
    assert all(ffn.router.num_clusters == 0 for ffn in routed_modules(model).values())


def test_features_that_are_not_finite_write_nothing():
    """Also not into the layer before the one that diverged."""
    model = tiny_model("gpt2").train()
    with torch.no_grad():
        model.transformer.h[2].ln_2.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_experts(model, domains()[0], num_clusters=3)
    assert all(ffn.router.num_clusters == 0 for ffn in routed_modules(model).values()) and model.training


@pytest.mark.parametrize(
    ("flag", "value"), [("num_clusters", 0), ("common_share", 2), ("algorithm", "x"), ("patience", 0), ("seed", -1)]
)
def test_wrong_settings_are_refused_before_anything_runs(flag, value):
    with pytest.raises(ValueError, match=f"{flag}={value!r}"):
        fit_experts(tiny_model("gpt2"), iter(lambda: pytest.fail("a batch was read"), 0), **{flag: value})


@pytest.mark.parametrize("value", [0, -5, 2, 2.5, None])
def test_wrong_sample_size_is_refused(value):
    with pytest.raises(ValueError, match="sample_size"):
        fit_experts(tiny_model("gpt2"), domains()[0], num_clusters=3, sample_size=value)


def test_foreign_models_are_refused(family):
    with pytest.raises(ValueError, match="must be a CSE GPT-2 or CSE BERT"):
        fit_experts(dense_model(family), domains()[0])
    with pytest.raises(ValueError, match="no layer with experts: set cse_layers"):
        fit_experts(tiny_model(family, cse_layers=[]), domains()[0])
