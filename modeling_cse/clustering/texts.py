# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Clusters of texts by their words: what the texts are about, before the model can tell.

Latent semantic analysis (Deerwester et al., 1990; scikit-learn's TF-IDF and truncated SVD) of token counts, and
k-means on the directions. A model's states tell the domains of its corpus apart only once it has learned much of
them (docs/evidence/longtail-trials.md); token counts do so from the first batch, and do not drift while it trains.
"""

from typing import cast

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.preprocessing import normalize

from .algorithms import Clustering, find_clusters
from .settings import ClusterSettings
from .threads import one_thread


# Directions of the analysis. 16, 32 and 64 find the same domains (docs/evidence/longtail-trials.md).
DIRECTIONS = 32
# Points of 32 dimensions are cheap to cluster; small clusters need better starts (docs/evidence/longtail-trials.md).
RESTARTS = 20


def count_tokens(ids: np.ndarray, vocab_size: int) -> csr_matrix:
    """
    How often each token stands in each text.

    Args:
        ids: (N, L) token ids, -1 behind the end of a text.
        vocab_size: V.

    Returns:
        (N, V) float64.
    """
    rows = np.arange(len(ids)).repeat((ids >= 0).sum(axis=1))
    tokens = ids[ids >= 0]
    counts = csr_matrix((np.ones(len(tokens)), (rows, tokens)), shape=(len(ids), vocab_size))
    counts.sum_duplicates()  # scipy 1.13.0 leaves them apart
    return counts


def embed_texts(ids: np.ndarray, vocab_size: int, seed: int) -> np.ndarray:
    """
    Texts (N, L) as directions of length 1 in the space that they span, (N, r) float32: TF-IDF with sublinear counts,
    and its first directions.
    """
    words = TfidfTransformer(sublinear_tf=True).fit_transform(count_tokens(ids, vocab_size))
    width = min(DIRECTIONS, words.shape[0] - 1, words.shape[1] - 1)
    if width < 1:  # a single text
        return np.ones((len(ids), 1), np.float32)
    with one_thread():
        points = TruncatedSVD(width, random_state=seed).fit_transform(words)
    return normalize(points).astype(np.float32)


def cluster_texts(ids: np.ndarray, vocab_size: int, settings: ClusterSettings, max_clusters: int) -> Clustering:
    """
    Finds clusters of texts, in the space of `embed_texts`. A text counts by its tokens: the end of a document that a
    row has cut off says little of what documents are about.

    Args:
        ids: (N, L) token ids, -1 behind the end of a text.
        vocab_size: V.
        settings: number of clusters and seed.
        max_clusters: how many the model can hold.

    Raises:
        ValueError: see `find_clusters`.
    """
    low, high = cast(tuple[int, int], settings.cluster_range)  # k-means is told a number
    lengths = (ids >= 0).sum(axis=1)
    return find_clusters(
        embed_texts(ids, vocab_size, settings.seed),
        "kmeans",
        low if low == high else (low, high),
        settings.seed,
        max_clusters=max_clusters,
        restarts=RESTARTS,
        weights=lengths / lengths.max(),
    )
