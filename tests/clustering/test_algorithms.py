# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of clustering: planted clusters are found, numbers describe them, bad input is refused."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, silhouette_score
from threadpoolctl import threadpool_limits

from modeling_cse.clustering import ALGORITHMS, find_clusters
from modeling_cse.clustering.algorithms import directions, project


# Every algorithm, and what it is told about the number of clusters.
EVERY = [
    ("kmeans", 3),
    ("kmeans", (2, 5)),
    ("spherical", 3),
    ("spherical", (2, 5)),
    ("dbscan", None),
    ("hdbscan", None),
]
DENSITY = ["dbscan", "hdbscan"]
every = pytest.mark.parametrize(("algorithm", "num_clusters"), EVERY, ids=lambda part: str(part))


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


# ---- every algorithm ------------------------------------------------------------------------------------------------


def test_every_algorithm_is_tested():
    assert {algorithm for algorithm, _ in EVERY} == set(ALGORITHMS) - {"given", "text"}


@every
@pytest.mark.parametrize("projection", ["auto", None, 16])
def test_every_algorithm_finds_clusters_that_lie_apart(algorithm, num_clusters, projection):
    points, labels = blobs(3, 50, 64)
    found = find_clusters(points + 3, algorithm, num_clusters, 0, projection=projection)
    assert adjusted_rand_score(labels, found.labels) == 1 and len(found) == 3


@every
@pytest.mark.parametrize("projection", ["auto", 16])
def test_every_algorithm_repeats_to_the_bit(algorithm, num_clusters, projection):
    points, _ = blobs(4, 60, 64, spread=0.8)
    first, second = (find_clusters(points, algorithm, num_clusters, 3, projection=projection) for _ in range(2))
    for name, value in vars(first).items():
        np.testing.assert_array_equal(value, getattr(second, name))


def strange(name: str) -> np.ndarray:
    """Data with which clustering could crash, hang, or warn."""
    random = np.random.default_rng(0)
    far_apart, _ = blobs(3, 20, 16)
    data = {
        "equal": np.full((40, 48), 0.1),
        "zeros": np.zeros((40, 8)),
        "tight": 1000 + 1e-3 * random.standard_normal((60, 48)),
        "noise": random.random((80, 64)),
        "two": random.random((2, 8)),
        "two equal": np.full((2, 8), 0.3),
        "seven": random.random((7, 8)),
        "eleven": random.random((11, 8)),
        "huge": 1e18 * far_apart,
        "minute": 1e-25 * far_apart,
        "a line": 7 + np.outer(random.standard_normal(60), np.eye(48)[0]),
        "duplicates": np.repeat(random.random((3, 48)), 5, axis=0),
        "huge duplicates": 1e18 * np.repeat(random.random((3, 48)), 20, axis=0),
        "nearly all equal": np.concatenate([np.repeat(random.random((1, 48)), 95, axis=0), random.random((5, 48))]),
        "one far out": np.concatenate([far_apart, np.full((1, 16), 1e15)]),
    }
    return data[name].astype(np.float32) if name in data else list(data)


@every
@pytest.mark.parametrize("projection", ["auto", 4])
@pytest.mark.parametrize("name", strange(""))
def test_strange_data_are_described_truly(algorithm, num_clusters, projection, name, recwarn):
    points = strange(name)
    num_clusters = min(num_clusters, len(points)) if isinstance(num_clusters, int) else num_clusters
    found = find_clusters(points, algorithm, num_clusters, 0, projection=projection, max_clusters=5)
    assert found.labels.shape == (len(points),) and np.unique(found.labels).tolist() == list(range(len(found)))
    assert len(found) <= min(5, len(np.unique(points, axis=0)))
    assert found.sizes.tolist() == np.bincount(found.labels).tolist()
    scale = float(np.abs(points).max())
    distances = np.empty(len(points))
    for cluster, centroid in enumerate(found.centroids):
        members = points[found.labels == cluster].astype(np.float64)
        np.testing.assert_allclose(centroid, members.mean(0), rtol=1e-6, atol=1e-6 * scale)
        distances[found.labels == cluster] = np.linalg.norm(members - members.mean(0), axis=1)
    radii = np.bincount(found.labels, weights=distances) / found.sizes
    spread = radii > 1e-12 * scale
    np.testing.assert_allclose(found.radii[spread], radii[spread], rtol=1e-5)
    assert (found.radii > 0).all() and np.isfinite(found.radii).all() and np.isfinite(found.clarity)
    assert 0 <= found.noise <= 1 and (algorithm in DENSITY or found.noise == 0)
    assert not len(recwarn)


