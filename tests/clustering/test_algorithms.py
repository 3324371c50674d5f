# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of clustering: planted clusters are found, numbers describe them, bad input is refused."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score

from modeling_cse.clustering import find_clusters


def blobs(count: int = 4, each: int = 50, width: int = 8, spread: float = 0.3, seed: int = 0):
    """Points about well separated centres, and their labels."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(count), each)
    points = 5 * np.eye(count, width)[labels] + spread * random.standard_normal((count * each, width))
    return points.astype(np.float32), labels


def test_planted_clusters_are_found():
    points, labels = blobs()
    found = find_clusters(points, "kmeans", 4, 0)
    assert adjusted_mutual_info_score(labels, found.labels) == pytest.approx(1)
    assert len(found) == 4 and found.clarity > 5


def test_centroids_radii_and_sizes_describe_the_members():
    points, _ = blobs(spread=2.0)
    found = find_clusters(points, "kmeans", 5, 0)
    assert found.centroids.dtype == found.radii.dtype == np.float32
    assert found.labels.dtype == found.sizes.dtype == np.int64
    for cluster in range(len(found)):
        members = points[found.labels == cluster].astype(np.float64)
        np.testing.assert_allclose(found.centroids[cluster], members.mean(0), atol=1e-5)
        distance = np.linalg.norm(members - members.mean(0), axis=1)
        assert found.radii[cluster] == pytest.approx(distance.mean(), rel=1e-5)
        assert found.sizes[cluster] == len(members)
    assert found.sizes.sum() == len(points) and found.shares.sum() == pytest.approx(1)


def test_clarity_is_distance_between_over_radius():
    points = np.array([[0, 1], [0, -1], [6, 2], [6, -2]], np.float32)
    assert find_clusters(points, "kmeans", 2, 0).clarity == pytest.approx(6 / 1.5)
    assert find_clusters(points, "kmeans", 1, 0).clarity == 0


def test_same_seed_same_clusters():
    points, _ = blobs(spread=3.0)
    first, second = (find_clusters(points, "kmeans", 6, 7) for _ in range(2))
    for name in ("labels", "centroids", "radii", "sizes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    points, _ = blobs()
    points[[3, 8], 1] = bad
    with pytest.raises(ValueError, match="2 of 200 routing features are NaN or infinite"):
        find_clusters(points, "kmeans", 4, 0)


def test_more_clusters_than_sequences_are_refused():
    with pytest.raises(ValueError, match="num_clusters=4 is more than the 3 sequences.*sample_size"):
        find_clusters(np.zeros((3, 8), np.float32), "kmeans", 4, 0)


def test_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="algorithm='spectral' is not allowed.*kmeans"):
        find_clusters(np.zeros((3, 8), np.float32), "spectral", 2, 0)


def test_equal_points_are_one_cluster_with_a_radius(recwarn):
    found = find_clusters(np.ones((10, 8), np.float32), "kmeans", 4, 0)
    assert len(found) == 1 and found.sizes.tolist() == [10] and found.radii[0] > 0
    assert not len(recwarn)


def test_a_cluster_of_equal_points_takes_the_smallest_radius():
    points, _ = blobs(2, 20)
    points[20:] = 9
    found = find_clusters(points, "kmeans", 2, 0)
    assert found.radii[0] == found.radii[1] > 0


def test_fewer_distinct_points_than_clusters_leave_no_empty_cluster():
    points = np.repeat(np.eye(3, 8, dtype=np.float32), 5, 0)
    found = find_clusters(points, "kmeans", 5, 0)
    assert len(found) == 3 and found.sizes.tolist() == [5, 5, 5] and found.labels.max() == 2
