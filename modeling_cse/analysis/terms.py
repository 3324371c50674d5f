# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The words that tell a cluster's texts from all others."""

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer


# Runs of at least three letters of any alphabet.
WORD = r"(?u)\b[^\W\d_]{3,}\b"
# A word in fewer texts is an accident of them; and z-scores below are no evidence (one in forty words by chance).
LEAST_TEXTS = 4
LEAST_SCORE = 1.96
# Weight of the prior, over that of all texts.
PRIOR = 0.1


def top_terms(texts: list[str], labels: np.ndarray, count: int, most: int = 10) -> list[list[str]]:
    """
    The words that are most over-represented in each cluster.

    Words are counted once a text, so that one text which repeats a name does not speak for its cluster. The score is
    the log-odds of a word in the cluster against all other texts, with all texts as prior, over its standard error
    (Monroe, Colaresi and Quinn, "Fightin' Words", Political Analysis 2008: an informative Dirichlet prior).

    Args:
        texts: N texts.
        labels: (N,) int, the cluster of each.
        count: number of clusters.
        most: words a cluster.

    Returns:
        For each cluster words in lower case, the most telling first; fewer or none where there is no evidence.
    """
    vectorizer = CountVectorizer(token_pattern=WORD, binary=True, min_df=min(LEAST_TEXTS, len(texts)))
    try:
        found = vectorizer.fit_transform(texts)
    except ValueError:  # no word is left, as in scripts without spaces
        return [[] for _ in range(count)]
    words = vectorizer.get_feature_names_out()
    counts = np.stack([np.asarray(found[labels == label].sum(axis=0)).ravel() for label in range(count)]).astype(float)
    whole = counts.sum(axis=0)
    result = []
    for own in counts:
        score = _log_odds(own, whole - own, PRIOR * whole)
        order = np.argsort(-score, kind="stable")[:most]
        result.append([str(words[place]) for place in order if score[place] >= LEAST_SCORE and own[place] > 0])
    return result


def _log_odds(own: np.ndarray, others: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """z-scores (V,) of counts (V,) in one group against another, under a Dirichlet prior (V,)."""

    def logit(counts: np.ndarray) -> np.ndarray:
        weight = counts + prior
        return np.log(weight) - np.log(weight.sum() - weight)

    if len(prior) < 2:
        return np.zeros(len(prior))  # the only word there is tells nothing
    return (logit(own) - logit(others)) / np.sqrt(1 / (own + prior) + 1 / (others + prior))
