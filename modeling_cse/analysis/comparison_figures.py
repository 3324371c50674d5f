# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a comparison: where the clusters lie and how large they are, and which groups gain."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from sklearn.decomposition import PCA

from .clusters import MARKER_COLOUR, _markers
from .gains import Gain
from .style import LEGEND, expert_colour, new_figure, plain, save_figure


# Common clusters, which share the base module, are told apart by shades of grey.
GREYS = ("#C8C8C8", "#8F8F8F", "#B0B0B0", "#6E6E6E")


def plot_found_clusters(
    embeddings: np.ndarray,
    clusters: np.ndarray,
    centroids: np.ndarray,
    experts: np.ndarray,
    domains: list[str] | None,
    path: str | Path,
    by: str,
) -> None:
    """Draw sequences in their first two principal components, coloured by cluster, and the size of each cluster.

    Args:
        embeddings: (N, d) of N sequences; N and d at least 2.
        clusters: (N,) int, the cluster of each.
        centroids: (K, d); experts: (K,) int, the expert each cluster owns, -1 for a common one.
        domains: name of each sequence's domain, shown by shape; or None.
        path: the PNG to write.
        by: what places the sequences, for the title.
    """
    figure = new_figure(10.0, 4.8)
    scatter, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    colours, names = _colours(experts), cluster_names(experts)
    basis = PCA(2, svd_solver="full").fit(embeddings)
    points, crosses = basis.transform(embeddings), basis.transform(centroids)
    _prepare(scatter, f"Sequences, by their {by}")
    scatter.set_xticks([])
    scatter.set_yticks([])
    scatter.set_xlabel("first principal component")
    scatter.set_ylabel("second")
    known = np.asarray(domains or [""] * len(points), dtype=object)
    for label in np.argsort(-np.bincount(clusters, minlength=len(experts)), kind="stable"):
        for domain, marker in _markers(known.tolist()).items():
            rows = (clusters == label) & (known == domain)
            scatter.scatter(*points[rows].T, s=16, marker=marker, color=colours[label], alpha=0.8, linewidths=0)
    for label, place in enumerate(crosses):
        scatter.plot(*place, marker="X", markersize=9, color=colours[label], markeredgecolor="black")
        scatter.annotate(str(label), place, xytext=(6, 4), textcoords="offset points", fontsize=9, fontweight="bold")
    if domains is not None:
        dot = {"linestyle": "none", "color": MARKER_COLOUR, "markersize": 7}
        handles = [Line2D([], [], marker=marker, **dot) for marker in _markers(domains).values()]
        scatter.legend(handles, [plain(domain) for domain in _markers(domains)], **LEGEND | {"handlelength": 1})
    shares = np.bincount(clusters, minlength=len(experts)) / len(clusters)
    _prepare(bars, "Share of the sequences")
    bars.barh(range(len(experts)), shares, color=colours)
    bars.set_yticks(range(len(experts)), names)
    bars.invert_yaxis()
    bars.xaxis.set_major_formatter(PercentFormatter(1.0))
    save_figure(figure, path)


def plot_gains(gains: dict[str, Gain], interval: str, path: str | Path) -> None:
    """Draw the ratio of perplexities of each group with its interval; left of the line is a gain.

    Args:
        gains: by name of the group, at least one.
        interval: what the intervals show, in a few words.
        path: the PNG to write.

    Raises:
        ValueError: there is no group.
    """
    if not gains:
        raise ValueError("`gains` is empty, allowed is at least one group")
    figure = new_figure(8.0, 1.4 + 0.36 * len(gains))
    axis = figure.subplots()
    _prepare(axis, "Perplexity, CSE over dense")
    axis.axvline(1.0, color="#555555", linewidth=1)
    for place, gain in enumerate(gains.values()):
        colour = "#009E73" if gain.better else "#D55E00" if gain.worse else "#555555"
        if gain.low is not None:
            axis.plot([gain.low, gain.high], [place, place], color=colour, linewidth=2.5, solid_capstyle="butt")
        # hollow: too few sequences for an interval
        axis.plot(gain.ratio, place, "o", color=colour, markerfacecolor=colour if gain.low is not None else "white")
    axis.set_yticks(range(len(gains)), [plain(name) for name in gains])
    axis.set_ylim(len(gains) - 0.5, -0.5)
    axis.set_xlabel(f"below 1 is a gain; {interval}")
    axis.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    save_figure(figure, path)


def cluster_names(experts: np.ndarray) -> list[str]:
    """What to call clusters in tables and pictures, by their experts (K,), -1 for none."""
    owners = ["common" if expert < 0 else f"expert {expert}" for expert in experts]
    return [f"cluster {label} ({owner})" for label, owner in enumerate(owners)]


def _colours(experts: np.ndarray) -> list[str]:
    commons = np.cumsum(experts < 0) - 1
    return [
        expert_colour(int(expert)) if expert >= 0 else GREYS[common % len(GREYS)]
        for expert, common in zip(experts, commons, strict=True)
    ]


def _prepare(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
