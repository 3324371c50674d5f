# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Evidence: what a token says about the cluster of its text, in closed form from token counts."""

from dataclasses import dataclass
from typing import cast

import numpy as np
from scipy.sparse import csr_matrix, vstack
from scipy.special import log_softmax

from ..evidence_cse import INDEPENDENT
from .texts import count_tokens


# A cluster's token frequencies start as if it had read this share of the sample's tokens, at the frequencies of the
# whole sample: what is rare in a small cluster must not look like proof.
SMOOTHINGS = (0.004, 0.02, 0.1)
# Factors on all evidence: tokens that lie next to each other are not independent either.
TEMPERS = (2.0, 1.0, 0.5, 0.25, 0.125)


@dataclass
class Evidence:
    """
    Naive Bayes over unigrams with K clusters.

    Fields:
        table (V, K) float32: log p(token | cluster) - log p(token) in nats, times the temper.
        shares (K,) float64: of the texts in each cluster.
        smoothing: share of the sample's tokens that each cluster is given beforehand, one of `SMOOTHINGS`.
        temper: factor on every log-likelihood ratio, one of `TEMPERS`.
    """

    table: np.ndarray
    shares: np.ndarray
    smoothing: float = SMOOTHINGS[0]
    temper: float = 1.0

    @classmethod
    def fit(
        cls, ids: np.ndarray, labels: np.ndarray, shares: np.ndarray, vocab_size: int, held: np.ndarray
    ) -> "Evidence":
        """
        Smoothing and temper are those that make the clusters of held-out texts likeliest, from every token on. A token
        that no text has says nothing: otherwise each one would speak for the small clusters, and where the texts have
        no masks and the batches do, those are many.

        Args:
            ids: (N, L) token ids, -1 behind the end of a text.
            labels: (N,) cluster of each text, -1 for none; every cluster has a text that is not held out.
            shares: (K,) share of each cluster.
            vocab_size: V.
            held: (N,) bool, texts that only choose. With none of them it is the first smoothing, and a temper of 1.
        """
        fitted = ~held & (labels >= 0)
        counts, of_counts = count_tokens(ids[fitted], vocab_size), labels[fitted]
        held = held & (labels >= 0)
        if not held.any():
            return cls(_table(counts, of_counts, len(shares), SMOOTHINGS[0]), shares)
        best: Evidence | None = None
        likeliest = -np.inf
        for smoothing in SMOOTHINGS:
            whole = cls(_table(counts, of_counts, len(shares), smoothing), shares, smoothing)
            sums = whole.sums(ids[held])
            for temper in TEMPERS:
                likelihood = _log_likelihood(temper * sums + np.log(shares), ids[held], labels[held])
                if likelihood > likeliest:
                    best, likeliest = cls(whole.table * np.float32(temper), shares, smoothing, temper), likelihood
        return cast(Evidence, best)  # any finite likelihood is above -inf

    def counted_on(
        self, ids: np.ndarray, labels: np.ndarray, more: np.ndarray, of_more: np.ndarray | None = None
    ) -> "Evidence":
        """
        The same clusters, smoothing and temper, counted on further texts too: token frequencies of a rare cluster are
        rough where a sample has few texts of it.

        Args:
            ids, labels: (N, L) and (N,), the texts that this evidence was fitted on.
            more: (M, L') further ones.
            of_more: (M,) their clusters; what is none of this evidence's is not counted. Default: the one that this
                evidence gives each.
        """
        vocab_size, clusters = len(self.table), len(self.shares)
        of_more = self.of_texts(more) if of_more is None else of_more
        inside, known = labels >= 0, (of_more >= 0) & (of_more < clusters)
        counts = vstack([count_tokens(ids[inside], vocab_size), count_tokens(more[known], vocab_size)], format="csr")
        of_counts = np.concatenate([labels[inside], of_more[known]])
        table = _table(counts, of_counts, clusters, self.smoothing) * np.float32(self.temper)
        return Evidence(table, self.shares, self.smoothing, self.temper)

    def sums(self, ids: np.ndarray) -> np.ndarray:
        """Evidence of all tokens up to each one, discounted by their number: (N, L, K) float64."""
        inside = ids >= 0
        sums = np.where(inside[..., None], self.table[ids], 0.0).cumsum(axis=1, dtype=np.float64)
        return sums * _discount(inside.cumsum(axis=1))[..., None]

    def of_texts(self, ids: np.ndarray) -> np.ndarray:
        """The cluster of each whole text, (N,) int64; -1 where there is none."""
        if not len(self.shares):
            return np.full(len(ids), -1, np.int64)
        sums = count_tokens(ids, len(self.table)) @ self.table.astype(np.float64)
        return (sums * _discount((ids >= 0).sum(axis=1))[:, None] + np.log(self.shares)).argmax(axis=1)

    def clusters(self, ids: np.ndarray) -> np.ndarray:
        """The cluster of each token by what was read up to it, (N, L) int64."""
        return (self.sums(ids) + np.log(self.shares)).argmax(axis=-1)


