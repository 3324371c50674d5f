# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Analysis: what happened during a run, in pictures. A leaf package; needs the `train` extra."""

from .clusters import ClusterView, plot_reclustering
from .figures import plot_run, read_metrics


__all__ = ["ClusterView", "plot_reclustering", "plot_run", "read_metrics"]