@every
def test_one_sequence_is_a_cluster_where_one_will_do(algorithm, num_clusters):
    if isinstance(num_clusters, tuple):
        with pytest.raises(ValueError, match=r"num_clusters=\(2, 5\) is more than the 1 sequences"):
            find_clusters(np.ones((1, 8), np.float32), algorithm, num_clusters, 0)
    else:
        found = find_clusters(np.ones((1, 8), np.float32), algorithm, num_clusters and 1, 0)
        assert found.sizes.tolist() == [1] and found.radii[0] > 0


@every
def test_every_algorithm_refuses_what_it_cannot_cluster(algorithm, num_clusters):
    points, _ = blobs()
    points[5, 3] = np.nan
    with pytest.raises(ValueError, match="1 of 200 routing features are NaN or infinite"):
        find_clusters(points, algorithm, num_clusters, 0)
    with pytest.raises(ValueError, match="0 sequences"):
        find_clusters(np.zeros((0, 8), np.float32), algorithm, num_clusters, 0)


@every
def test_size_of_the_features_does_not_matter(algorithm, num_clusters):
    points, _ = blobs(3, 50, 48, spread=0.7)
    found = find_clusters(points, algorithm, num_clusters, 0)
    for exponent in (-60, 60):
        scaled = find_clusters(np.ldexp(points, exponent), algorithm, num_clusters, 0)
        np.testing.assert_array_equal(found.labels, scaled.labels)
        np.testing.assert_array_equal(np.ldexp(found.radii, exponent), scaled.radii)
        assert found.clarity == scaled.clarity


# ---- k-means: a number, a range, directions -------------------------------------------------------------------------


def test_kmeans_is_that_of_scikit_learn_on_the_features_as_they_are():
    points = 40 + blobs(spread=3.0)[0]
    with threadpool_limits(limits=1):
        labels = KMeans(n_clusters=6, n_init=4, random_state=7).fit_predict(points)
    np.testing.assert_array_equal(find_clusters(points, "kmeans", 6, 7).labels, labels)


@pytest.mark.parametrize("algorithm", ["kmeans", "spherical"])
@pytest.mark.parametrize("count", [2, 4, 6])
def test_silhouette_finds_how_many_there_are(algorithm, count):
    points, labels = blobs(count, 40, 16)
    found = find_clusters(points, algorithm, (2, 8), 0)
    assert len(found) == count and adjusted_rand_score(labels, found.labels) == 1
    seen = directions(points) if algorithm == "spherical" else points
    assert found.silhouette == pytest.approx(silhouette_score(seen, labels), abs=1e-5)
    assert find_clusters(points, algorithm, count, 0).silhouette is None


def test_silhouette_is_measured_where_clusters_are_found():
    points, labels = blobs(3, 40, 64, spread=0.6)
    found = find_clusters(points, "kmeans", (2, 5), 4, projection=8)
    assert found.silhouette == pytest.approx(silhouette_score(project(points, 8, 4), found.labels), abs=1e-5)
    assert found.silhouette != pytest.approx(silhouette_score(points, found.labels), abs=0.02)