def log_ratios(counts: csr_matrix, labels: np.ndarray, clusters: int, smoothing: float) -> np.ndarray:
    """log p(token | cluster) - log p(token), (V, K) float32, of counts (N, V) of texts with labels (N,)."""
    background, prior = _background(np.asarray(counts.sum(axis=0))[0], smoothing)
    table = np.empty((counts.shape[1], clusters), np.float32)
    for label in range(clusters):
        own = np.asarray(counts[labels == label].sum(axis=0))[0]
        frequency = (own + prior * background) / (own.sum() + prior)
        table[:, label] = np.log(frequency / background)
    return table


def _table(counts: csr_matrix, labels: np.ndarray, clusters: int, smoothing: float) -> np.ndarray:
    """`log_ratios`, and nothing of tokens that no text has."""
    table = log_ratios(counts, labels, clusters, smoothing)
    table[np.asarray(counts.sum(axis=0))[0] == 0] = 0.0
    return table


def separation(
    ids: np.ndarray, labels: np.ndarray, held_ids: np.ndarray, held_labels: np.ndarray, clusters: int, vocab_size: int
) -> np.ndarray:
    """
    How far the words of each cluster lie from all others: what its own token frequencies save over those of all
    texts, in nats a token, on texts of which they have seen nothing. It is the gain of a unigram model.

    Args:
        ids, held_ids: (N, L) and (M, L') token ids of texts that are counted, and of those that are measured, -1 where
            there is none. No document should be in both: one that goes on looks like a cluster.
        labels, held_labels: (N,) and (M,) their clusters.
        clusters: K. vocab_size: V.

    Returns:
        (K,) float64, NaN for a cluster without a measured text; below 0 where its frequencies mislead.
    """
    table = log_ratios(count_tokens(ids, vocab_size), labels, clusters, SMOOTHINGS[1])
    counts = count_tokens(held_ids, vocab_size)
    found = np.full(clusters, np.nan)
    for label in np.unique(held_labels):
        own = np.asarray(counts[held_labels == label].sum(axis=0))[0]
        found[label] = own @ table[:, label] / own.sum()
    return found


def separations(ids: np.ndarray, labels: np.ndarray, clusters: int, vocab_size: int) -> np.ndarray:
    """
    The separation of every cluster within one sample: each text is measured by the token frequencies that its cluster
    has without it.

    Args:
        ids: (N, L) token ids, -1 behind the end of a text.
        labels: (N,) their clusters, -1 for none.
        clusters: K. vocab_size: V.

    Returns:
        (K,) float64; 0 for a cluster without texts.
    """
    counts, labels = count_tokens(ids[labels >= 0], vocab_size).tocoo(), labels[labels >= 0]
    background, prior = _background(np.asarray(counts.sum(axis=0))[0], SMOOTHINGS[0])
    of_texts, of_clusters = np.asarray(counts.sum(axis=1))[:, 0], np.zeros((clusters, vocab_size))
    own = labels[counts.row]
    np.add.at(of_clusters, (own, counts.col), counts.data)
    total = of_clusters.sum(axis=1)
    rest = of_clusters[own, counts.col] - counts.data + prior * background[counts.col]
    frequency = rest / (total[own] - of_texts[counts.row] + prior)
    gains = np.bincount(own, counts.data * np.log(frequency / background[counts.col]), minlength=clusters)
    return gains / np.maximum(total, 1.0)


def _background(total: np.ndarray, smoothing: float) -> tuple[np.ndarray, float]:
    """Token frequencies (V,) of all texts, and how many tokens of them each cluster is given beforehand."""
    return (total + 1.0) / (total + 1.0).sum(), smoothing * total.sum()


def _discount(tokens: np.ndarray) -> np.ndarray:
    return 1.0 / np.sqrt(1.0 + tokens / INDEPENDENT)


def _log_likelihood(scores: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> float:
    """Mean log posterior of the right cluster over all tokens."""
    right = np.take_along_axis(log_softmax(scores, axis=-1), labels[:, None, None], axis=-1)[..., 0]
    return float(right[ids >= 0].mean())
