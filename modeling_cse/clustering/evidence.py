# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Evidence: what a token says about the cluster of its text, in closed form from token counts."""

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from .texts import count_tokens


# A cluster's token frequencies start as if it had read this share of the sample's tokens, at the frequencies of the
# whole sample: what is rare in a small cluster must not look like proof.
PRIOR_SHARE = 0.004
# Tokens of a text are not independent, so that the sum over them claims too much by this factor; chosen on held-out
# texts.
TEMPERS = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass
class Evidence:
    """
    Naive Bayes over unigrams with K clusters.

    Fields:
        table (V, K) float32: log p(token | cluster) - log p(token) in nats, times the temper.
        shares (K,) float64: of the texts in each cluster.
        temper: factor on every log-likelihood ratio, one of `TEMPERS`.
    """

    table: np.ndarray
    shares: np.ndarray
    temper: float = 1.0

    @classmethod
    def fit(
        cls, ids: np.ndarray, labels: np.ndarray, shares: np.ndarray, vocab_size: int, held: np.ndarray
    ) -> "Evidence":
        """
        Args:
            ids: (N, L) token ids, -1 behind the end of a text.
            labels: (N,) cluster of each text, -1 for none; every cluster has a text that is not held out.
            shares: (K,) share of each cluster.
            vocab_size: V.
            held: (N,) bool, texts that only choose the temper. With none of them it is 1.
        """
        fitted = ~held & (labels >= 0)
        whole = cls(_ratios(count_tokens(ids[fitted], vocab_size), labels[fitted], len(shares)), shares)
        held = held & (labels >= 0)
        if not held.any():
            return whole
        sums = whole.sums(ids[held])
        quality = [_log_likelihood(temper * sums + np.log(shares), ids[held], labels[held]) for temper in TEMPERS]
        temper = TEMPERS[int(np.argmax(quality))]
        return cls(whole.table * np.float32(temper), shares, temper)

    def sums(self, ids: np.ndarray) -> np.ndarray:
        """Evidence of all tokens up to each one, (N, L, K) float64."""
        return np.where((ids >= 0)[..., None], self.table[ids], 0.0).cumsum(axis=1, dtype=np.float64)

    def of_texts(self, ids: np.ndarray) -> np.ndarray:
        """The cluster of each whole text, (N,) int64; -1 where there is none."""
        if not len(self.shares):
            return np.full(len(ids), -1, np.int64)
        sums = count_tokens(ids, len(self.table)) @ self.table.astype(np.float64)
        return (sums + np.log(self.shares)).argmax(axis=1)

    def clusters(self, ids: np.ndarray) -> np.ndarray:
        """The cluster of each token by what was read up to it, (N, L) int64."""
        return (self.sums(ids) + np.log(self.shares)).argmax(axis=-1)


def _ratios(counts: csr_matrix, labels: np.ndarray, clusters: int) -> np.ndarray:
    total = np.asarray(counts.sum(axis=0))[0]
    background = (total + 1.0) / (total + 1.0).sum()
    prior = PRIOR_SHARE * total.sum()
    table = np.empty((counts.shape[1], clusters), np.float32)
    for label in range(clusters):
        own = np.asarray(counts[labels == label].sum(axis=0))[0]
        frequency = (own + prior * background) / (own.sum() + prior)
        table[:, label] = np.log(frequency / background)
    return table


def _log_likelihood(scores: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> float:
    """Mean log posterior of the right cluster over all tokens."""
    right = np.take_along_axis(log_softmax(scores, axis=-1), labels[:, None, None], axis=-1)[..., 0]
    return float(right[ids >= 0].mean())
