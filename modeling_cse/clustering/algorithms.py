# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Finding clusters among sequence embeddings. scikit-learn does the clustering."""

import warnings
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import euclidean_distances, silhouette_score
from sklearn.random_projection import GaussianRandomProjection

from .density import density_labels
from .settings import GIVEN, TEXT, ClusterSettings
from .threads import one_thread


# Points among which silhouettes are measured: their cost grows with the square.
SILHOUETTE_SAMPLE = 1000
# Starts of k-means, of which the best counts.
RESTARTS = 4
# What is smaller than this share of the largest coordinate is left over from rounding.
DUST = 1e-12


@dataclass
class Clustering:
    """
    K clusters of N sequences.

    Fields:
        labels (N,) int64: the cluster of each sequence.
        centroids (K, d) float32: mean of the members.
        radii (K,) float32: mean distance of the members to the centroid (the paper's r_j), never 0.
        sizes (K,) int64: number of members, never 0.
        noise: share of the sequences that a density algorithm took for noise, before they joined a cluster; 0 for the
            other algorithms.
        silhouette: mean silhouette, -1 to 1, by which the number of clusters was chosen; None if it was given, or if
            there was nothing to choose from.
    """

    labels: np.ndarray
    centroids: np.ndarray
    radii: np.ndarray
    sizes: np.ndarray
    noise: float = 0.0
    silhouette: float | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def shares(self) -> np.ndarray:
        """Share of the sequences in each cluster, (K,) float64."""
        return self.sizes / self.sizes.sum()

    @property
    def clarity(self) -> float:
        """Mean distance between centroids over the mean radius (METHOD section 3); 0 for a single cluster."""
        if len(self) < 2:
            return 0.0
        exponent = _exponent(self.centroids)
        centroids = np.ldexp(self.centroids, -exponent)
        between = np.linalg.norm(centroids[:, None] - centroids[None], axis=-1)
        return float(between.sum() / (len(self) * (len(self) - 1)) / np.ldexp(self.radii.mean(), -exponent))


def find_clusters(
    embeddings: np.ndarray,
    algorithm: str,
    num_clusters: int | tuple[int, int] | None,
    seed: int,
    *,
    projection: int | str | None = "auto",
    min_cluster_share: float | None = None,
    max_clusters: int | None = None,
    restarts: int = RESTARTS,
    weights: np.ndarray | None = None,
) -> Clustering:
    """
    Clusters sequence embeddings. The same arguments give the same clusters, to the bit.

    Clusters may be found in a projected or normalised space; centroids, radii and sizes are always those of the
    embeddings as they are, which is where the router looks for the nearest cluster.

    Args:
        embeddings: (N, d) float32.
        algorithm: "kmeans"; "spherical", k-means on directions (see `directions`); "dbscan" or "hdbscan" (see
            `density_labels`), whose noise joins the nearest cluster, or makes up a single one if there is no other.
        num_clusters: see `ClusterSettings`. Fewer are found where there are fewer distinct points. The upper end of
            a range is cut to N.
        seed: of the algorithm's random start, the projection, and the sample for silhouettes.
        projection, min_cluster_share: see `ClusterSettings`.
        restarts: of k-means, the best of which counts.
        weights: (N,) for how much each sequence counts where k-means places its centres; None: all alike.
        max_clusters: how many the router can hold, None for no bound. Of more dense regions than that the largest
            stay, and the sequences of the others join their nearest cluster.

    Raises:
        ValueError: a setting that is not allowed, embeddings that are not finite or fewer than the clusters asked
            for, or a number of clusters above `max_clusters`.
    """
    if algorithm == GIVEN:
        raise ValueError(f"algorithm={GIVEN!r} is not allowed here: nothing is to be found. See `labelled_clusters`.")
    if algorithm == TEXT:
        raise ValueError(f"algorithm={TEXT!r} is not allowed here: embeddings are no texts. See `cluster_texts`.")
    settings = ClusterSettings(
        algorithm, num_clusters, seed=seed, projection=projection, min_cluster_share=min_cluster_share
    )
    _check_counts(settings, len(embeddings), max_clusters)
    check_finite(embeddings)
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: handled below
        # A power of two changes no digit, and keeps the squares of very large and very small features in range.
        points = np.ldexp(embeddings, -_exponent(embeddings))
        width = settings.projected_width(points.shape[1])
        if width is not None:
            points = project(points, width, seed)
        smallest_share = settings.smallest_share
        if smallest_share is not None:  # which only density algorithms have
            labels = density_labels(points, algorithm, smallest_share)
            return _join_noise(embeddings, labels, max_clusters)
        if algorithm == "spherical":
            points = directions(points)
        low, high = cast(tuple[int, int], settings.cluster_range)  # k-means is told a number
        if not isinstance(settings.num_clusters, tuple):
            return describe_clusters(embeddings, _kmeans(points, low, seed, restarts, weights))
        labels, silhouette = _best_kmeans(points, low, min(high, len(points)), seed, restarts, weights)
    clustering = describe_clusters(embeddings, labels)
    clustering.silhouette = silhouette
    return clustering


