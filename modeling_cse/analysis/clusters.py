# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A picture of what re-clustering does: the same sequences at two fits, and which expert they belong to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from sklearn.decomposition import PCA

from .style import LEGEND, expert_colour, new_figure, plain, save_figure


MARKERS = ("o", "^", "s", "D", "v", "p", "h", "<", ">")
MARKER_COLOUR = "#555555"
# Width and largest height of the picture, in inches, and what titles, captions and legend take of its height.
WIDTH, HEIGHT, FURNITURE = 9.0, 5.4, 1.05


@dataclass
class ClusterView:
    """
    N sequences as one layer's clusters divide them after a fit, checked when made.

    Fields:
        embeddings (N, d) float: mean state of each sequence.
        labels (N,) int: the cluster of each.
        centroids (K, d) float: where the clusters lie.
        experts (K,) int: the expert slot each cluster owns, -1 for a common one.
        domains: what is known of each sequence's domain (N names), or None.
        step: the optimizer step of the fit.

    Raises:
        ValueError: shapes that do not belong together, values that are not finite, a label without a cluster, or an
            expert that two clusters own.
    """

    embeddings: np.ndarray
    labels: np.ndarray
    centroids: np.ndarray
    experts: np.ndarray
    domains: list[str] | None
    step: int

    def __post_init__(self):
        if self.embeddings.ndim != 2 or min(self.embeddings.shape) < 2:
            raise ValueError(
                f"`embeddings` has shape {self.embeddings.shape}, allowed is (sequences, width), both at least 2"
            )
        count, clusters = len(self.embeddings), len(self.centroids)
        allowed = {
            "labels": (count,),
            "centroids": (clusters, self.embeddings.shape[1]),
            "experts": (clusters,),
        }
        for name, shape in allowed.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"`{name}` has shape {getattr(self, name).shape}, allowed is {shape}")
        for name in ("embeddings", "centroids"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"`{name}` has values that are NaN or infinite, so there is nothing to draw")
        if self.labels.min() < 0 or self.labels.max() >= clusters:
            raise ValueError(
                f"`labels` are from {self.labels.min()} to {self.labels.max()}, allowed is 0 to {clusters - 1}"
            )
        owners = self.experts[self.experts >= 0]
        if len(owners) > len(set(owners.tolist())):
            raise ValueError(f"`experts` is {self.experts.tolist()}, allowed is each expert at most once, else -1")
        if self.domains is not None and len(self.domains) != count:
            raise ValueError(f"`domains` has {len(self.domains)} names, allowed is one for each of {count} sequences")

    def sequence_experts(self) -> np.ndarray:
        """The expert of each sequence, (N,) int, -1 for the common module."""
        return self.experts[self.labels]

    def owned_centroids(self) -> dict[int, int]:
        """Expert to its row among the centroids."""
        return {int(expert): row for row, expert in enumerate(self.experts) if expert >= 0}


def plot_reclustering(before: ClusterView, after: ClusterView, path: str | Path) -> None:
    """Draw the same sequences at two fits side by side, as one PNG.

    Points are sequences, coloured by the expert that owns their cluster (grey: common) and shaped by their domain;
    crosses are centroids, numbered by expert. On the right an arrow leads from each expert's old centroid to its new
    one, and a line says how many sequences changed expert.

    Both panels show the same two principal components. States drift as a whole while a model trains, so each side is
    taken about the mean of its own sequences, as clusters are matched.

    Args:
        before, after: two fits of one layer, with the same sequences in the same order.
        path: the PNG to write; its folder is made if need be.

    Raises:
        ValueError: if the two views do not show the same sequences.
    """
    if before.embeddings.shape != after.embeddings.shape:
        raise ValueError(
            f"`after` has embeddings of shape {after.embeddings.shape}, allowed is {before.embeddings.shape} as "
            "`before` has them: the same sequences in the same order"
        )
    if before.domains != after.domains:
        raise ValueError("`after` has other domains than `before`, allowed are the same sequences in the same order")
    (points, crosses), (new_points, new_crosses) = _project(before, after)
    middle, half = _box(np.concatenate([points, new_points, crosses, new_crosses]))
    figure = new_figure(WIDTH, min(HEIGHT, FURNITURE + WIDTH / 2 * half[1] / half[0]))
    axes = figure.subplots(1, 2)
    for axis in axes:
        axis.set_xlim(middle[0] - half[0], middle[0] + half[0])
        axis.set_ylim(middle[1] - half[1], middle[1] + half[1])
        axis.set_aspect("equal")
    old, new = before.owned_centroids(), after.owned_centroids()
    moves = {expert: (crosses[old[expert]], new_crosses[row]) for expert, row in new.items() if expert in old}
    _draw(axes[0], before, points, crosses, {})
    _draw(axes[1], after, new_points, new_crosses, moves)
    changed = int((before.sequence_experts() != after.sequence_experts()).sum())
    count = len(points)
    axes[0].set_xlabel(f"{count} sequences in {len(crosses)} clusters, {len(old)} with an expert")
    axes[1].set_xlabel(f"{changed} of {count} sequences ({changed / count:.0%}) changed expert")
    _add_legend(figure, [before, after])
    save_figure(figure, path)


