# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of moving averages: the paper's rule, whatever the order within a step."""

import numpy as np
import pytest
import torch
from tiny import router_state, tiny_config

from modeling_cse.clustering import Discriminant, move_clusters
from modeling_cse.routing_cse import ClusterRouter


DECAY = 0.9


def made(**flags) -> tuple[ClusterRouter, Discriminant]:
    """A router of three clusters, and a discriminant about the same means."""
    router = ClusterRouter(tiny_config("bert", **flags))
    state = router_state(router.config, 0, [-1, 0, 1])
    means = state["centroids"].double().numpy()
    discriminant = Discriminant(means, np.eye(32), np.array([0.5, 0.3, 0.2]))
    weight, bias = discriminant.weights()
    state |= {"discriminant_weight": torch.from_numpy(weight), "discriminant_bias": torch.from_numpy(bias)}
    router.write(**state)
    return router, discriminant


def test_equal_members_move_it_as_one_after_the_other_would():
    router, discriminant = made()
    centroid, radius = router.centroids[1].double(), float(router.radii[1])
    member = centroid + 0.1
    distance = float((member.float() - centroid).norm())
    wanted = centroid.clone()
    for _ in range(7):
        wanted = DECAY * wanted + (1 - DECAY) * member
    move_clusters(router, discriminant, member.float().expand(7, -1), DECAY)
    torch.testing.assert_close(router.centroids[1], wanted.float())
    assert float(router.radii[1]) == pytest.approx(DECAY**7 * radius + (1 - DECAY**7) * distance, rel=1e-5)


def test_order_within_a_step_does_not_matter():
    members = made()[0].centroids[:3].repeat(5, 1) + 0.2 * torch.randn(15, 32)
    found = []
    for order in (torch.arange(15), torch.arange(15).flip(0)):
        router, discriminant = made()
        move_clusters(router, discriminant, members[order], DECAY)
        found.append(router.centroids.clone())
    torch.testing.assert_close(*found)


def test_clusters_without_members_and_unused_rows_stay():
    router, discriminant = made()
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    move_clusters(router, discriminant, router.centroids[1:2] + 0.1, DECAY)
    for name, buffer in router.named_buffers():
        assert torch.isfinite(buffer.double()).all()
        rest = torch.arange(16) != 1
        assert torch.equal(buffer[rest], before[name][rest]), name
    assert not torch.equal(router.centroids[1], before["centroids"][1])
    assert torch.equal(router.cluster_expert, before["cluster_expert"])
    assert torch.equal(router.cluster_sizes, before["cluster_sizes"])


def test_the_discriminant_follows():
    """Its means move as the centroids do, its covariance and priors stay, and its rows stand in the router."""
    router, discriminant = made()
    before = router.centroids[:3].double().numpy()
    moved = move_clusters(router, discriminant, router.centroids[:3].repeat(4, 1) + 0.3, DECAY)
    shift = router.centroids[:3].double().numpy() - before
    assert np.abs(shift).max() > 0.05
    np.testing.assert_allclose(moved.means - discriminant.means, shift, atol=1e-6)
    np.testing.assert_array_equal(moved.covariance, discriminant.covariance)
    np.testing.assert_array_equal(moved.priors, discriminant.priors)
    weight, bias = moved.weights()
    np.testing.assert_array_equal(router.discriminant_weight[:3].numpy(), weight)
    np.testing.assert_array_equal(router.discriminant_bias[:3].numpy(), bias)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_extreme_decays(decay):
    router, discriminant = made()
    before = router.centroids.clone()
    members = router.centroids[:1] + torch.tensor([[0.1], [0.3]])
    move_clusters(router, discriminant, members, decay)
    torch.testing.assert_close(router.centroids[0], before[0] if decay else members.mean(0))
    assert torch.equal(router.centroids[1:], before[1:])


@pytest.mark.parametrize("scaling", [True, False])
def test_members_are_those_the_router_would_route_there(scaling):
    router, discriminant = made(cse_radius_scaling=scaling)
    router.radii[1] = 20.0
    before = router.centroids.clone()
    between = router.centroids[:1] * 0.9
    nearest = int(router(between.unsqueeze(1))[1])
    assert nearest == (1 if scaling else 0)
    move_clusters(router, discriminant, between, DECAY)
    changed = (router.centroids != before).any(1)
    assert changed.nonzero().flatten().tolist() == [nearest]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused_and_nothing_moves(bad):
    router, discriminant = made()
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    embeddings = torch.zeros(4, 32)
    embeddings[2, 5] = bad
    with pytest.raises(ValueError, match="1 of 4 routing features are NaN or infinite"):
        move_clusters(router, discriminant, embeddings, DECAY)
    assert all(torch.equal(buffer, before[name]) for name, buffer in router.named_buffers())