def project(points: np.ndarray, width: int, seed: int) -> np.ndarray:
    """
    Points (N, d) in `width` random directions, (N, width) float64: distances are nearly kept (Johnson and
    Lindenstrauss, 1984; the paper projects before it takes any distance). Equal points stay equal.
    """
    # A matrix product may round equal rows differently, and clusters would be found among the differences.
    distinct, index = np.unique(points.astype(np.float64), axis=0, return_inverse=True)
    return GaussianRandomProjection(width, random_state=seed).fit_transform(distinct)[index.ravel()]


def directions(points: np.ndarray) -> np.ndarray:
    """
    Directions of points (N, d) as seen from their mean, (N, d) float32 of unit length. A point at the mean has no
    direction, and stays at the origin.

    The mean goes first because transformer states share a large common component (Mu and Viswanath, ICLR 2018;
    Ethayarajh, EMNLP 2019): seen from the origin all of them lie in nearly the same direction, and what tells texts
    apart would be lost in it.
    """
    centered = points - points.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(centered, axis=1, keepdims=True)
    length[length <= DUST * np.abs(points).max()] = np.inf
    return (centered / length).astype(np.float32)


def _kmeans(points: np.ndarray, count: int, seed: int, restarts: int, weights: np.ndarray | None) -> np.ndarray:
    return KMeans(n_clusters=count, n_init=restarts, random_state=seed).fit_predict(points, sample_weight=weights)


def _best_kmeans(
    points: np.ndarray, low: int, high: int, seed: int, restarts: int, weights: np.ndarray | None
) -> tuple[np.ndarray, float | None]:
    """The labels with the largest silhouette among k = low..high, the smallest k of equals, and that silhouette."""
    sample = np.random.default_rng(seed).permutation(len(points))[:SILHOUETTE_SAMPLE]
    distances = euclidean_distances(points[sample])  # the same for every number of clusters
    best: np.ndarray  # the labels of `low` at least
    best_score: float | None = None
    for count in range(low, high + 1):
        labels = _kmeans(points, count, seed, restarts, weights)
        score = _silhouette(distances, labels[sample])
        if count == low or (score is not None and (best_score is None or score > best_score)):
            best, best_score = labels, score
        if len(np.unique(labels)) < count:  # there are no more distinct points
            break
    return best, best_score