def test_silhouette_of_many_points_is_that_of_a_sample(monkeypatch):
    measured = []
    monkeypatch.setattr(
        "modeling_cse.clustering.algorithms.silhouette_score",
        lambda seen, labels, metric: measured.append(len(seen)) or 0.5,
    )
    points, _ = blobs(3, 500)
    assert len(find_clusters(points, "kmeans", (2, 4), 0)) == 2  # of equal values the smallest number
    assert measured == [1000, 1000, 1000]


def test_a_range_is_cut_to_the_sequences_there_are():
    points = np.random.default_rng(0).random((6, 8)).astype(np.float32)
    assert 2 <= len(find_clusters(points, "kmeans", (2, 50), 0)) < 6
    with pytest.raises(ValueError, match=r"num_clusters=\(7, 9\) is more than the 6 sequences"):
        find_clusters(points, "kmeans", (7, 9), 0)


def test_directions_tell_apart_what_lengths_hide():
    """Eight rays out of a large common mean, points all along them: k-means cuts the rays by length."""
    random = np.random.default_rng(0)
    labels = np.arange(400) % 8
    angle = 2 * np.pi * labels[:, None] / 8
    rays = np.concatenate([np.cos(angle), np.sin(angle), np.zeros((400, 14))], axis=1)
    points = 50 + random.uniform(1, 12, (400, 1)) * (rays + 0.03 * random.standard_normal((400, 16)))
    points = points.astype(np.float32)
    spherical, plain = (find_clusters(points, algorithm, 8, 0) for algorithm in ("spherical", "kmeans"))
    assert adjusted_rand_score(labels, spherical.labels) == 1 > 0.9 > adjusted_rand_score(labels, plain.labels)
    # as seen from the origin, all of them are the same direction
    seen = points / np.linalg.norm(points, axis=1, keepdims=True)
    assert adjusted_rand_score(labels, find_clusters(seen, "kmeans", 8, 0).labels) < 0.9
    assert np.linalg.norm(spherical.centroids.mean(0)) > 100  # described where the router looks for them


def test_directions_have_unit_length_and_the_mean_has_none():
    points = np.array([[3, 4], [-3, -4], [0, 0], [0, 0]], np.float32) + 7
    expected = np.array([[0.6, 0.8], [-0.6, -0.8], [0, 0], [0, 0]])
    np.testing.assert_allclose(directions(points), expected, atol=1e-6)


# ---- projection -----------------------------------------------------------------------------------------------------


def test_a_projection_nearly_keeps_distances_and_depends_on_the_seed():
    points, _ = blobs(4, 20, 300, spread=1.0)
    projected = project(points, 128, 0)
    assert projected.shape == (80, 128)
    before, after = (
        np.linalg.norm(each[:, None] - each[None], axis=-1)[~np.eye(80, dtype=bool)] for each in (points, projected)
    )
    assert 0.6 < (after / before).min() and (after / before).max() < 1.4
    np.testing.assert_array_equal(projected, project(points, 128, 0))
    assert not np.allclose(projected, project(points, 128, 1))


def test_a_projection_keeps_equal_points_equal():
    points = np.random.default_rng(0).standard_normal((5, 300)).repeat(13, axis=0)
    assert len(np.unique(project(points, 7, 0), axis=0)) == 5


def test_clusters_are_described_in_the_space_of_the_features():
    points, labels = blobs(3, 40, 64)
    plain, projected = (find_clusters(points, "kmeans", 3, 0, projection=width) for width in (None, 8))
    assert projected.centroids.shape == (3, 64)
    order = np.array([projected.labels[plain.labels == cluster][0] for cluster in range(3)])
    np.testing.assert_array_equal(plain.centroids, projected.centroids[order])
    np.testing.assert_array_equal(plain.radii, projected.radii[order])


def test_a_projection_to_more_dimensions_than_there_are_is_refused():
    with pytest.raises(ValueError, match="projection=9 is not allowed for embeddings of 8 dimensions.*at most 8"):
        find_clusters(blobs()[0], "dbscan", None, 0, projection=9)
