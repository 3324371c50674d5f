# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the settings: wrong ones are refused by name, defaults follow the algorithm, a fit reads them."""

import pytest
import torch
import yaml
from tiny import routed_module, tiny_model

from modeling_cse.clustering import (
    ALGORITHMS,
    ClusterSettings,
    RoutingFeatures,
    find_clusters,
    fit_layer,
    identities_of,
)


CENTROID, DENSITY = ("kmeans", "spherical"), ("dbscan", "hdbscan")
WRONG = [
    ({"algorithm": "agglomerative"}, "algorithm='agglomerative' is not allowed", "'hdbscan'"),
    ({"algorithm": ["kmeans"]}, "algorithm=['kmeans'] is not allowed", "'kmeans'"),
    ({"num_clusters": (1, 4)}, "num_clusters=(1, 4) is not allowed", "2 <= low <= high"),
    ({"num_clusters": (5, 4)}, "num_clusters=(5, 4) is not allowed", "2 <= low <= high"),
    ({"num_clusters": (2, 3, 4)}, "num_clusters=(2, 3, 4) is not allowed", "pair"),
    ({"num_clusters": [2]}, "num_clusters=(2,) is not allowed", "pair"),
    ({"num_clusters": (2, 4.0)}, "num_clusters=(2, 4.0) is not allowed", "pair"),
    ({"num_clusters": "2-4"}, "num_clusters='2-4' is not allowed", "pair"),
    ({"common_share": "knee"}, "common_share='knee' is not allowed", "or 'elbow'"),
    ({"common_share": True}, "common_share=True is not allowed", "from 0 to 1"),
    ({"seed": 2**32}, "seed=4294967296 is not allowed", "below 2 ** 32"),
    ({"projection": 0}, "projection=0 is not allowed", "int >= 1"),
    ({"projection": 8.0}, "projection=8.0 is not allowed", "int >= 1"),
    ({"projection": True}, "projection=True is not allowed", "int >= 1"),
    ({"projection": "none"}, "projection='none' is not allowed", "'auto'"),
]


@pytest.mark.parametrize(("wrong", "complaint", "allowed"), WRONG, ids=lambda part: str(part))
def test_wrong_setting_is_refused_with_what_is_allowed(wrong, complaint, allowed):
    with pytest.raises(ValueError) as error:
        ClusterSettings(**wrong)
    assert complaint in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), "0.1", True])
def test_wrong_smallest_share_is_refused(share):
    with pytest.raises(ValueError, match="min_cluster_share=.* is not allowed: it must be from 0 to 1"):
        ClusterSettings("dbscan", None, min_cluster_share=share)


@pytest.mark.parametrize("algorithm", [*DENSITY, "given"])
def test_a_number_of_clusters_is_refused_where_nothing_reads_it(algorithm):
    for value in (6, (2, 4)):
        with pytest.raises(ValueError) as error:
            ClusterSettings(algorithm, value)
        for part in (f"num_clusters={value!r}", f"algorithm={algorithm!r}"):
            assert part in str(error.value)


@pytest.mark.parametrize("algorithm", ["given", "text"])
def test_what_is_not_found_among_embeddings_takes_no_projection(algorithm):
    with pytest.raises(ValueError, match=f"projection=8 is not allowed with algorithm='{algorithm}'"):
        ClusterSettings(algorithm, projection=8)
    with pytest.raises(ValueError, match=f"algorithm='{algorithm}' is not allowed here"):
        find_clusters(torch.rand(9, 8).numpy(), algorithm, None, 0)


@pytest.mark.parametrize("algorithm", CENTROID)
def test_an_option_that_nothing_reads_is_refused(algorithm):
    for share in (0.02, 0.0):
        with pytest.raises(ValueError, match=f"min_cluster_share={share} .* algorithm='{algorithm}'.*'dbscan'"):
            ClusterSettings(algorithm, 4, min_cluster_share=share)