def _silhouette(distances: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean silhouette (Rousseeuw, 1987) of points by the distances (n, n) between them; None where it is
    not defined: a single cluster, or only single points."""
    if not 2 <= len(np.unique(labels)) < len(labels):
        return None
    return float(silhouette_score(distances, labels, metric="precomputed"))


def _join_noise(embeddings: np.ndarray, labels: np.ndarray, max_clusters: int | None) -> Clustering:
    """
    The clustering of all sequences from the labels (N,) of some, -1 for noise.

    Noise, and the clusters beyond the `max_clusters` largest, join the cluster whose centroid is nearest in units of
    its radius. That is how the router will place them (the paper's dispatch rule).
    """
    found, sizes = np.unique(labels[labels >= 0], return_counts=True)
    largest = found[np.argsort(-sizes, kind="stable")][:max_clusters]
    inside = np.isin(labels, largest)
    joined = np.zeros(len(labels), np.int64)
    if inside.any():
        cores = describe_clusters(embeddings[inside], labels[inside])
        joined[inside] = cores.labels
        joined[~inside] = (cdist(embeddings[~inside], cores.centroids) / cores.radii).argmin(axis=1)
    clustering = describe_clusters(embeddings, joined)
    clustering.noise = float((labels < 0).mean())
    return clustering


def _exponent(values: np.ndarray) -> int:
    """The exponent of the power of two just above all absolute values. To divide by that power is exact."""
    return int(np.frexp(np.abs(values).max())[1])


def _check_counts(settings: ClusterSettings, sequences: int, max_clusters: int | None) -> None:
    """Whether so many clusters can be had of so many sequences, and can be held."""
    low, high = settings.cluster_range or (1, 1)
    asked = low if low == high else (low, high)
    if max_clusters is not None and high > max_clusters:
        raise ValueError(
            f"num_clusters={asked} is more than cse_max_clusters={max_clusters}, which this model's "
            "routers can hold."
        )
    if sequences == 0:
        raise ValueError("embeddings hold 0 sequences: there is nothing to cluster.")
    if sequences < low:
        raise ValueError(
            f"num_clusters={asked} is more than the {sequences} sequences that were sampled: ask for "
            "fewer clusters, or sample more sequences (sample_size, a later end of warm-up)."
        )


def check_finite(embeddings: np.ndarray) -> None:
    """Raises `ValueError` if any of the embeddings (N, d) is NaN or infinite."""
    bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(embeddings)} routing features are NaN or infinite: the model's activations have "
            "diverged, so there is nothing to cluster. Lower the learning rate, or look for bad input."
        )


def labelled_clusters(embeddings: np.ndarray, labels: np.ndarray, max_clusters: int) -> Clustering:
    """
    The clusters that labels name: cluster i is label i, whatever its size.

    Args:
        embeddings: (N, d) float32.
        labels: (N,) int64, -1 for sequences of none, which are left out.
        max_clusters: how many the router can hold.

    Raises:
        ValueError: labels the router cannot hold, no label, a gap in their numbers, or embeddings that are not finite.
    """
    check_finite(embeddings)
    inside = labels >= 0
    if not inside.any():
        raise ValueError(
            f"given_clusters of the {len(labels)} sampled sequences name no cluster, which algorithm='given' needs: "
            "pass them with each batch."
        )
    found = np.unique(labels[inside])
    if found[-1] >= max_clusters:
        raise ValueError(f"given_clusters go up to {found[-1]}, but cse_max_clusters={max_clusters}.")
    missing = sorted(set(range(found[-1] + 1)) - set(found.tolist()))
    if missing:
        raise ValueError(
            f"given_clusters {missing} are missing among the {len(labels)} sampled sequences: sample more "
            "(sample_size), or number the labels without gaps."
        )
    clustering = describe_clusters(embeddings[inside], labels[inside])
    return replace(clustering, labels=labels)


def describe_clusters(embeddings: np.ndarray, labels: np.ndarray) -> Clustering:
    """Centroids, radii and sizes of labelled embeddings; labels are renumbered so that none is empty."""
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    points = embeddings.astype(np.float64)
    centroids = np.stack([points[labels == label].mean(axis=0) for label in range(len(sizes))])
    distances = np.linalg.norm(points - centroids[labels], axis=1)
    radii = np.bincount(labels, weights=distances) / sizes
    # A cluster of equal points would have a radius of 0, and a distance over it would be infinite or undefined.
    dust = DUST * np.abs(points).max()
    smallest = radii[radii > dust].min(initial=np.inf)
    radii[radii <= dust] = smallest if np.isfinite(smallest) else 1.0
    return Clustering(
        labels.astype(np.int64), centroids.astype(np.float32), radii.astype(np.float32), sizes.astype(np.int64)
    )
