# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Routing features -> clusters -> ownership -> discriminant -> router buffers. Knows the models, not the training."""

from .algorithms import Clustering, find_clusters
from .discriminant import Discriminant
from .evidence import Evidence
from .features import FeatureStore, RoutingFeatures, sample_features
from .fitting import LayerFit, evidence_agreement, fit_layer, held_out, identities_of, nearest_clusters, write_fit
from .joint import JointFit, fit_texts
from .moving import move_clusters
from .ownership import Identities, assign_experts, long_tail, match_clusters
from .settings import ALGORITHMS, ClusterSettings


__all__ = [
    "ALGORITHMS",
    "ClusterSettings",
    "Clustering",
    "Discriminant",
    "Evidence",
    "FeatureStore",
    "Identities",
    "JointFit",
    "LayerFit",
    "RoutingFeatures",
    "assign_experts",
    "evidence_agreement",
    "find_clusters",
    "fit_layer",
    "fit_texts",
    "held_out",
    "identities_of",
    "long_tail",
    "match_clusters",
    "move_clusters",
    "nearest_clusters",
    "sample_features",
    "write_fit",
]