def _project(before: ClusterView, after: ClusterView) -> list[tuple[np.ndarray, np.ndarray]]:
    """Embeddings (N, 2) and centroids (K, 2) of each view in one basis."""
    means = [view.embeddings.mean(axis=0, dtype=np.float64) for view in (before, after)]
    centred = np.concatenate([before.embeddings - means[0], after.embeddings - means[1]])
    basis = PCA(2, svd_solver="full").fit(centred)
    return [
        (basis.transform(view.embeddings - mean), basis.transform(view.centroids - mean))
        for view, mean in zip((before, after), means, strict=True)
    ]


def _box(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Middle (2,) and half the sides (2,) of the box that both panels show: one scale in all directions, so that
    distances can be compared by eye, and neither a strip nor a tower."""
    low, high = places.min(axis=0), places.max(axis=0)
    half = 1.06 * (high - low) / 2
    return (low + high) / 2, np.maximum(half, half[::-1] / 2) if half.any() else np.ones(2)


def _draw(
    axis: Axes,
    view: ClusterView,
    points: np.ndarray,
    crosses: np.ndarray,
    moves: dict[int, tuple[np.ndarray, np.ndarray]],
) -> None:
    axis.set_title(f"Fit at step {view.step}", loc="left", fontsize=11, fontweight="bold")
    # Principal components have no unit that a reader could use.
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_color("#BBBBBB")
    owners = view.sequence_experts()
    domains = np.asarray(view.domains or [""] * len(points), dtype=object)
    # Common sequences are the most: drawn first, they cover no one.
    for expert in sorted(set(owners.tolist())):
        for domain, marker in _markers(view.domains or [""]).items():
            rows = (owners == expert) & (domains == domain)
            if rows.any():
                axis.scatter(
                    *points[rows].T, s=20, marker=marker, color=expert_colour(expert), alpha=0.8, linewidths=0
                )
    for start, end in moves.values():
        # Above the crosses, which would hide a short one, and with a rim that sets it off from them.
        arrow = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "black", "shrinkA": 0, "shrinkB": 0}
        rim = [withStroke(linewidth=3, foreground="white")]
        axis.annotate("", xy=end, xytext=start, arrowprops=arrow | {"path_effects": rim}, zorder=6)
    for expert, place in zip(view.experts, crosses, strict=True):
        axis.plot(*place, marker="X", markersize=9, color=expert_colour(expert), markeredgecolor="black", zorder=5)
    taken = [*crosses, *(start for start, _ in moves.values())]
    for expert, row in view.owned_centroids().items():
        spot = _free_spot(axis, crosses[row], taken)
        taken.append(spot)
        axis.text(
            *spot,
            str(expert),
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            zorder=7,
            bbox={"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": expert_colour(expert)},
        )


def _free_spot(axis: Axes, place: np.ndarray, taken: list[np.ndarray]) -> np.ndarray:
    """Of twelve places around a cross, the one that is furthest from everything drawn there."""
    low, high = axis.get_xlim()
    angles = np.arange(12) * np.pi / 6
    spots = place + 0.05 * (high - low) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    nearest = np.linalg.norm(spots[:, None] - np.stack(taken)[None], axis=-1).min(axis=1)
    # Rounded, so that equal ones do not depend on the last bit: the first of them is taken.
    return spots[nearest.round(6).argmax()]


def _markers(domains: list[str]) -> dict[str, str]:
    """A marker for each domain, the commonest first."""
    names, counts = np.unique(np.asarray(domains, dtype=object), return_counts=True)
    ordered = names[np.argsort(-counts, kind="stable")]
    return {name: MARKERS[number % len(MARKERS)] for number, name in enumerate(ordered)}


def _add_legend(figure: Figure, views: list[ClusterView]) -> None:
    dot = {"linestyle": "none", "markersize": 8}
    slots = sorted({int(expert) for view in views for expert in view.experts if expert >= 0})
    # Bars for colours, since every marker may stand for a domain. No dict: a domain may be called "common".
    entries = [(f"expert {slot}", Line2D([], [], color=expert_colour(slot), linewidth=6)) for slot in slots]
    entries.append(("common", Line2D([], [], color=expert_colour(-1), linewidth=6)))
    if views[0].domains is not None:
        for domain, marker in _markers(views[0].domains).items():
            entries.append((plain(domain), Line2D([], [], marker=marker, color=MARKER_COLOUR, **dot)))
    entries.append(("centroid", Line2D([], [], marker="X", color="white", markeredgecolor="black", **dot)))
    labels, handles = zip(*entries, strict=True)
    style = LEGEND | {"loc": "outside lower center", "handlelength": 1, "columnspacing": 1.5}
    figure.legend(handles, labels, ncols=min(len(entries), 9), **style)
