# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of clusters of texts: made-up vocabularies are found, the same again, and wrong settings are refused."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from text_rows import VOCAB, texts

from modeling_cse.clustering import ClusterSettings
from modeling_cse.clustering.texts import DIRECTIONS, cluster_texts, count_tokens, embed_texts


def test_counts_are_those_of_each_text():
    counts = count_tokens(np.array([[3, 1, 3, -1], [0, 0, 0, 2], [-1, -1, -1, -1]]), 5)
    assert counts.toarray().tolist() == [[0, 1, 0, 2, 0], [3, 0, 1, 0, 0], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize("num_clusters", [3, (2, 6)])
def test_made_up_vocabularies_are_found(num_clusters):
    ids, domains = texts()
    found = cluster_texts(ids, VOCAB, ClusterSettings("text", num_clusters), 16)
    assert adjusted_rand_score(domains, found.labels) == 1 and len(found) == 3
    assert (found.silhouette is None) == (num_clusters == 3)


def test_ends_of_documents_do_not_decide():
    """Many texts of a token or two, of one vocabulary of their own, take no cluster from the whole ones."""
    ids, domains = texts()
    ends = np.full((96, ids.shape[1]), -1, np.int32)
    ends[:, 0], ends[::2, 1] = np.arange(96) % 5 + 5, 7
    found = cluster_texts(np.concatenate([ids, ends]), VOCAB, ClusterSettings("text", 3), 16)
    assert adjusted_rand_score(domains, found.labels[:64]) == 1


def test_the_same_seed_gives_the_same_clusters():
    ids, _ = texts(own=0.2)
    first, again = (cluster_texts(ids, VOCAB, ClusterSettings("text", 5, seed=3), 16) for _ in range(2))
    for name in ("labels", "centroids", "radii", "sizes"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_texts_are_directions_that_order_and_padding_do_not_change():
    ids, _ = texts()
    points = embed_texts(ids, VOCAB, 0)
    assert points.shape == (64, DIRECTIONS) and points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-6)
    turned = np.pad(np.where(ids >= 0, ids, -1)[:, ::-1], ((0, 0), (0, 3)), constant_values=-1)
    np.testing.assert_allclose(embed_texts(turned, VOCAB, 0), points, atol=1e-6)


@pytest.mark.parametrize("ids", [[[7, 8, 9]], [[7, 7], [7, 7]], [[7, 8], [8, -1]]])
def test_very_few_texts_are_clusters_too(ids):
    points = embed_texts(np.array(ids), VOCAB, 0)
    assert len(points) == len(ids) and np.isfinite(points).all()
    assert len(cluster_texts(np.array(ids), VOCAB, ClusterSettings("text", 1), 16)) == 1


def test_the_default_number_is_ten():
    assert ClusterSettings("text").cluster_range == (10, 10) and ClusterSettings().cluster_range == (6, 6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"projection": 8}, "projection=8 is not allowed with algorithm='text'"),
        ({"min_cluster_share": 0.1}, "min_cluster_share=0.1 is not allowed with algorithm='text'"),
        ({"num_clusters": 0}, "num_clusters=0 is not allowed with algorithm='text'"),
    ],
)
def test_wrong_settings_are_refused(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        ClusterSettings("text", **changes)


def test_more_clusters_than_texts_or_room_are_refused():
    ids, _ = texts(count=8)
    with pytest.raises(ValueError, match="num_clusters=9"):
        cluster_texts(ids, VOCAB, ClusterSettings("text", 9), 16)
    with pytest.raises(ValueError, match="cse_max_clusters=3"):
        cluster_texts(ids, VOCAB, ClusterSettings("text", 4), 3)
