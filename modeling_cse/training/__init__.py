# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Training with clusters: collecting, gathering over ranks, the Trainer callback, and the same outside the Trainer
and from a dense checkpoint."""

from .callback import ClusterExpertsCallback
from .checkpoints import check_checkpoint, last_complete_checkpoint
from .collecting import FeatureCollector, routed_base_model
from .fitting import fit_experts
from .starting import from_dense


__all__ = [
    "ClusterExpertsCallback",
    "FeatureCollector",
    "check_checkpoint",
    "fit_experts",
    "from_dense",
    "last_complete_checkpoint",
    "routed_base_model",
]
