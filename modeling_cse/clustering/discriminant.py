# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The linear discriminant: from a token's own state to the cluster of its sequence, in closed form."""

from dataclasses import dataclass

import numpy as np
from sklearn.covariance import ledoit_wolf

from .threads import one_thread


@dataclass
class Discriminant:
    """
    Linear discriminant analysis with a shrunk pooled covariance S, class means m_k and priors p_k: the scores
    m_k' S^-1 x - m_k' S^-1 m_k / 2 + log p_k are log-posteriors up to a term that all classes share.

    Fields:
        means (K, d) float64: mean token state of each cluster.
        covariance (d, d) float64: pooled within-cluster covariance after Ledoit-Wolf shrinkage.
        priors (K,) float64: share of each cluster.
    """

    means: np.ndarray
    covariance: np.ndarray
    priors: np.ndarray

    @classmethod
    def fit(cls, tokens: np.ndarray, labels: np.ndarray, priors: np.ndarray) -> "Discriminant":
        """
        Args:
            tokens: (M, d) token states.
            labels: (M,) cluster of the sequence that each token stands in; every cluster has a token.
            priors: (K,) share of each cluster.
        """
        points = tokens.astype(np.float64)
        means = np.empty((len(priors), points.shape[1]))
        for label in range(len(priors)):  # in place: no array of a fit is larger
            members = points[labels == label]
            means[label] = members.mean(axis=0)
            points[labels == label] = members - means[label]
        with one_thread():
            covariance, _ = ledoit_wolf(points, assume_centered=True)
        # Equal points have no covariance at all: any positive multiple of the identity then gives the same routes.
        width = len(covariance)
        floor = 1e-6 * np.trace(covariance) / width
        covariance[np.diag_indices(width)] += floor if floor > 0 else 1.0
        return cls(means, covariance, priors.astype(np.float64))

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight (K, d) float32 and bias (K,) float32 of the scores."""
        with one_thread():
            weight = np.linalg.solve(self.covariance, self.means.T).T
        bias = np.log(self.priors) - 0.5 * (weight * self.means).sum(axis=1)
        with np.errstate(over="ignore"):  # a fit that overflows is refused (fit_layer)
            return weight.astype(np.float32), bias.astype(np.float32)

    def moved(self, shift: np.ndarray) -> "Discriminant":
        """The discriminant after the cluster means have moved by `shift` (K, d), covariance as it was."""
        return Discriminant(self.means + shift, self.covariance, self.priors)


def agreement(weight: np.ndarray, bias: np.ndarray, tokens: np.ndarray, labels: np.ndarray) -> float:
    """Share of the tokens (M, d) whose best score is the cluster of their sequence (M,)."""
    return float(((tokens @ weight.T + bias).argmax(axis=1) == labels).mean())