def test_the_default_for_states_is_kmeans_as_it_was():
    settings = ClusterSettings().resolve("discriminant")
    assert (settings.algorithm, settings.num_clusters, settings.common_share) == ("kmeans", None, 0.7)
    assert settings.cluster_range == ClusterSettings("spherical").cluster_range == (6, 6)
    assert (settings.patience, settings.seed) == (3, 0) and settings.projected_width(768) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_defaults_follow_the_algorithm(algorithm):
    counted = algorithm in (*CENTROID, "text")
    settings = ClusterSettings(algorithm, 4 if counted else None)
    assert settings.density == (algorithm in DENSITY)
    assert settings.smallest_share == (0.02 if settings.density else None)
    assert settings.cluster_range == ((4, 4) if counted else None)
    assert settings.projected_width(768) == (32 if settings.density else None)
    assert settings.projected_width(32) is None and settings.projected_width(8) is None


def test_what_is_set_is_kept():
    settings = ClusterSettings("hdbscan", None, "elbow", projection=8, min_cluster_share=0)
    assert settings.projected_width(8) == 8 and settings.smallest_share == 0 and settings.common_share == "elbow"
    assert ClusterSettings("hdbscan", None, projection=None).projected_width(768) is None
    with pytest.raises(ValueError, match="projection=8 is not allowed for embeddings of 7 dimensions.*at most 7"):
        settings.projected_width(7)


def test_a_recipe_may_give_a_range_as_a_list():
    settings = ClusterSettings(**yaml.safe_load("{algorithm: spherical, num_clusters: [3, 8], common_share: elbow}"))
    assert settings.num_clusters == (3, 8) == settings.cluster_range


# ---- settings reach the fit -----------------------------------------------------------------------------------------


