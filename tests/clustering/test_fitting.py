# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a fit: settings are checked, a layer is described before it is written, and writing is repeatable."""

import numpy as np
import pytest
import torch
from tiny import routed_module, tiny_model

from modeling_cse.clustering import ClusterSettings, Identities, RoutingFeatures, fit_layer, identities_of, write_fit
from modeling_cse.dispatch_cse import Site


WRONG = [
    ("algorithm", "spectral", "kmeans"),
    ("num_clusters", 0, "int >= 1"),
    ("num_clusters", 2.0, "int >= 1"),
    ("num_clusters", True, "int >= 1"),
    ("patience", 0, "int >= 1"),
    ("seed", -1, "int >= 0"),
    ("seed", "0", "int >= 0"),
    ("common_share", -0.1, "from 0 to 1"),
    ("common_share", 1.1, "from 0 to 1"),
    ("common_share", float("nan"), "from 0 to 1"),
    ("common_share", "0.7", "from 0 to 1"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG, ids=lambda part: repr(part))
def test_wrong_setting_is_refused_by_name(name, value, allowed):
    with pytest.raises(ValueError) as error:
        ClusterSettings(**{name: value})
    for part in (name, repr(value), allowed):
        assert part in str(error.value)


def planted(sizes=(60, 25, 15), tokens: int = 6, seed: int = 0) -> tuple[RoutingFeatures, torch.Tensor]:
    """Sequences about orthogonal centres, their tokens about theirs; labels too, shuffled alike."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = 4 * torch.eye(len(sizes), 32)[labels]
    states = centres.unsqueeze(1) + 0.5 * torch.randn(len(labels), tokens, 32, generator=generator)
    return RoutingFeatures(states.mean(1), states, torch.arange(tokens).expand(len(labels), -1)), labels


SITE = Site(1, "ffn")


def fitted(ffn, features, settings, identities=None):
    identities = identities_of(ffn.router) if identities is None else identities
    return fit_layer(ffn.router, features, settings, identities, ffn.experts.num_experts)


def test_a_fit_writes_nothing_and_then_everything(family, routing):
    ffn = routed_module(tiny_model(family, cse_routing=routing), 1)
    (features, labels), settings = planted(), ClusterSettings(num_clusters=3, common_share=0.5)
    before = {name: value.clone() for name, value in ffn.state_dict().items()}
    fit = fitted(ffn, features, settings)
    assert all(torch.equal(value, before[name]) for name, value in ffn.state_dict().items())
    write_fit(ffn, fit, settings, 0, SITE)
    router = ffn.router
    assert router.num_clusters == 3 and sorted(router.cluster_sizes[:3].tolist()) == [15, 25, 60]
    assert sorted(router.cluster_expert[:3].tolist()) == [-1, 0, 1]
    assert router.cluster_expert[router.cluster_sizes.argmax()] == -1
    states = features.embeddings.unsqueeze(1) if routing == "sequence" else features.tokens
    clusters = router(states)[1]
    for label in range(3):
        values, counts = clusters[labels == label].unique(return_counts=True)
        assert counts.max() > 0.95 * counts.sum()


def test_metrics_tell_what_happened(family, routing):
    ffn = routed_module(tiny_model(family, cse_routing=routing), 1)
    (features, _), settings = planted(), ClusterSettings(num_clusters=3, common_share=0.5)
    fit = fitted(ffn, features, settings)
    by_position = {"agreement_0_8"}  # where the planted tokens stand
    assert set(fit.metrics) - by_position == {
        *("clusters", "experts", "clarity", "unserved", "agreement", "share_routed"),
        *("absent", "released", "largest_share"),
    }
    assert by_position <= set(fit.metrics)
    assert fit.metrics["clusters"] == 3 and fit.metrics["experts"] == 2 and fit.metrics["unserved"] == 0
    assert fit.metrics["largest_share"] == pytest.approx(0.6)
    assert fit.metrics["share_routed"] == pytest.approx(0.4) and fit.metrics["agreement"] > 0.95
    write_fit(ffn, fit, settings, 0, SITE)
    again = fitted(ffn, features, settings)
    assert again.metrics["churn"] == 0 and again.ownership.filled == []
    ffn.router.cluster_expert[:3] = -1
    assert fitted(ffn, features, settings).metrics["churn"] == pytest.approx(0.4)


def test_filled_experts_depend_on_seed_fit_and_site_alone():
    drawn = {}
    sites = ((1, "ffn"), (1, "ffn"), (1, "ffn"), (1, "ffn"), (2, "ffn"), (1, "attention"))
    for key in zip((0, 0, 1, 0, 0, 0), (0, 0, 0, 1, 0, 0), sites, strict=True):
        seed, number, (layer, module) = key
        ffn = routed_module(tiny_model("gpt2", cse_combine="add"), 1)
        settings = ClusterSettings(num_clusters=3, common_share=0.5, seed=seed)
        torch.manual_seed(len(drawn))
        write_fit(ffn, fitted(ffn, planted()[0], settings), settings, number, Site(layer, module))
        weights = ffn.experts.up_proj[:2].clone()
        assert torch.equal(drawn.setdefault(key, weights), weights)
    assert len({tuple(weights.flatten().tolist()) for weights in drawn.values()}) == 5


def test_only_slots_that_changed_hands_are_filled(combine):
    ffn = routed_module(tiny_model("gpt2", cse_combine=combine), 1)
    (features, _), settings = planted(), ClusterSettings(num_clusters=3, common_share=0.5)
    write_fit(ffn, fitted(ffn, features, settings), settings, 0, SITE)
    with torch.no_grad():
        for parameter in ffn.experts.parameters():
            parameter += 1
    before = {name: value.clone() for name, value in ffn.experts.state_dict().items()}
    write_fit(ffn, fitted(ffn, features, settings), settings, 1, SITE)
    assert all(torch.equal(value, before[name]) for name, value in ffn.experts.state_dict().items())


def test_more_clusters_than_the_router_holds_are_refused():
    ffn = routed_module(tiny_model("gpt2", cse_max_clusters=4), 1)
    with pytest.raises(ValueError, match="num_clusters=5 is more than cse_max_clusters=4"):
        fitted(ffn, planted()[0], ClusterSettings(num_clusters=5))


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_a_handful_of_sequences_can_be_fitted(sequences):
    """Also where every member of a cluster would be held out."""
    features = planted()[0][:sequences]
    ffn = routed_module(tiny_model("gpt2"), 1)
    fit = fitted(ffn, features, ClusterSettings(num_clusters=sequences))
    assert all(torch.isfinite(rows.double()).all() for rows in fit.router_state().values())


def test_equal_sequences_can_be_fitted():
    features = RoutingFeatures(torch.ones(20, 32), torch.ones(20, 4, 32), torch.zeros(20, 4, dtype=torch.long))
    fit = fitted(routed_module(tiny_model("gpt2"), 1), features, ClusterSettings(num_clusters=3))
    assert fit.metrics["clusters"] == 1
    assert all(torch.isfinite(rows.double()).all() for rows in fit.router_state().values())


def test_identities_of_a_router_are_what_it_holds():
    ffn = routed_module(tiny_model("gpt2"), 1)
    assert len(identities_of(ffn.router)) == 0
    settings = ClusterSettings(num_clusters=3, common_share=0.5)
    fit = fitted(ffn, planted()[0], settings, Identities.none(32))
    write_fit(ffn, fit, settings, 0, SITE)
    held = identities_of(ffn.router)
    np.testing.assert_array_equal(held.experts, fit.ownership.experts)
    np.testing.assert_array_equal(held.centroids, fit.clustering.centroids)
    ffn.router.centroids.zero_()
    assert held.centroids.any()


def test_router_refuses_a_state_that_is_not_whole():
    router = routed_module(tiny_model("gpt2", cse_max_clusters=4), 1).router
    with pytest.raises(ValueError, match="state has .*radii.*must have exactly"):
        router.write(radii=torch.ones(2))
    state = {name: torch.cat([rows, rows]) for name, rows in router.empty_state().items()}
    with pytest.raises(ValueError, match="8 clusters.*cse_max_clusters=4"):
        router.write(**state)
    assert router.num_clusters == 0
