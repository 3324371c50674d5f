# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""How rare a sequence is by its tokens, and perplexity by that."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch

from ..training.gradients import NO_TOKEN, sentence_frequency_scores
from .perplexity import PerplexityByDomain


class NGramCounts:
    """
    How often each n-gram stands in a text, and the sentence frequency score of sequences by it: the mean relative
    frequency of their n-grams (METHOD section 3). n-grams do not reach from one row into the next.

    Args:
        tokens: (N, T) integers, the training text; `NO_TOKEN` (-1) where there is none.
        vocab_size: above every token.
        n: length of an n-gram, at least 1.

    Raises:
        ValueError: a token outside the vocabulary, no n-gram at all, or a vocabulary too large for n.
    """

    def __init__(self, tokens: np.ndarray, vocab_size: int, n: int = 1):
        if not isinstance(n, int) or n < 1 or vocab_size**n >= 2**63:
            raise ValueError(f"n={n!r} is not allowed: it must be an int >= 1, with {vocab_size} ** n below 2 ** 63.")
        self.vocab_size, self.n = vocab_size, n
        codes = self._codes(tokens)
        self.codes, self.counts = np.unique(codes[codes != NO_TOKEN], return_counts=True)
        if not len(self.codes):
            raise ValueError(f"tokens of shape {np.shape(tokens)} is not allowed: it must hold at least {n} in a row.")

    def _codes(self, tokens: np.ndarray) -> np.ndarray:
        """(N, T - n + 1) int64: each n-gram as one number."""
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.ndim != 2:
            raise ValueError(f"tokens of shape {tokens.shape} is not allowed: it must be (N, T).")
        if tokens.size and not (NO_TOKEN <= tokens.min() and tokens.max() < self.vocab_size):
            raise ValueError(
                f"tokens from {tokens.min()} to {tokens.max()} is not allowed: they must be below {self.vocab_size}, "
                f"and at least 0 or {NO_TOKEN}."
            )
        width = max(tokens.shape[1] - self.n + 1, 0)
        codes, whole = np.zeros((len(tokens), width), np.int64), np.ones((len(tokens), width), bool)
        for place in range(self.n):
            part = tokens[:, place : place + width]
            codes, whole = codes * self.vocab_size + part, whole & (part != NO_TOKEN)
        return np.where(whole, codes, NO_TOKEN)

    def scores(self, tokens: np.ndarray) -> np.ndarray:
        """
        Args:
            tokens: (N, T) integers; n-grams that the text does not have count as 0.

        Returns:
            (N,) float64 in 0 to 1; NaN for a sequence without an n-gram.
        """
        codes = self._codes(tokens)
        places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
        unknown = len(self.codes)
        places = np.where(self.codes[places] == codes, places, np.where(codes == NO_TOKEN, NO_TOKEN, unknown))
        return sentence_frequency_scores(torch.from_numpy(places), torch.from_numpy(np.append(self.counts, 0))).numpy()


def quantile_bins(scores: Sequence[float], bins: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Bins of about equally many sequences. Equal scores share a bin, so that ties may leave fewer.

    Args:
        scores: (N,) numbers.
        bins: how many, at least 1.

    Returns:
        (N,) int64, the bin of each, 0 for the lowest scores; and (bins, 2) float64, lowest and highest score of each.

    Raises:
        ValueError: no score, one that is NaN or infinite, or a wrong number of bins.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins={bins!r} is not allowed: it must be an int >= 1.")
    if not len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"scores ({len(scores)}) is not allowed: there must be some, and all of them finite.")
    edges = np.quantile(scores, np.arange(1, bins) / bins)
    _, places = np.unique(np.searchsorted(edges, scores, side="right"), return_inverse=True)
    ends = [(scores[places == place].min(), scores[places == place].max()) for place in range(places.max() + 1)]
    return places, np.asarray(ends)


class PerplexityByBin(PerplexityByDomain):
    """
    Perplexity over everything and in bins of a score; a third feature `scores` has each sequence's, and
    `compute(bins=5)` takes their number. Bins are quantiles over the sequences, lowest scores first: they depend on
    the scores alone, so that models measured on the same sequences have the same bins.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.description = "Perplexity by bin: exp of the token-mean negative log likelihood in quantiles of a score."
        info.inputs_description = info.inputs_description.partition("    domains:")[0]
        info.inputs_description += "    scores: the score of each sequence, like its sentence frequency (float64).\n"
        features = {name: value for name, value in info.features.items() if name != "domains"}
        info.features = datasets.Features({**features, "scores": datasets.Value("float64")})
        return info

    # `evaluate` hands features over by name, and a metric has its own
    def _compute(  # type: ignore[override]
        self, predictions: Sequence[float], references: Sequence[int], scores: Sequence[float], bins: int = 5
    ) -> dict:
        places, ends = quantile_bins(scores, bins)
        result = super()._compute(predictions, references, places)
        names = [str(place) for place in range(len(ends))]
        return {
            "perplexity": result["perplexity"],
            "loss": result["loss"],
            "perplexity_by_bin": [result["perplexity_by_domain"][name] for name in names],
            "tokens_by_bin": [result["tokens_by_domain"][name] for name in names],
            "sequences_by_bin": np.bincount(places).tolist(),
            "score_ranges": ends.tolist(),
        }


__all__ = ["NGramCounts", "PerplexityByBin", "quantile_bins"]
