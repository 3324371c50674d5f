# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Copies within a sample of texts: the same text read in two epochs, for a BERT under two masks."""

import numpy as np
from scipy.sparse import csr_matrix, triu
from scipy.sparse.csgraph import connected_components


# Two texts that have this share of their places in common are one. Two masks of 15 % leave about three quarters of
# them; texts that only begin alike (forms, templates) are meant to have less than half.
LEAST_SHARED = 0.5
# Only texts with a run of tokens in common are compared: all pairs of a sample would be millions.
RUN = 2


def first_copies(ids: np.ndarray) -> np.ndarray:
    """
    The first text of a sample that each one is a copy of, itself where there is none before it. Copies agree place by
    place: a text that begins elsewhere in its document is another one. What is a copy of a copy is one too.

    Args:
        ids: (N, L) token ids, -1 behind the end of a text.

    Returns:
        (N,) int64, indices into the sample.
    """
    texts, places = np.unique(ids, axis=0, return_inverse=True)
    one, other = _with_a_run_in_common(texts)
    close = _share_in_common(texts, one, other) >= LEAST_SHARED
    pairs = csr_matrix((np.ones(close.sum()), (one[close], other[close])), shape=(len(texts), len(texts)))
    groups = connected_components(pairs, directed=False)[1][places.reshape(-1)]
    _, firsts, numbers = np.unique(groups, return_index=True, return_inverse=True)
    return firsts[numbers.reshape(-1)]


def _with_a_run_in_common(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of texts (P,), (P,) that have a run of `RUN` tokens, or a shorter last one, at the same place."""
    padded = np.pad(texts, ((0, 0), (0, -texts.shape[1] % RUN)), constant_values=-1)
    runs = padded.reshape(len(texts), padded.shape[1] // RUN, RUN)
    rows, numbers = np.nonzero(runs[:, :, 0] >= 0)
    # hashes: where two runs have the same one, the pair is compared in vain
    factors = np.random.default_rng(0).integers(1 << 62, size=RUN + 1)
    keys = np.column_stack([numbers, runs[rows, numbers]]) @ factors
    _, columns = np.unique(keys, return_inverse=True)
    shape = len(texts), columns.max(initial=0) + 1
    has = csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape)
    both = triu(has @ has.T, k=1).tocoo()
    return both.row, both.col


def _share_in_common(texts: np.ndarray, first: np.ndarray, second: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """Of the places that either text of a pair has, the share at which both have the same token, (P,)."""
    shares = [np.empty(0)]
    for start in range(0, len(first), chunk):
        one, other = texts[first[start : start + chunk]], texts[second[start : start + chunk]]
        there = (one >= 0) | (other >= 0)
        shares.append(((one == other) & there).sum(axis=1) / there.sum(axis=1))
    return np.concatenate(shares)
