# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Finding clusters among sequence embeddings. scikit-learn does the clustering."""

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits


ALGORITHMS = ("kmeans",)


@dataclass
class Clustering:
    """
    K clusters of N sequences.

    Fields:
        labels (N,) int64: the cluster of each sequence.
        centroids (K, d) float32: mean of the members.
        radii (K,) float32: mean distance of the members to the centroid (the paper's r_j), never 0.
        sizes (K,) int64: number of members, never 0.
    """

    labels: np.ndarray
    centroids: np.ndarray
    radii: np.ndarray
    sizes: np.ndarray

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
        between = np.linalg.norm(self.centroids[:, None] - self.centroids[None], axis=-1)
        return float(between.sum() / (len(self) * (len(self) - 1)) / self.radii.mean())


def find_clusters(embeddings: np.ndarray, algorithm: str, num_clusters: int, seed: int) -> Clustering:
    """
    Clusters sequence embeddings.

    Args:
        embeddings: (N, d) float32.
        algorithm: one of `ALGORITHMS`.
        num_clusters: how many to look for. Fewer are found where there are fewer distinct points.
        seed: of the algorithm's random start.

    Raises:
        ValueError: an unknown algorithm, embeddings that are not finite, or fewer sequences than clusters.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r} is not allowed: it must be one of {list(ALGORITHMS)}.")
    check_finite(embeddings)
    if len(embeddings) < num_clusters:
        raise ValueError(
            f"num_clusters={num_clusters} is more than the {len(embeddings)} sequences that were sampled: ask for "
            "fewer clusters, or sample more sequences (sample_size, a later end of warm-up)."
        )
    model = KMeans(n_clusters=num_clusters, n_init=4, random_state=seed)
    # One thread: with several, sums are added in the order in which threads finish, and runs would not repeat.
    with threadpool_limits(limits=1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: handled below
        labels = model.fit_predict(embeddings)
    return describe_clusters(embeddings, labels)


def check_finite(embeddings: np.ndarray) -> None:
    """Raises `ValueError` if any of the embeddings (N, d) is NaN or infinite."""
    bad = int((~np.isfinite(embeddings).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(embeddings)} routing features are NaN or infinite: the model's activations have "
            "diverged, so there is nothing to cluster. Lower the learning rate, or look for bad input."
        )


def describe_clusters(embeddings: np.ndarray, labels: np.ndarray) -> Clustering:
    """Centroids, radii and sizes of labelled embeddings; labels are renumbered so that none is empty."""
    _, labels, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    points = embeddings.astype(np.float64)
    centroids = np.stack([points[labels == label].mean(axis=0) for label in range(len(sizes))])
    distances = np.linalg.norm(points - centroids[labels], axis=1)
    radii = np.bincount(labels, weights=distances) / sizes
    # A cluster of equal points would have a radius of 0, and a distance over it would be infinite or undefined.
    smallest = radii[radii > 1e-12].min(initial=np.inf)
    radii[radii <= 1e-12] = smallest if np.isfinite(smallest) else 1.0
    return Clustering(
        labels.astype(np.int64), centroids.astype(np.float32), radii.astype(np.float32), sizes.astype(np.int64)
    )
