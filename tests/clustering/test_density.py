# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the density algorithms: noise is counted and then joins, small regions dissolve, room is kept to."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score

from modeling_cse.clustering import find_clusters
from modeling_cse.clustering.density import density_labels


both = pytest.mark.parametrize("algorithm", ["dbscan", "hdbscan"])


def islands(sizes: list[int], noise: int = 0, width: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Dense islands far from each other and as many stray points far from all, and the island of each, -1: none."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    centres = 10 * np.eye(len(sizes), width)
    dense = centres[labels] + 0.3 * random.standard_normal((len(labels), width))
    strays = 30 * random.standard_normal((noise, width))
    return np.concatenate([dense, strays]).astype(np.float32), np.append(labels, np.full(noise, -1))


@both
def test_strays_are_noise_and_then_join_the_cluster_the_router_would_choose(algorithm):
    points, labels = islands([80, 60, 40], noise=9)
    raw = density_labels(points, algorithm, 0.02)
    assert raw.dtype == np.int64 and (raw[labels < 0] == -1).all() and (raw < 0).sum() < 9 + 5
    found = find_clusters(points, algorithm, None, 0)
    assert len(found) == 3 and found.noise == pytest.approx((raw < 0).mean()) and found.sizes.sum() == 189
    assert adjusted_rand_score(labels[labels >= 0], found.labels[labels >= 0]) == 1
    inside = [points[(raw >= 0) & (found.labels == cluster)].astype(np.float64) for cluster in range(3)]
    centres = np.stack([members.mean(0) for members in inside])
    radii = np.array([np.linalg.norm(members - members.mean(0), axis=1).mean() for members in inside])
    np.testing.assert_array_equal(found.labels[180:], (cdist(points[180:], centres) / radii).argmin(1))


def test_noise_joins_by_distance_in_units_of_the_radius():
    random = np.random.default_rng(0)
    wide, narrow = (spread * random.standard_normal((60, 2)) for spread in (1.0, 0.5))
    points = np.concatenate([wide, narrow + [20, 0], [[11.5, 0]]]).astype(np.float32)
    found = find_clusters(points, "dbscan", None, 0)
    assert len(found) == 2 and found.noise > 0
    assert found.labels[-1] == found.labels[0]  # nearer to the narrow one, but further away in its radii


@both
def test_regions_smaller_than_the_share_dissolve(algorithm):
    points, labels = islands([100, 60, 24])
    assert len(find_clusters(points, algorithm, None, 0, min_cluster_share=0.1)) == 3
    found = find_clusters(points, algorithm, None, 0, min_cluster_share=0.2)
    assert len(found) == 2 and found.noise == pytest.approx(24 / 184)


@both
def test_the_default_share_is_two_percent_and_five_points_at_the_least(algorithm):
    points, _ = islands([700, 280, 16])
    points[-16:] = points[-16:].mean(0) + 0.3 * (points[-16:] - points[-16:].mean(0))
    assert len(find_clusters(points, algorithm, None, 0)) == 2
    assert len(find_clusters(points, algorithm, None, 0, min_cluster_share=0.01)) == 3
    few, _ = islands([30, 12])
    assert np.bincount(density_labels(few, algorithm, 0.0) + 1)[1:].min() >= 5


@both
@pytest.mark.parametrize("seed", range(5))
def test_regions_of_equal_points_are_not_torn_by_rounding(algorithm, seed):
    random = np.random.default_rng(seed)
    points = random.random((3, 131)).astype(np.float32).repeat(37, axis=0)[random.permutation(111)]
    found = find_clusters(points, algorithm, None, 0, projection=None)
    assert found.sizes.tolist() == [37, 37, 37] and found.noise == 0


@both
def test_a_component_that_all_share_hides_nothing(algorithm):
    points, labels = islands([60, 50, 40])
    points = np.concatenate([np.full((150, 12), 1e5), 1e-3 * points], axis=1).astype(np.float32)
    assert adjusted_rand_score(labels, find_clusters(points, algorithm, None, 0).labels) == 1


@both
def test_only_noise_is_one_cluster_of_all(algorithm):
    points, _ = islands([60, 50])
    found = find_clusters(points, algorithm, None, 0, min_cluster_share=0.9)
    assert found.noise == 1 and found.sizes.tolist() == [110]


@both
@pytest.mark.parametrize("count", [1, 2, 10])
def test_too_few_points_to_have_a_density_are_noise(algorithm, count):
    points = np.random.default_rng(0).random((count, 6))
    assert density_labels(points, algorithm, 0.02).tolist() == [-1] * count


@both
def test_the_largest_stay_where_there_is_room_for_fewer(algorithm):
    points, labels = islands([30, 70, 50, 90, 40], noise=6)
    found = find_clusters(points, algorithm, None, 0, max_clusters=3)
    assert len(found) == 3 and found.sizes.sum() == 286 and found.noise == pytest.approx(6 / 286)
    assert {np.bincount(found.labels[labels == island]).max() for island in (1, 2, 3)} == {50, 70, 90}
    assert len({found.labels[labels == island][0] for island in (1, 2, 3)}) == 3
    assert len(find_clusters(points, algorithm, None, 0, max_clusters=1)) == 1


def test_the_radius_of_dbscan_leaves_few_points_without_neighbours():
    """METHOD section 2: 2 % of noise at the 0.9 quantile, on clusters of unlike density."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(4), 100)
    spread = np.array([0.5, 0.8, 1.0, 1.3])[labels, None]
    points = 20 * np.eye(4, 48)[labels] + spread * random.standard_normal((400, 48))
    found = find_clusters(points.astype(np.float32), "dbscan", None, 0)
    assert adjusted_rand_score(labels, found.labels) > 0.97 and found.noise < 0.1
