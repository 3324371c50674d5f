# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Random arguments of the callback, random samples of routing features, and random data to fit on."""

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from tiny import VOCAB

from modeling_cse.clustering import RoutingFeatures


NOT_AN_INT = [-1, 2.5, True, "4", [4], float("nan")]
# By argument of `ClusterExpertsCallback`: what is allowed beside some of the others, and what never is.
ARGUMENTS: dict[str, tuple[list, list]] = {
    "warmup": ([None, 0.1, 4, 0, "auto", 0.999, 2**70], [-1, 1.5, 0.0, 1.0, "soon", True, float("nan"), [4]]),
    "recluster_every": ([0.1, 500, 1, 2**70], [*NOT_AN_INT, 0, 0.0, 1.0, None, float("inf")]),
    "update": (["recluster", "ema", "recluster+ema", "frozen"], ["never", "", None, 1, ["ema"]]),
    "algorithm": (["kmeans", "spherical", "dbscan", "hdbscan", "given", None], ["means", "", 3, ["kmeans"]]),
    "num_clusters": (
        [None, 1, 6, (2, 5), [3, 3]],
        [0, *NOT_AN_INT, (5, 2), (1, 4), (2,), (2, 3, 4), (2, "3"), {2: 3}, float("inf")],
    ),
    "common_share": ([0.7, 0, 1, 0.0, "elbow", None], [-0.1, 1.1, "some", True, float("nan"), [0.5]]),
    "sample_size": ([2048, 6, 2**70], [*NOT_AN_INT, 0, None, float("inf")]),
    "seed": ([0, 2**32 - 1], [*NOT_AN_INT, 2**32, None]),
    "patience": ([3, 1, 2**70], [*NOT_AN_INT, 0, None]),
    "ema_decay": ([None, 0.999, 0, 1], [-0.1, 1.1, "slow", True, float("nan"), [0.9]]),
    "projection": (["auto", None, 8, 1], [0, *NOT_AN_INT, "random"]),
    "min_cluster_share": ([None, 0.1, 0, 1], [-0.1, 1.1, "few", True, float("nan"), [0.1]]),
    "recluster_growth": ([1.0, 2, 1.5, 1e300], [0.9, 0, "fast", None, True, float("nan"), float("inf")]),
    "recluster_until": ([None, 5, 0.5, 0], [-1, 1.0, 0.0, "end", True, float("nan"), [5]]),
    "layer_budget": ([None, 1, 99], [*NOT_AN_INT, 0]),
}


@st.composite
def callback_arguments(draw) -> tuple[dict[str, Any], set[str]]:
    """Some of the arguments, and the names of those that are wrong."""
    names = draw(st.lists(st.sampled_from(sorted(ARGUMENTS)), unique=True, max_size=5))
    values, wrong = {}, set()
    for name in names:
        right, bad = ARGUMENTS[name]
        if draw(st.sampled_from([False, False, True])):
            wrong.add(name)
        values[name] = draw(st.sampled_from(bad if name in wrong else right))
    return values, wrong


class Sample(NamedTuple):
    """What a fit is given: sequences (N, d), tokens (N, m, d), and the settings of the clusters."""

    kind: str
    count: int
    width: int
    scale: float
    noise: float  # of tokens about their sequence, as a share of the scale
    labelled: bool
    settings: dict[str, Any]
    max_clusters: int
    seed: int

    def features(self) -> RoutingFeatures:
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.count, self.width)
        points = torch.randn(shape, generator=generator)
        if self.kind == "domains":
            points = 0.1 * points + 3.0 * torch.eye(self.width)[torch.arange(self.count) % 3]
        elif self.kind == "constant":
            points = torch.ones(shape)
        elif self.kind == "zero":
            points = torch.zeros(shape)
        elif self.kind == "duplicates":
            points = points[torch.arange(self.count) // 7 * 7]
        elif self.kind == "one differs":
            points = torch.ones(shape)
            points[:1] = 2.0
        elif self.kind == "line":
            points = points[:, :1].expand(shape).clone()
        elif self.kind in ("nan", "inf", "-inf"):
            points[self.count // 2 :, 0] = float(self.kind)
        tokens = points.unsqueeze(1) + self.noise * torch.randn(self.count, 4, self.width, generator=generator)
        labels = torch.arange(self.count) % 4 - (1 if self.seed % 2 else 0) if self.labelled else None
        positions = torch.arange(4).expand(self.count, -1)
        return RoutingFeatures(points * self.scale, tokens * self.scale, positions, labels)


@st.composite
def samples(draw) -> Sample:
    algorithm = draw(st.sampled_from(["kmeans", "kmeans", "spherical", "dbscan", "hdbscan", "given"]))
    settings = {"algorithm": algorithm, "common_share": draw(st.sampled_from([0.7, 0.0, 1.0, "elbow"]))}
    if algorithm in ("kmeans", "spherical"):
        settings["num_clusters"] = draw(st.sampled_from([None, 1, 3, 12, (2, 5)]))
    if algorithm != "given":
        settings["projection"] = draw(st.sampled_from(["auto", None, 4, 9]))
    kinds = ["domains", "domains", "noise", "noise", "constant", "zero", "duplicates", "one differs", "line"]
    return Sample(
        kind=draw(st.sampled_from([*kinds, "nan", "inf", "-inf"])),
        count=draw(st.sampled_from([40, 40, 40, 12, 12, 5, 2, 1, 0])),
        width=draw(st.sampled_from([8, 32])),
        scale=draw(st.sampled_from([1.0, 1.0, 1.0, 1e3, 1e-3, 1e30, 1e-30, 1e18, 1e-18, 1e37, 1e-44])),
        noise=draw(st.sampled_from([0.0, 0.1, 3.0])),
        labelled=algorithm == "given" or draw(st.booleans()),
        settings=settings,
        max_clusters=draw(st.sampled_from([16, 16, 16, 5, 1])),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def fit_data(draw) -> list[dict[str, torch.Tensor]]:
    """Batches of some rows, each with tokens in some places or none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    batches = []
    for _ in range(draw(st.sampled_from([3, 4, 2, 1, 0]))):
        rows, length = draw(st.integers(1, 8)), draw(st.integers(1, 12))
        ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
        share = draw(st.sampled_from([1.0, 1.0, 0.5, 0.1, 0.0]))
        mask = (torch.rand(rows, length, generator=generator) < share).long()
        batch = {"input_ids": ids, "attention_mask": mask, "given_clusters": torch.arange(rows) % 3}
        dropped = draw(st.sampled_from([(), (), (), (), ("attention_mask",), ("given_clusters",), ("input_ids",)]))
        batches.append({name: tensor for name, tensor in batch.items() if name not in dropped})
    return batches
