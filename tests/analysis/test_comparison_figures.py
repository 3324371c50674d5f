# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the pictures of a comparison: every group and cluster is in them, where it belongs."""

import numpy as np
import pytest

from modeling_cse.analysis import Gain, plot_found_clusters, plot_gains


def test_ratios_stand_with_their_intervals(tmp_path, drawn):
    gains = {"law_$x$": Gain(20, 30.0, 27.0, 0.9, 0.85, 0.95), "rest": Gain(3, 30.0, 33.0, 1.1, None, None)}
    plot_gains(gains, "one seed", tmp_path / "new" / "gains.png")
    (axis,) = drawn[0].axes
    assert (tmp_path / "new" / "gains.png").read_bytes().startswith(b"\x89PNG")
    _, interval, first, second = axis.get_lines()
    assert list(interval.get_xdata()) == [0.85, 0.95] and list(first.get_xdata()) == [0.9]
    assert list(second.get_xdata()) == [1.1] and second.get_markerfacecolor() == "white"
    assert [label.get_text() for label in axis.get_yticklabels()] == [r"law \$x\$", "rest"]
    with pytest.raises(ValueError, match="`gains` is empty"):
        plot_gains({}, "one seed", tmp_path / "gains.png")


@pytest.mark.parametrize("domains", [None, ["a", "b"] * 15])
def test_clusters_have_their_colour_and_share(tmp_path, drawn, domains):
    embeddings = np.random.default_rng(0).normal(size=(30, 5))
    clusters, experts = np.repeat([0, 1, 2], [18, 9, 3]), np.array([-1, 2, -1])
    plot_found_clusters(
        embeddings, clusters, embeddings[[0, 20, 29]], experts, domains, tmp_path / "clusters.png", "words"
    )
    scatter, bars = drawn[0].axes
    assert scatter.get_title(loc="left") == "Sequences, by their words"
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([0.6, 0.3, 0.1])
    assert len({bar.get_facecolor() for bar in bars.patches}) == 3
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels == ["cluster 0 (common)", "cluster 1 (expert 2)", "cluster 2 (common)"]
    shown = {tuple(points.get_facecolor()[0][:3]): 0 for points in scatter.collections}
    for points in scatter.collections:
        shown[tuple(points.get_facecolor()[0][:3])] += len(points.get_offsets())
    assert [shown[bar.get_facecolor()[:3]] for bar in bars.patches] == [18, 9, 3]
    assert (scatter.get_legend() is None) == (domains is None)
