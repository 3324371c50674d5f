# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The sequences that stand for a cluster."""

import numpy as np


def typical_rows(distances: np.ndarray, labels: np.ndarray, most: int = 3) -> list[list[int]]:
    """
    The members of each cluster that are most its own.

    Args:
        distances: (N, K) of N sequences from the K clusters, in any measure that grows with distance.
        labels: (N,) int, the cluster of each.
        most: members a cluster.

    Returns:
        For each cluster the rows of its members, the nearest first; fewer where it has fewer.
    """
    chosen = []
    for label in range(distances.shape[1]):
        members = np.flatnonzero(labels == label)
        nearest = np.argsort(distances[members, label], kind="stable")[:most]
        chosen.append(members[nearest].tolist())
    return chosen


def passage(text: str, most: int = 180) -> str:
    """The beginning of a sequence on one line. Blocks are cut anywhere, so it begins behind the first space, and ends
    at the last one that fits; text without spaces is cut where it must be."""
    line = " ".join(text.split())
    _, space, rest = line.partition(" ")
    line = rest if space and len(line) > most else line
    if len(line) <= most:
        return line
    cut = line[: most + 1].rpartition(" ")[0] or line[:most]
    return f"{cut} …"
