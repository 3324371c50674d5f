# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the discriminant: it is linear discriminant analysis, and never undefined."""

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from modeling_cse.clustering import Discriminant
from modeling_cse.clustering.discriminant import agreement


def classes(sizes=(400, 200, 100), width: int = 6, seed: int = 0):
    """Gaussian classes of one covariance, overlapping."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    mixing = random.standard_normal((width, width))
    points = 2 * random.standard_normal((len(sizes), width))[labels]
    return (points + random.standard_normal((len(labels), width)) @ mixing).astype(np.float32), labels


def best(discriminant: Discriminant, points: np.ndarray) -> np.ndarray:
    weight, bias = discriminant.weights()
    return (points @ weight.T + bias).argmax(1)


def test_routes_are_those_of_scikit_learn():
    points, labels = classes()
    priors = np.bincount(labels) / len(labels)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=priors).fit(points, labels)
    ours = best(Discriminant.fit(points, labels, priors), points)
    assert (ours == reference.predict(points)).mean() > 0.99
    assert (ours == labels).mean() > 0.6


def test_scores_are_log_posteriors():
    """Up to a term that all classes share: their softmax is what Bayes' rule gives."""
    points, labels = classes()
    priors = np.array([0.5, 0.3, 0.2])
    fit = Discriminant.fit(points, labels, priors)
    weight, bias = fit.weights()
    difference = points[:50, None] - fit.means
    density = -0.5 * np.einsum("nkd,de,nke->nk", difference, np.linalg.inv(fit.covariance), difference)
    wanted = density + np.log(priors)
    scores = points[:50] @ weight.T + bias
    np.testing.assert_allclose(scores - scores.max(1, keepdims=True), wanted - wanted.max(1, keepdims=True), atol=1e-3)


def test_without_evidence_the_largest_cluster_wins():
    points, labels = classes((100, 100, 100))
    points[labels == 1] = points[labels == 0]
    points[labels == 2] = points[labels == 0]
    for priors in ([0.2, 0.7, 0.1], [0.1, 0.1, 0.8]):
        assert (best(Discriminant.fit(points, labels, np.array(priors)), points) == np.argmax(priors)).all()


def test_one_cluster_takes_everything():
    points, _ = classes()
    fit = Discriminant.fit(points, np.zeros(len(points), np.int64), np.ones(1))
    assert (best(fit, points) == 0).all() and np.isfinite(np.concatenate([p.ravel() for p in fit.weights()])).all()


@pytest.mark.parametrize("clusters", [1, 3])
def test_equal_points_give_finite_weights(clusters):
    labels = np.arange(30) % clusters
    points = np.eye(8, dtype=np.float32)[labels]
    fit = Discriminant.fit(points, labels, np.full(clusters, 1 / clusters))
    weight, bias = fit.weights()
    assert weight.dtype == bias.dtype == np.float32
    assert np.isfinite(weight).all() and np.isfinite(bias).all()
    assert (best(fit, points) == labels).all()


def test_fewer_tokens_than_dimensions_give_finite_weights():
    random = np.random.default_rng(0)
    points, labels = random.standard_normal((12, 64)).astype(np.float32), np.arange(12) % 2
    weight, bias = Discriminant.fit(points, labels, np.array([0.5, 0.5])).weights()
    assert np.isfinite(weight).all() and np.isfinite(bias).all() and np.abs(weight).max() < 1e3


def test_moved_routes_points_that_moved_along():
    points, labels = classes()
    priors = np.bincount(labels) / len(labels)
    fit, shift = Discriminant.fit(points, labels, priors), np.full((3, 6), 3.0)
    np.testing.assert_array_equal(best(fit.moved(shift), points + 3.0), best(fit, points))


def test_agreement_is_the_share_of_right_routes():
    weight, bias = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    points = np.array([[1, 0], [0, 1], [1, 0], [3, 2]], np.float32)
    assert agreement(weight, bias, points, np.array([0, 1, 1, 0])) == 0.75


def test_a_fit_leaves_its_tokens_as_they_are():
    points, labels = classes()
    for tokens in (points, points.astype(np.float64)):
        before = tokens.copy()
        Discriminant.fit(tokens, labels, np.bincount(labels) / len(labels))
        np.testing.assert_array_equal(tokens, before)
