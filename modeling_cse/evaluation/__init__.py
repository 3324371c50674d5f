# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Evaluation: how well a model predicts and where it routes, in numbers. A leaf package; needs the `train` extra."""

from .perplexity import (
    Perplexity,
    PerplexityByDomain,
    perplexity_for_trainer,
    row_losses_for_trainer,
    token_losses,
)
from .routing import expert_shares


__all__ = [
    "Perplexity",
    "PerplexityByDomain",
    "expert_shares",
    "perplexity_for_trainer",
    "row_losses_for_trainer",
    "token_losses",
]
