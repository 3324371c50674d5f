# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""How much better or worse one model predicts groups of sequences than its twin, and how sure that is."""

from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap, t


LEVEL = 0.95
DRAWS = 2000
# Of fewer sequences a bootstrap says next to nothing.
LEAST_SEQUENCES = 8


@dataclass(frozen=True)
class Gain:
    """
    One group of held-out sequences.

    Fields:
        sequences: in the group (of the first seed, where it differs between seeds).
        dense, cse: perplexities, exp of the token-mean loss; over seeds the geometric mean.
        ratio: of the two; below 1 is a gain.
        low, high: 95 % interval of the ratio; None where there is too little to tell.
        seeds: trainings that have such a group; all numbers are of these.
    """

    sequences: int
    dense: float
    cse: float
    ratio: float
    low: float | None
    high: float | None
    seeds: int = 1

    @property
    def better(self) -> bool:
        """The whole interval is below 1."""
        return self.high is not None and self.high < 1

    @property
    def worse(self) -> bool:
        """The whole interval is above 1."""
        return self.low is not None and self.low > 1


@dataclass(frozen=True)
class Losses:
    """The N held-out sequences under both models of one seed: `dense` and `cse` (N,) summed losses in nats, `tokens`
    (N,) how many were predicted, and `inside` (N,) bool, which of them belong to the group."""

    dense: np.ndarray
    cse: np.ndarray
    tokens: np.ndarray
    inside: np.ndarray

    def token_mean(self, name: str) -> float:
        """Mean loss of the group's tokens under a model, "dense" or "cse"."""
        return float(getattr(self, name)[self.inside].sum() / self.tokens[self.inside].sum())


def measure_gain(seeds: list[Losses], bootstrap_seed: int = 0) -> Gain | None:
    """
    The gain of a group of sequences.

    With two seeds or more the interval is Student's over the seeds' log ratios: it shows the noise of training. With
    one it is a paired bootstrap over sequences (percentiles of 2,000 seeded draws): it shows how far the result
    depends on which sequences were held out, and nothing of the noise of training.

    Args:
        seeds: the same group in one entry a seed. Seeds in which it is empty are left out.

    Returns:
        None if the group is empty in all of them.
    """
    seeds_used = [part for part in seeds if part.tokens[part.inside].sum() > 0]
    if not seeds_used:
        return None
    dense, cse = (np.array([part.token_mean(name) for part in seeds_used]) for name in ("dense", "cse"))
    logs = cse - dense
    if len(seeds) > 1:
        low, high = _student(logs)
    else:
        low, high = _bootstrap(seeds_used[0], bootstrap_seed)
    own, other, ratio = (float(np.exp(value)) for value in (dense.mean(), cse.mean(), logs.mean()))
    ends = [None if value is None else float(np.exp(value)) for value in (low, high)]
    return Gain(int(seeds_used[0].inside.sum()), own, other, ratio, ends[0], ends[1], len(seeds_used))


def _student(logs: np.ndarray) -> tuple[float | None, float | None]:
    if len(logs) < 2:
        return None, None
    reach = t.ppf((1 + LEVEL) / 2, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return logs.mean() - reach, logs.mean() + reach


def _bootstrap(part: Losses, seed: int) -> tuple[float | None, float | None]:
    if part.inside.sum() < LEAST_SEQUENCES:
        return None, None
    difference = (part.cse - part.dense)[part.inside]
    found = bootstrap(
        (difference, part.tokens[part.inside].astype(np.float64)),
        lambda nats, tokens, axis: nats.sum(axis=axis) / tokens.sum(axis=axis),
        n_resamples=DRAWS,
        batch=100,  # draws in memory at a time
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return found.confidence_interval.low, found.confidence_interval.high
