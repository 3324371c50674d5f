# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: how well a model predicts and where it routes, in numbers. Needs the `eval` extra."""

from .frequency import NGramCounts, PerplexityByBin
from .metrics import Accuracy, MacroF1, MatthewsCorrelation
from .paired import Estimate, difference, mean_interval, ratio, share_of_gain
from .perplexity import (
    Perplexity,
    PerplexityByDomain,
    perplexity_for_trainer,
    row_losses_for_trainer,
    token_losses,
)
from .purity import RoutingPurity, routing_purity, sequence_routes
from .routing import expert_shares
from .sequences import SequenceClusters, sequence_clusters, sequence_losses


__all__ = [
    "Accuracy",
    "Estimate",
    "MacroF1",
    "MatthewsCorrelation",
    "NGramCounts",
    "Perplexity",
    "PerplexityByBin",
    "PerplexityByDomain",
    "RoutingPurity",
    "difference",
    "SequenceClusters",
    "expert_shares",
    "mean_interval",
    "perplexity_for_trainer",
    "ratio",
    "routing_purity",
    "row_losses_for_trainer",
    "sequence_routes",
    "share_of_gain",
    "sequence_clusters",
    "sequence_losses",
    "token_losses",
]
