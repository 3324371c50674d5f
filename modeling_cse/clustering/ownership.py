# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Which cluster owns which expert, and how it stays so from one fit to the next."""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
from scipy.optimize import linear_sum_assignment

from .settings import ELBOW


@dataclass
class Identities:
    """
    The P clusters that a layer remembers: those of the last fit, and absent ones whose expert is still kept.

    Fields:
        centroids (P, d) float32, radii (P,) float32: where they were seen last.
        experts (P,) int64: the slot each owns, -1 for none.
        idle (P,) int64: fits in a row in which an owner was absent or common.
    """

    centroids: np.ndarray
    radii: np.ndarray
    experts: np.ndarray
    idle: np.ndarray

    @classmethod
    def none(cls, hidden_size: int) -> "Identities":
        return cls(
            np.zeros((0, hidden_size), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
        )

    def __len__(self) -> int:
        return len(self.experts)


@dataclass
class Ownership:
    """The outcome of a fit: `experts` (K,) int64, the slot of each cluster or -1; `filled`, slots that changed hands
    and must start anew; `unserved`, long-tail clusters for which no slot was free; `identities` for the next fit;
    `absent`, slots of owners that were not found, and are waited for; `released`, slots of which the owner was absent
    or common too often, whoever has them now; `parents`, of filled slots whose cluster split off from another one's
    expert, the slot of that expert (clusters of texts)."""

    experts: np.ndarray
    filled: list[int]
    unserved: int
    identities: Identities
    absent: list[int]
    released: list[int]
    parents: dict[int, int] = field(default_factory=dict)


def long_tail(shares: np.ndarray, common_share: float | str, separations: np.ndarray | None = None) -> np.ndarray:
    """
    Which clusters are long-tail, (K,) bool.

    Args:
        shares: (K,) share of the sequences in each cluster, in any order.
        common_share: a number from 0 to 1: the largest clusters are common until together they hold that share, the
            rest is the tail; with 0 every cluster is long-tail. Or "elbow": see below.
        separations: (K,) how far the words of each cluster lie from all others (`evidence.separations`). With them the
            least separated clusters are common, not the largest.

    The elbow is how the paper tells long-tail domains (9.37 % of its corpus): sort the shares in descending order and
    draw the chord from the first to the last of them, over their ranks. The share that lies furthest below the chord
    is the elbow, the largest one where several lie equally far. Clusters with that share or a smaller one are
    long-tail. None is where no share lies below the chord: with fewer than three clusters, equal shares, shares that
    fall along a line, or several large clusters before a single small one.
    """
    if common_share == ELBOW:
        return _below_elbow(shares)
    order = np.argsort(-shares if separations is None else separations, kind="stable")
    before = np.cumsum(shares[order]) - shares[order]
    tail = np.empty(len(shares), bool)
    tail[order] = before >= cast(float, common_share) - 1e-9
    return tail


def _below_elbow(shares: np.ndarray) -> np.ndarray:
    if len(shares) < 3:
        return np.zeros(len(shares), bool)
    falling = -np.sort(-shares)
    depth = np.linspace(falling[0], falling[-1], len(falling)) - falling
    if depth.max() <= 1e-9:
        return np.zeros(len(shares), bool)
    # of equals, the first: rounding must not decide
    return shares <= falling[np.argmax(depth >= depth.max() - 1e-9)]


def match_clusters(
    old_centroids: np.ndarray, old_radii: np.ndarray, new_centroids: np.ndarray, new_radii: np.ndarray
) -> np.ndarray:
    """
    The old cluster that each new one continues, (K,) int64, -1 for a new one: the assignment with the least sum of
    distances between centroids, after the drift that all clusters share (the median shift of the matched pairs, so
    that a cluster that came or went does not move the others). A pair further apart than the larger of its radii is
    none.
    """
    matched = np.full(len(new_centroids), -1, np.int64)
    if not len(old_centroids):
        return matched
    old, new = old_centroids.astype(np.float64), new_centroids.astype(np.float64)
    drift = new.mean(axis=0) - old.mean(axis=0)
    for _ in range(3):
        rows, columns = linear_sum_assignment(np.linalg.norm(new[:, None] - old[None] - drift, axis=-1))
        drift = np.median(new[rows] - old[columns], axis=0)
    distance = np.linalg.norm(new[:, None] - old[None] - drift, axis=-1)
    for row, column in zip(*linear_sum_assignment(distance), strict=True):
        if distance[row, column] <= max(new_radii[row], old_radii[column]):
            matched[row] = column
    return matched


def assign_experts(
    identities: Identities,
    centroids: np.ndarray,
    radii: np.ndarray,
    shares: np.ndarray,
    *,
    common_share: float | str,
    num_experts: int,
    patience: int,
    matched: np.ndarray | None = None,
    separations: np.ndarray | None = None,
) -> Ownership:
    """
    Gives long-tail clusters an expert each.

    A cluster that continues an old one keeps its expert, and keeps it when it turns common or vanishes, until that has
    lasted `patience` fits: between two fits k-means may cut the bulk differently, and ownership must not flicker with
    it. Then long-tail clusters without one take free slots, the largest first. `matched` (K,): the old cluster that
    each new one continues, -1 for none; by default `match_clusters` tells. `separations` (K,): as in `long_tail`; the
    first slots are then for the largest product of share and separation.
    """
    tail = long_tail(shares, common_share, separations)
    if matched is None:
        matched = match_clusters(identities.centroids, identities.radii, centroids, radii)
    experts = np.full(len(centroids), -1, np.int64)
    idle = np.zeros(len(centroids), np.int64)
    for cluster, old in enumerate(matched):
        if old < 0 or identities.experts[old] < 0:
            continue
        idle[cluster] = 0 if tail[cluster] else identities.idle[old] + 1
        if idle[cluster] < patience:
            experts[cluster] = identities.experts[old]
        else:
            idle[cluster] = 0
    absent = [
        old
        for old in range(len(identities))
        if old not in matched and identities.experts[old] >= 0 and identities.idle[old] + 1 < patience
    ]
    kept = {int(expert) for expert in experts if expert >= 0} | {int(identities.experts[old]) for old in absent}
    free = [slot for slot in range(num_experts) if slot not in kept]
    worth = shares if separations is None else shares * separations
    waiting = [cluster for cluster in np.argsort(-worth, kind="stable") if tail[cluster] and experts[cluster] < 0]
    filled = free[: len(waiting)]
    experts[waiting[: len(free)]] = filled
    remembered = Identities(
        np.concatenate([centroids, identities.centroids[absent]]),
        np.concatenate([radii, identities.radii[absent]]),
        np.concatenate([experts, identities.experts[absent]]),
        np.concatenate([idle, identities.idle[absent] + 1]),
    )
    owned = {int(expert) for expert in identities.experts if expert >= 0}
    return Ownership(
        experts,
        filled,
        unserved=max(len(waiting) - len(free), 0),
        identities=remembered,
        absent=sorted(int(identities.experts[old]) for old in absent),
        released=sorted(owned - kept),
    )
