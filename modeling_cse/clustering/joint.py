# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One clustering of the sampled texts for all sites of a model, and the evidence that tells it from tokens."""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
from scipy.optimize import linear_sum_assignment

from .algorithms import Clustering, describe_clusters
from .copies import are_copies
from .evidence import Evidence, separations
from .ownership import Identities, Ownership, assign_experts
from .settings import GIVEN, SEPARATION, ClusterSettings
from .texts import cluster_texts, embed_texts


# Two clusters that share less of their tokens are not the same one (intersection over union).
LEAST_OVERLAP = 0.2


@dataclass
class JointFit:
    """
    What a fit found for a whole model, before anything is written.

    Fields:
        labels (N,) int64: the cluster of each sampled text, -1 for none.
        shares (K,) float64: of the tokens in each cluster.
        clustering: in the space of the texts.
        ownership: its `identities` are clusters known by their evidence, see `fit_texts`.
        evidence: of the clusters.
        held (N,) bool: texts that it was measured on and not fitted on.
        metrics: by name.
    """

    labels: np.ndarray
    shares: np.ndarray
    clustering: Clustering
    ownership: Ownership
    evidence: Evidence
    held: np.ndarray
    metrics: dict[str, float] = field(default_factory=dict)


def fit_texts(
    ids: np.ndarray,
    given: np.ndarray,
    held: np.ndarray,
    settings: ClusterSettings,
    identities: Identities,
    *,
    vocab_size: int,
    num_experts: int,
    max_clusters: int,
    older: np.ndarray | None = None,
    older_given: np.ndarray | None = None,
) -> JointFit:
    """
    Clusters texts by their tokens (or takes their labels), matches the clusters to those of the fit before, and gives
    out experts. Writes nothing.

    Args:
        ids: (N, L) token ids, -1 behind the end of a text.
        given: (N,) labels that came with the batches, read by `algorithm="given"`.
        held: (N,) bool, texts to measure on.
        settings: how clusters are found and kept.
        identities: P clusters of the fits before. In place of a centroid each has its evidence (V,), in place of a
            radius its share: a new cluster continues the one whose texts it has.
        vocab_size: V. num_experts: slots. max_clusters: how many the routers can hold.
        older: (M, L') texts that no cluster is looked for in, but whose tokens are counted for evidence: each for the
            cluster that the evidence of the sample gives it.
        older_given: (M,) the labels that came with them, by which `algorithm="given"` counts them.

    Raises:
        ValueError: see `find_clusters`; labels with gaps, or none at all.
    """
    settings = settings.resolve("evidence")
    if settings.algorithm == GIVEN:
        labels, clustering = given, _given_clusters(embed_texts(ids, vocab_size, settings.seed), given, max_clusters)
    else:
        clustering = cluster_texts(ids, vocab_size, settings, max_clusters)
        labels = clustering.labels
    # a cluster of which every text is held out would have none to be fitted on
    held = held & np.isin(labels, labels[~held])
    lengths = (ids >= 0).sum(axis=1)
    shares = np.bincount(labels[labels >= 0], lengths[labels >= 0]) / lengths[labels >= 0].sum()
    evidence = Evidence.fit(ids, labels, shares, vocab_size, held)
    if older is not None and len(older):
        # what is held out may be among them, from an epoch before or read ahead, and would be measured on itself
        fresh = ~are_copies(older, ids[held])
        told = older_given[fresh] if older_given is not None and settings.algorithm == GIVEN else None
        evidence = evidence.counted_on(ids[~held], labels[~held], older[fresh], told)
    apart = separations(ids, labels, len(clustering), vocab_size) if settings.common_by == SEPARATION else None
    before = Evidence(identities.centroids.T, identities.radii).of_texts(ids)
    ownership = assign_experts(
        identities,
        evidence.table.T,
        shares.astype(np.float32),
        shares,
        common_share=cast(float | str, settings.common_share),
        num_experts=num_experts,
        patience=settings.patience,
        matched=match_texts(before, len(identities), labels, len(clustering), lengths),
        separations=apart,
    )
    then = np.append(identities.experts, -1)[before]
    ownership.parents = parents_of(ownership, labels, then, lengths)
    fit = JointFit(labels, shares, clustering, ownership, evidence, held)
    fit.metrics = {
        "inherited": len(ownership.parents),
        "text_clarity": clustering.clarity,
        "smoothing": evidence.smoothing,
        "temper": evidence.temper,
    }
    owners = ownership.experts >= 0
    if apart is not None and owners.any():
        fit.metrics["separation"] = float(np.average(apart[owners], weights=shares[owners]))
    if clustering.silhouette is not None:
        fit.metrics["silhouette"] = clustering.silhouette
    if len(identities):
        now = np.append(ownership.experts, -1)[evidence.of_texts(ids)]
        fit.metrics["churn"] = float((then != now).mean())
    return fit


def parents_of(ownership: Ownership, labels: np.ndarray, then: np.ndarray, lengths: np.ndarray) -> dict[int, int]:
    """
    Which experts have served the texts of clusters that get an expert only now: a domain that falls into two clusters
    would lose, for the half that begins anew, all that its expert has learned.

    Args:
        ownership: of the new clusters.
        labels: (N,) the new cluster of each text, -1 for none.
        then: (N,) the expert of each text before this fit, -1 for none.
        lengths: (N,) tokens of each text.

    Returns:
        Filled slots, and the slot that served more than half of the tokens of their texts.
    """
    now, parents = np.append(ownership.experts, -1)[labels], {}
    for slot in ownership.filled:
        own = now == slot
        served, tokens = then[own], lengths[own]
        counts = np.bincount(served[served >= 0], tokens[served >= 0], minlength=1)
        if counts.max() > tokens.sum() / 2:
            parents[slot] = int(counts.argmax())
    return parents


def match_texts(old_labels: np.ndarray, old: int, labels: np.ndarray, new: int, lengths: np.ndarray) -> np.ndarray:
    """
    The old cluster that each new one continues, (new,) int64, -1 for a new one: the assignment that shares most text.

    Args:
        old_labels: (N,) the old cluster of each text, one of `old`.
        labels: (N,) the new one, one of `new`, -1 for none.
        lengths: (N,) tokens of each text.
    """
    matched = np.full(new, -1, np.int64)
    if not old:
        return matched
    overlap = np.zeros((new, old))
    for cluster in range(new):
        for other in range(old):
            both = lengths[(labels == cluster) & (old_labels == other)].sum()
            overlap[cluster, other] = both / max(lengths[(labels == cluster) | (old_labels == other)].sum(), 1)
    for row, column in zip(*linear_sum_assignment(-overlap), strict=True):
        if overlap[row, column] >= LEAST_OVERLAP:
            matched[row] = column
    return matched


def _given_clusters(embeddings: np.ndarray, labels: np.ndarray, max_clusters: int) -> Clustering:
    inside = labels >= 0
    found = np.unique(labels[inside])
    if not len(found) or found[-1] >= max_clusters or len(found) != found[-1] + 1:
        raise ValueError(
            f"given_clusters {found.tolist()} of {len(labels)} sampled sequences are not allowed: they must be "
            f"numbered from 0 without gaps, and be fewer than cse_max_clusters={max_clusters}."
        )
    return describe_clusters(embeddings[inside], labels[inside])
