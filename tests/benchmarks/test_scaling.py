# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the scaling benchmark: one command measures every point, writes all of it down, and says what it rests
on."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch


# benchmarks are scripts: they find each other in their own folder
sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import scaling  # noqa: E402
from scaling_clusters import inertia_of, planted_states  # noqa: E402
from scaling_experts import Layer  # noqa: E402
from scaling_rounds import interleaved, peak_bytes  # noqa: E402


PROVENANCE = {"command", "commit", "date", "machine", "versions", "rounds", "sizes", "curves"}
FIELDS = {
    "experts": {"experts", "tokens", "routed", "precision", "microseconds", "over_fewest", "router"}
    | {"products", "without_products"},
    "clusters": {"clusters", "width", "routing", "tokens", "microseconds", "peak_bytes"},
    "reclustering": {"reservoir", "width", "seconds", "peak_bytes", "reservoir_bytes"},
    "kmeans": {"method", "rows", "width", "clusters", "effort", "seconds", "inertia", "excess", "close"},
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """What a smoke run leaves: the folder, and its results."""
    folder = tmp_path_factory.mktemp("scaling")
    scaling.main(["--smoke", "--output", str(folder / "scaling.json"), "--figure", str(folder / "scaling.png")])
    return folder, json.loads((folder / "scaling.json").read_text())


def test_every_part_says_what_it_rests_on(outcome):
    _, results = outcome
    assert set(results) == set(scaling.PARTS)
    for part in results.values():
        assert set(part) == PROVENANCE and part["rounds"] == 2
        assert {"torch", "sklearn"} <= set(part["versions"]) and "cores" in part["machine"]


def test_every_point_is_measured(outcome):
    _, results = outcome
    curves = {name: points for part in results.values() for name, points in part["curves"].items()}
    assert {name: set().union(*points) for name, points in curves.items()} == FIELDS
    experts = {(p["experts"], p["routed"], p["precision"]) for p in curves["experts"]}
    assert experts == {(e, r, p) for e in (4, 8) for r in (1.0, 0.3) for p in ("fp32", "bf16")}
    assert {(p["clusters"], p["routing"]) for p in curves["clusters"]} == {
        (clusters, routing) for clusters in (4, 64) for routing in ("discriminant", "sequence")
    }
    assert [p["reservoir"] for p in curves["reclustering"]] == [64, 256]
    assert {p["method"] for p in curves["kmeans"]} >= {"find_clusters", "MiniBatchKMeans"}
    for point in sum(curves.values(), []):
        for value in point.values():
            if isinstance(value, dict):
                assert 0 < value["lower"] <= value["median"] <= value["upper"]
    for point in curves["experts"]:
        assert point["products"] > 0 < point["without_products"]
        assert point["experts"] != 4 or point["over_fewest"]["median"] == 1


def test_tables_have_a_row_a_point_and_a_picture_is_drawn(outcome):
    folder, results = outcome
    rows = [line for line in scaling.tables(results).splitlines() if line.startswith("|")]
    curves = [points for part in results.values() for points in part["curves"].values()]
    assert len(rows) == sum(len(points) + 2 for points in curves)
    assert any(row.startswith("| 8 | 512 | 30% | bf16 |") for row in rows)
    assert (folder / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_part_alone_leaves_the_others_as_they_are(outcome, tmp_path, monkeypatch):
    folder, results = outcome
    output = tmp_path / "scaling.json"
    output.write_text((folder / "scaling.json").read_text())
    monkeypatch.setattr(scaling, "measure", lambda part, sizes, rounds: results[part]["curves"])
    flags = ["--smoke", "--parts", "clusters", "--rounds", "5", "--figure", str(tmp_path / "scaling.png")]
    scaling.main([*flags, "--output", str(output)])
    again = json.loads(output.read_text())
    assert [part for part in results if again[part] != results[part]] == ["clusters"]
    assert again["clusters"]["rounds"] == 5


@pytest.mark.parametrize("routed", [1.0, 0.3])
def test_as_many_tokens_go_to_each_expert(routed):
    layer = Layer(experts=16, width=64, expert_width=64)
    chosen = layer.module.router(layer.states(1280, routed))[2].flatten()
    assert (chosen >= 0).sum() == 1280 * routed
    assert set(torch.bincount(chosen[chosen >= 0], minlength=16).tolist()) == {1280 * routed / 16}


def test_rounds_take_turns():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert "".join(order) == "ab" * 4 and {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_peak_is_that_of_the_call():
    def call():
        first = np.ones(3_000_000)
        second = 2 * first
        return (first + second).sum()  # three arrays of 24 MB at once

    call()
    assert peak_bytes(call) == pytest.approx(72e6, rel=0.1)
    assert peak_bytes(lambda: None) < 2e6


def test_planted_states_drift_and_have_clusters():
    states = planted_states(1200, 32)
    assert states.tokens.shape == (1200, 8, 32) and states.tokens.dtype == states.embeddings.dtype == torch.float32
    first, last = states.embeddings[:300].mean(0), states.embeddings[-300:].mean(0)
    assert (last - first).norm() > 1
    again = planted_states(1200, 32)
    assert all(torch.equal(a, b) for a, b in zip(vars(states).values(), vars(again).values(), strict=True))
    assert not torch.equal(states.embeddings, planted_states(1200, 32, seed=1).embeddings)


def test_inertia_is_about_the_means():
    data = np.array([[0, 1], [0, 3], [5, 5]], np.float32)
    assert inertia_of(data, np.array([0, 0, 1])) == 2
