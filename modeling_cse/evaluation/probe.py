# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The linear probe: what a linear classifier can read from the embeddings of a frozen model, as the paper measures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler


# Inverse strengths of the L2 penalty, the strongest penalty first.
GRID = (0.001, 0.01, 0.1, 1.0)
# A score that is better when it is larger, of (predictions, labels), both (N,) int64.
Score = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Split:
    """
    Features of the rows of a split, and their labels.

    Fields:
        features: (N, d) float32; for questions with choices (N, choices, d).
        labels: (N,) int64, classes; for questions with choices the index of the right one.
    """

    features: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Probed:
    """
    What a chosen probe says.

    Fields:
        c: the inverse strength of its penalty.
        validation, test: (N,) int64 predictions.
    """

    c: float
    validation: np.ndarray
    test: np.ndarray


def linear_probe(train: Split, validation: Split, test: Split, score: Score, grid: Sequence[float] = GRID) -> Probed:
    """
    Fits a logistic regression on standardised features for every `C` of a grid and takes the best one on validation;
    of equals, the one with the strongest penalty. Probes are fitted on `train` alone, so that the numbers of both
    other splits are those of one and the same probe.

    Questions with choices get a scorer: a binary logistic regression that tells right (question, choice) pairs from
    wrong ones, whose answer is the choice with the highest score. The mean over a question's choices is taken from the
    features before: what all choices share cannot say which is right.

    Args:
        score: what is chosen by.
        grid: inverse penalties, as scikit-learn's `C`.

    Returns:
        The predictions of the chosen probe.

    Raises:
        ValueError: `grid` is empty; or scikit-learn's: for example, `train` has one class only.
    """
    if not grid:
        raise ValueError("grid=() is not allowed: it must hold at least one inverse penalty.")
    best: float | None = None
    chosen: Probed  # the first one at least, as there is a penalty
    for c in sorted(grid):
        fitted = _fit(train, c)
        predictions = _predict(fitted, validation.features)
        reached = score(predictions, validation.labels)
        if best is None or reached > best:
            best, chosen = reached, Probed(c, predictions, _predict(fitted, test.features))
    return chosen


def _fit(train: Split, c: float) -> Pipeline:
    features, labels = train.features, train.labels
    if features.ndim == 3:
        labels = (np.arange(features.shape[1]) == labels[:, None]).astype(np.int64).ravel()
        features = _centred(features)
    # Standardised features of a small model converge in some hundred iterations.
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=5000))
    return fitted.fit(features.astype(np.float64), labels)


def _predict(fitted: Pipeline, features: np.ndarray) -> np.ndarray:
    if features.ndim == 2:
        return fitted.predict(features.astype(np.float64))
    scores = fitted.decision_function(_centred(features).astype(np.float64))
    return scores.reshape(features.shape[:2]).argmax(1)


def _centred(features: np.ndarray) -> np.ndarray:
    """(N, choices, d) to (N * choices, d), each question's mean taken off."""
    return (features - features.mean(1, keepdims=True)).reshape(-1, features.shape[-1])


__all__ = ["GRID", "Probed", "Score", "Split", "linear_probe"]
