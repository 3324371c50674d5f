# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Analysis: what happened during a run, in pictures and words. Needs the `analysis` extra."""

from .clusters import ClusterView, plot_reclustering
from .comparison_figures import cluster_names, plot_found_clusters, plot_gains
from .figures import plot_run, read_metrics
from .gains import LEAST_SEQUENCES, Gain, Losses, measure_gain
from .terms import top_terms
from .typical import passage, typical_rows
from .verdict import CLARITY, Verdict, judge, rules


__all__ = [
    "CLARITY",
    "LEAST_SEQUENCES",
    "ClusterView",
    "Gain",
    "Losses",
    "Verdict",
    "cluster_names",
    "judge",
    "measure_gain",
    "passage",
    "plot_found_clusters",
    "plot_gains",
    "plot_reclustering",
    "plot_run",
    "read_metrics",
    "rules",
    "top_terms",
    "typical_rows",
]
