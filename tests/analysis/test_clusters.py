# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the re-clustering picture: sequences in the colour of their expert, one basis, true arrows."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex

from modeling_cse.analysis import ClusterView, plot_reclustering
from modeling_cse.analysis.style import COMMON_COLOUR, EXPERT_COLOURS


# Three clusters, one of them common, far apart in the first two of five dimensions.
CENTRES = np.array([[0, 0, 0, 0, 0], [9, 0, 0, 0, 0], [0, 6, 0, 0, 0]], np.float32)


def make_view(step: int = 80, shift: float = 0.0, **changes) -> ClusterView:
    noise = np.random.default_rng(step).normal(size=(30, 5)).astype(np.float32) * 0.3
    labels = np.arange(30) % 3
    view = ClusterView(
        embeddings=CENTRES[labels] + noise + shift,
        labels=labels,
        centroids=CENTRES + shift,
        experts=np.array([-1, 2, 0]),
        domains=["general", "law", "medicine"] * 10,
        step=step,
    )
    return replace(view, **changes)


def points_by_colour(axis) -> dict[str, int]:
    counts = {}
    for points in axis.collections:
        colour = to_hex(points.get_facecolors()[0]).upper()
        counts[colour] = counts.get(colour, 0) + len(points.get_offsets())
    return counts


def arrows(axis) -> list:
    return [text for text in axis.texts if getattr(text, "arrow_patch", None) is not None]


def test_every_sequence_is_drawn_in_the_colour_of_its_expert(tmp_path, drawn):
    path = tmp_path / "new folder" / "clusters.png"
    later = make_view(160, labels=np.r_[np.zeros(5, int), np.arange(5, 30) % 3])
    plot_reclustering(make_view(80), later, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    left, right = drawn[0].axes
    assert points_by_colour(left) == {COMMON_COLOUR: 10, EXPERT_COLOURS[0]: 10, EXPERT_COLOURS[2]: 10}
    assert points_by_colour(right) == {COMMON_COLOUR: 13, EXPERT_COLOURS[0]: 9, EXPERT_COLOURS[2]: 8}
    assert right.get_xlabel() == "3 of 30 sequences (10%) changed expert"
    assert [axis.get_title(loc="left") for axis in (left, right)] == ["Fit at step 80", "Fit at step 160"]
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["expert 0", "expert 2", "common", "general", "law", "medicine", "centroid"]


def test_both_panels_have_one_basis_and_drift_of_all_states_is_left_out(tmp_path, drawn):
    view = make_view()
    plot_reclustering(view, make_view(shift=50.0, step=80), tmp_path / "clusters.png")
    left, right = drawn[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_ylim() == right.get_ylim()
    for one, other in zip(left.collections, right.collections, strict=True):
        np.testing.assert_allclose(one.get_offsets(), other.get_offsets(), atol=1e-4)
    # the two dimensions in which the clusters differ: nothing of their distances is lost
    crosses = np.array([line.get_xydata()[0] for line in left.get_lines()])
    np.testing.assert_allclose(np.linalg.norm(crosses[1] - crosses[2]), np.hypot(9, 6), rtol=0.01)


def test_arrows_lead_from_an_experts_old_centroid_to_its_new_one(tmp_path, drawn):
    before = make_view()
    # expert 2 moves, expert 0 is gone, expert 3 is new: one arrow
    after = make_view(centroids=CENTRES + np.array([[0], [1], [0]]), experts=np.array([3, 2, -1]))
    plot_reclustering(before, after, tmp_path / "clusters.png")
    left, right = drawn[0].axes
    assert not arrows(left) and len(arrows(right)) == 1
    arrow = arrows(right)[0]
    np.testing.assert_allclose(arrow.xyann, left.get_lines()[1].get_xydata()[0], atol=1e-6)
    np.testing.assert_allclose(arrow.xy, right.get_lines()[1].get_xydata()[0], atol=1e-6)
    assert sorted(text.get_text() for text in right.texts if text not in arrows(right)) == ["2", "3"]


def test_domains_have_markers_and_may_be_unknown(tmp_path, drawn):
    plot_reclustering(make_view(), make_view(), tmp_path / "known.png")
    plot_reclustering(make_view(domains=None), make_view(domains=None), tmp_path / "unknown.png")
    shapes = [{points.get_paths()[0].vertices.tobytes() for points in fig.axes[0].collections} for fig in drawn]
    assert [len(found) for found in shapes] == [3, 1]
    assert len(drawn[1].legends[0].get_texts()) == 4


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embeddings": np.zeros((30, 1))}, r"`embeddings` has shape \(30, 1\), allowed is"),
        ({"labels": np.zeros(29, int)}, r"`labels` has shape \(29,\), allowed is \(30,\)"),
        ({"labels": np.full(30, 3)}, "`labels` are from 3 to 3, allowed is 0 to 2"),
        ({"labels": np.full(30, -1)}, "`labels` are from -1 to -1"),
        ({"centroids": np.zeros((3, 4))}, r"`centroids` has shape \(3, 4\), allowed is \(3, 5\)"),
        ({"centroids": np.full((3, 5), np.nan)}, "`centroids` has values that are NaN"),
        ({"experts": np.array([0, 0, -1])}, "allowed is each expert at most once"),
        ({"domains": ["law"]}, "`domains` has 1 names, allowed is one for each of 30"),
    ],
)
def test_a_view_that_cannot_be_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_view(**changes)


def test_views_of_other_sequences_are_not_compared(tmp_path):
    fewer = ClusterView(np.ones((9, 5)), np.zeros(9, int), CENTRES, np.array([-1, 2, 0]), None, 160)
    with pytest.raises(ValueError, match="the same sequences in the same order"):
        plot_reclustering(make_view(), fewer, tmp_path / "clusters.png")
    with pytest.raises(ValueError, match="`after` has other domains"):
        plot_reclustering(make_view(), make_view(domains=None), tmp_path / "clusters.png")
    assert not (tmp_path / "clusters.png").exists()
