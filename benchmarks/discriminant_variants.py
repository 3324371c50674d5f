# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Ways to read a token's cluster from its own state, under study: plain, aware of the position, fitted on soft labels.

Each is a function of a `Tokens` sample and gives a `Rule`: scores linear in the state, with an own set of weights for
each bucket of positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax
from sklearn.covariance import ledoit_wolf

from modeling_cse.clustering import Discriminant


# Upper ends of the buckets of positions; the last one is open.
BUCKETS = (8, 32, 128)
BUCKET_NAMES = ("0-8", "8-32", "32-128", "128-")


def bucket_of(positions: np.ndarray) -> np.ndarray:
    """The bucket of each position, in the shape given, int64."""
    return np.digitize(positions, BUCKETS)


@dataclass
class Tokens:
    """
    What a discriminant is fitted on: m tokens of each of N sequences in K clusters.

    Fields:
        states (N, m, d), buckets (N, m) int64.
        labels (N,) int64, and memberships (N, K): minus the radius-scaled distance of a sequence to each centroid.
        shares (K,): of the clusters.
    """

    states: np.ndarray
    buckets: np.ndarray
    labels: np.ndarray
    nearness: np.ndarray
    shares: np.ndarray

    @cached_property
    def plain(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight (K, d) and bias (K,) of the discriminant as it is in the package."""
        states, labels, _ = self.flat()
        return Discriminant.fit(states, labels, self.shares).weights()

    def flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States (N * m, d) float64, their clusters and their buckets (N * m,)."""
        count, width = self.states.shape[1:]
        return self.states.reshape(-1, width).astype(np.float64), self.labels.repeat(count), self.buckets.flatten()


@dataclass
class Rule:
    """Scores of a token: `weight[b] x + bias[b]`, log-posteriors up to a constant; weight (B, K, d), bias (B, K)."""

    weight: np.ndarray
    bias: np.ndarray

    def scores(self, states: np.ndarray, buckets: np.ndarray) -> np.ndarray:
        """Scores (N, m, K) of states (N, m, d) in buckets (N, m)."""
        out = np.empty((*buckets.shape, self.bias.shape[1]))
        for bucket in range(len(self.bias)):
            inside = buckets == bucket
            out[inside] = states[inside] @ self.weight[bucket].T + self.bias[bucket]
        return out


def everywhere(weight: np.ndarray, bias: np.ndarray) -> Rule:
    """The same weights in all buckets."""
    count = len(BUCKET_NAMES)
    return Rule(np.broadcast_to(weight, (count, *weight.shape)), np.broadcast_to(bias, (count, *bias.shape)))


def plain(tokens: Tokens) -> Rule:
    """The discriminant as it is in the package."""
    return everywhere(*tokens.plain)


def position_priors(tokens: Tokens) -> Rule:
    """The prior of a cluster in a bucket is the share of the bucket's tokens that stand in it."""
    _, labels, buckets = tokens.flat()
    weight, bias = tokens.plain
    counts = np.stack([np.bincount(labels[buckets == b], minlength=len(bias)) for b in range(len(BUCKET_NAMES))])
    priors = (counts + 0.5) / (counts + 0.5).sum(axis=1, keepdims=True)
    rule = everywhere(weight, bias - np.log(tokens.shares))
    return Rule(rule.weight, rule.bias + np.log(priors))


def calibrated(by_position: bool, priors: bool) -> Callable[[Tokens], Rule]:
    """
    The evidence (scores without priors) times a scale, which stands for a covariance that is a multiple of the pooled
    one, and with `priors` fitted log-priors in place of the clusters' shares: maximum likelihood of the training
    tokens' clusters, in each bucket or over all positions.
    (Scaling by the ratio of variances is no use: early states are not wider, they know less.)
    """

    def fit(tokens: Tokens) -> Rule:
        states, labels, buckets = tokens.flat()
        weight, bias = tokens.plain
        prior = np.log(tokens.shares)
        evidence = states @ weight.T + (bias - prior)
        found = []
        for bucket in range(len(BUCKET_NAMES)):
            rows = buckets == bucket if by_position else np.ones(len(labels), bool)
            found.append(_scale_and_priors(evidence[rows], labels[rows], prior, priors))
        weights = np.stack([scale * weight for scale, _ in found])
        return Rule(weights, np.stack([scale * (bias - prior) + fitted for scale, fitted in found]))

    return fit


def _scale_and_priors(
    evidence: np.ndarray, labels: np.ndarray, prior: np.ndarray, fit_priors: bool
) -> tuple[float, np.ndarray]:
    """Scale and log-priors (K,) with the largest likelihood of labels (M,) given evidence (M, K)."""

    def loss(parameters: np.ndarray) -> float:
        scores = log_softmax(np.exp(parameters[0]) * evidence + (parameters[1:] if fit_priors else prior), axis=1)
        return -scores[np.arange(len(labels)), labels].mean()

    found = minimize(loss, [0.0, *prior] if fit_priors else [0.0], method="L-BFGS-B").x
    return float(np.exp(found[0])), found[1:] if fit_priors else prior


def position_means(tokens: Tokens) -> Rule:
    """Class means of each bucket, around which the covariance is pooled over clusters and buckets."""
    states, labels, buckets = tokens.flat()
    groups = buckets * len(tokens.shares) + labels
    means = np.stack([states[groups == group].mean(axis=0) for group in range(len(BUCKET_NAMES) * len(tokens.shares))])
    covariance, _ = ledoit_wolf(states - means[groups], assume_centered=True)
    weight = np.linalg.solve(covariance, means.T).T
    bias = np.log(np.tile(tokens.shares, len(BUCKET_NAMES))) - 0.5 * (weight * means).sum(axis=1)
    return Rule(weight.reshape(len(BUCKET_NAMES), len(tokens.shares), -1), bias.reshape(len(BUCKET_NAMES), -1))


def soft(sharpness: float) -> Callable[[Tokens], Rule]:
    """Fitted on memberships softmax(-sharpness * distance / radius) of the sequences in place of their clusters."""

    def fit(tokens: Tokens) -> Rule:
        states, _, _ = tokens.flat()
        members = softmax(sharpness * tokens.nearness, axis=1)
        shares = members.mean(axis=0)
        weights = members.repeat(tokens.states.shape[1], axis=0)
        means = (weights.T @ states) / weights.sum(axis=0)[:, None]
        # Rows weighted by the root of the membership: their covariance is the weighted one.
        rows = [np.sqrt(len(means) * weights[:, [k]]) * (states - mean) for k, mean in enumerate(means)]
        covariance, _ = ledoit_wolf(np.concatenate(rows), assume_centered=True)
        return everywhere(*Discriminant(means, covariance, shares).weights())

    return fit


VARIANTS: dict[str, Callable[[Tokens], Rule]] = {
    "plain": plain,
    "priors by position": position_priors,
    "covariance scaled by position": calibrated(by_position=True, priors=False),
    "scale and priors fitted by position": calibrated(by_position=True, priors=True),
    "scale and priors fitted for all positions": calibrated(by_position=False, priors=True),
    "means by position": position_means,
    "soft memberships, sharpness 1": soft(1.0),
    "soft memberships, sharpness 4": soft(4.0),
    "soft memberships, sharpness 16": soft(16.0),
}
