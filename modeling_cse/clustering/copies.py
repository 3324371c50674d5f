# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Copies within a sample of texts: the same text read in two epochs, for a BERT under two masks."""

import numpy as np
from scipy.sparse import csr_matrix, triu
from scipy.sparse.csgraph import connected_components


# Two texts that have this share of their places in common are one. Two masks of 15 % leave about three quarters of
# them; texts that only begin alike (forms, templates) are meant to have less than half.
LEAST_SHARED = 0.5
# Texts that are looked up among all others at a time, so that not all pairs of a sample are in memory at once.
ROWS = 256


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
    one, other = _close_pairs(texts)
    pairs = csr_matrix((np.ones(len(one)), (one, other)), shape=(len(texts), len(texts)))
    groups = connected_components(pairs, directed=False)[1][places.reshape(-1)]
    _, firsts, numbers = np.unique(groups, return_index=True, return_inverse=True)
    return firsts[numbers.reshape(-1)]


def are_copies(ids: np.ndarray, of: np.ndarray) -> np.ndarray:
    """
    Which texts among some are a copy of any among others, as `first_copies` has it but for copies of copies.

    Args:
        ids: (M, L) token ids, -1 behind the end of a text.
        of: (N, L') others.

    Returns:
        (M,) bool.
    """
    longest = max(ids.shape[1], of.shape[1])
    whole = [np.pad(part, ((0, 0), (0, longest - part.shape[1])), constant_values=-1) for part in (of, ids)]
    has, lengths = _tokens_at_places(np.concatenate(whole))
    found, of_columns = np.zeros(len(ids), bool), has[len(of) :].T.tocsr()
    for start in range(0, len(of), ROWS):
        common = (has[start : min(start + ROWS, len(of))] @ of_columns).tocoo()
        longer = np.maximum(lengths[common.row + start], lengths[common.col + len(of)])
        found[common.col[common.data >= LEAST_SHARED * longer]] = True
    return found


def _close_pairs(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of texts (P,), (P,) that have the same token at `LEAST_SHARED` of the places that either of them has."""
    has, lengths = _tokens_at_places(texts)
    of_columns = has.T.tocsr()
    found = [np.empty((2, 0), np.int64)]
    for start in range(0, len(texts), ROWS):
        common = triu(has[start : start + ROWS] @ of_columns, k=start + 1).tocoo()
        one, other = common.row + start, common.col
        close = common.data >= LEAST_SHARED * np.maximum(lengths[one], lengths[other])
        found.append(np.stack([one[close], other[close]]))
    one, other = np.concatenate(found, axis=1)
    return one, other


def _tokens_at_places(texts: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
    """What each text (P, L) has where: (P, columns) int32, a column for each token at a place; and lengths (P,)."""
    rows, places = np.nonzero(texts >= 0)
    keys = places * (texts.max(initial=0) + np.int64(1)) + texts[rows, places]
    _, columns = np.unique(keys, return_inverse=True)
    shape = len(texts), columns.max(initial=-1) + 1
    return csr_matrix((np.ones(len(rows), np.int32), (rows, columns)), shape), np.bincount(rows, minlength=len(texts))