def planted(sizes: tuple[int, ...], strays: int = 0) -> RoutingFeatures:
    """Sequences about orthogonal centres, and strays far from all of them; four tokens each."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    states = 8 * torch.eye(len(sizes), 32)[labels]
    states = torch.cat([states, 20 * torch.randn(strays, 32, generator=generator)])
    states = states.unsqueeze(1) + 0.3 * torch.randn(len(states), 4, 32, generator=generator)
    return RoutingFeatures(states.mean(1), states, torch.arange(4).expand(len(states), -1))


def fitted(features: RoutingFeatures, settings: ClusterSettings, **flags):
    ffn = routed_module(tiny_model("gpt2", **flags), 1)
    return fit_layer(ffn.router, features, settings, identities_of(ffn.router), ffn.experts.num_experts)


@pytest.mark.parametrize("algorithm", DENSITY)
def test_a_fit_reports_noise_of_density_algorithms(algorithm):
    fit = fitted(planted((60, 40, 30), strays=5), ClusterSettings(algorithm, None))
    assert fit.metrics["clusters"] == 3 and 5 / 135 <= fit.metrics["noise"] < 0.1
    assert "silhouette" not in fit.metrics
    assert fitted(planted((60, 30)), ClusterSettings(algorithm, None, min_cluster_share=0.5)).metrics["noise"] > 0.3


@pytest.mark.parametrize("algorithm", CENTROID)
def test_a_fit_reports_the_silhouette_that_chose(algorithm):
    features = planted((60, 40, 30))
    fit = fitted(features, ClusterSettings(algorithm, (2, 6)))
    assert fit.metrics["clusters"] == 3 and 0.5 < fit.metrics["silhouette"] <= 1 and "noise" not in fit.metrics
    assert "silhouette" not in fitted(features, ClusterSettings(algorithm, 3)).metrics


@pytest.mark.parametrize("algorithm", DENSITY)
def test_a_fit_keeps_to_the_room_of_the_router(algorithm):
    fit = fitted(planted((60, 40, 30, 30, 20)), ClusterSettings(algorithm, None), cse_max_clusters=4)
    assert fit.metrics["clusters"] == 4 and fit.clustering.sizes.sum() == 180


def test_a_range_beyond_the_room_of_the_router_is_refused():
    with pytest.raises(ValueError, match=r"num_clusters=\(2, 5\) is more than cse_max_clusters=4"):
        fitted(planted((60, 40)), ClusterSettings("kmeans", (2, 5)), cse_max_clusters=4)


def test_a_fit_cuts_at_the_elbow():
    fit = fitted(planted((80, 70, 20, 15, 10)), ClusterSettings("kmeans", 5, "elbow"))
    owners = dict(zip(fit.clustering.sizes.tolist(), fit.ownership.experts.tolist(), strict=True))
    assert owners == {80: -1, 70: -1, 20: 0, 15: 1, 10: 2}


def test_a_fit_projects():
    features = planted((60, 40, 30))
    whole, projected, other = (
        fitted(features, ClusterSettings("kmeans", (2, 6), seed=seed, projection=width)).metrics["silhouette"]
        for seed, width in ((0, None), (0, 4), (1, 4))
    )
    assert len({whole, projected, other}) == 3


@pytest.mark.parametrize("algorithm", [*CENTROID, *DENSITY])
def test_equal_sequences_can_be_fitted(algorithm):
    features = RoutingFeatures(torch.ones(20, 32), torch.ones(20, 4, 32), torch.zeros(20, 4, dtype=torch.long))
    fit = fitted(features, ClusterSettings(algorithm, (2, 4) if algorithm in CENTROID else None))
    assert fit.metrics["clusters"] == 1
    assert all(torch.isfinite(rows.double()).all() for rows in fit.router_state().values())


# ---- labels that are given ------------------------------------------------------------------------------------------


def labelled(labels: list[int]) -> RoutingFeatures:
    features = planted((len(labels),))
    features.labels = torch.tensor(labels)
    return features


def test_given_labels_are_the_clusters_in_their_own_numbers():
    labels = [2, 0, 0, 0, 0, 1, 2, -1, 0, 0] * 4
    fit = fitted(labelled(labels), ClusterSettings("given", common_share=0.5))
    assert fit.clustering.sizes.tolist() == [24, 4, 8] and fit.ownership.experts.tolist() == [-1, 1, 0]
    features = labelled(labels)
    for label in range(3):
        mean = features.embeddings[features.labels == label].mean(0)
        torch.testing.assert_close(torch.from_numpy(fit.clustering.centroids[label]), mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("labels", "complaint"),
    [
        ([-1] * 9, "name no cluster"),
        ([0, 2] * 9, r"\[1\] are missing"),
        ([0, 4] * 9, "up to 4, but cse_max_clusters=4"),
    ],
)
def test_labels_that_cannot_be_clusters_are_refused(labels, complaint):
    with pytest.raises(ValueError, match=complaint):
        fitted(labelled(labels), ClusterSettings("given"), cse_max_clusters=4)


@pytest.mark.parametrize(
    ("routing", "algorithm", "clusters", "share"),
    [
        ("evidence", "text", (10, 10), 0.75),
        ("discriminant", "kmeans", (6, 6), 0.7),
        ("sequence", "kmeans", (6, 6), 0.7),
    ],
)
def test_defaults_follow_how_routes_are_read(routing, algorithm, clusters, share):
    found = ClusterSettings().resolve(routing)
    assert (found.algorithm, found.cluster_range, found.common_share) == (algorithm, clusters, share)
    assert found.resolve("sequence") == found.resolve("evidence") == found


def test_what_was_asked_for_stays():
    asked = ClusterSettings("text", 4, 0.6, common_by="size")
    assert asked.resolve("discriminant") == asked
    assert ClusterSettings(algorithm="text").resolve("discriminant").common_share == 0.75


def test_a_projection_is_refused_where_the_default_reads_texts():
    with pytest.raises(ValueError, match="projection=8 is not allowed with algorithm='text'"):
        ClusterSettings(projection=8).resolve("evidence")


@pytest.mark.parametrize(
    ("settings", "by"),
    [
        ({}, "separation"),
        ({"common_share": "elbow"}, "size"),
        ({"common_by": "size"}, "size"),
        ({"algorithm": "given"}, "size"),
        ({"algorithm": "kmeans"}, "size"),
    ],
)
def test_what_makes_a_cluster_common(settings, by):
    assert ClusterSettings(**settings).resolve("evidence").common_by == by


@pytest.mark.parametrize(
    "settings",
    [
        {"common_by": "shares"},
        {"algorithm": "kmeans", "common_by": "separation"},
        {"algorithm": "given", "common_by": "separation"},
        {"algorithm": "text", "common_by": "separation", "common_share": "elbow"},
    ],
)
def test_what_cannot_make_a_cluster_common_is_refused(settings):
    with pytest.raises(ValueError, match=f"common_by='{settings['common_by']}' is not allowed"):
        ClusterSettings(**settings)


def test_separation_is_refused_where_the_default_reads_states():
    with pytest.raises(ValueError, match="common_by='separation' is not allowed with algorithm='kmeans'"):
        ClusterSettings(common_by="separation").resolve("discriminant")
