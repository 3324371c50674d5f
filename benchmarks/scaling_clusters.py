# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Clusters: what routers pay for many of them, what a fit costs on large samples, and k-means against others."""

from collections.abc import Callable
from itertools import product

import numpy as np
import torch
from scaling_rounds import interleaved, peak_bytes, quartiles
from sklearn.cluster import MiniBatchKMeans
from threadpoolctl import threadpool_limits

from modeling_cse import CSEGPT2Config
from modeling_cse.clustering import ClusterSettings, Identities, RoutingFeatures, find_clusters, fit_layer
from modeling_cse.routing_cse import ClusterRouter


LENGTH = 256
TOKENS_PER_SEQUENCE = 8  # as the callback samples them
PLANTED = 6
CLOSE_ENOUGH = 1.01  # of the least inertia that any method found
# Growing efforts of MiniBatchKMeans: runs, of which the best stays, and passes over the data in each of them.
EFFORTS = ((1, 10), (4, 10), (4, 40), (16, 40))


def planted_states(sequences: int, width: int, seed: int = 0, clusters: int = PLANTED) -> RoutingFeatures:
    """
    Routing features with cluster structure: centres and noise share one falling spectrum (anisotropic), a large common
    mean lies under all of them, and all drift along a parabola as a model's states do while it trains. Clusters are of
    unequal size and overlap: k-means finds the planted ones to 0.9 or so (adjusted mutual information).
    """
    random = np.random.default_rng(seed)
    spectrum = np.exp(-np.arange(width) / (width / 6))
    basis = np.linalg.qr(random.standard_normal((width, width)))[0].astype(np.float32)
    shares = np.linspace(2, 0.5, clusters)
    labels = random.choice(clusters, sequences, p=shares / shares.sum())
    centres = 0.45 * random.standard_normal((clusters, width)) * spectrum
    trend, bend, common = random.standard_normal((3, width)) * spectrum
    when = np.linspace(-1, 1, sequences)[:, None]
    means = centres[labels] + 0.6 * random.standard_normal((sequences, width)) * spectrum
    means = (means + when * trend + when**2 * bend / 2 + 5 * common).astype(np.float32)
    noise = random.standard_normal((sequences, TOKENS_PER_SEQUENCE, width), dtype=np.float32)
    noise *= 2 * spectrum.astype(np.float32)
    noise += means[:, None]
    positions = np.arange(TOKENS_PER_SEQUENCE) * (LENGTH // TOKENS_PER_SEQUENCE) + np.zeros((sequences, 1), np.int64)
    return RoutingFeatures(*(torch.from_numpy(x) for x in (means @ basis, noise @ basis, positions)))


def router_of(width: int, clusters: int, routing: str) -> ClusterRouter:
    """A router full of clusters at random places, every second of which owns an expert."""
    config = CSEGPT2Config(n_embd=width, n_head=4, cse_max_clusters=clusters, cse_routing=routing)
    router = ClusterRouter(config)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(clusters, width, generator=generator)
    router.write(
        centroids=rows,
        radii=torch.ones(clusters),
        cluster_sizes=torch.ones(clusters, dtype=torch.int64),
        discriminant_weight=rows,
        discriminant_bias=torch.zeros(clusters),
        cluster_expert=torch.where(torch.arange(clusters) % 2 == 0, torch.arange(clusters), -1),
    )
    return router


def measure_clusters(sizes: dict, rounds: int) -> list[dict]:
    """A point for each number of clusters, width and routing: `microseconds` a token of the router's forward pass, and
    the `peak_bytes` of one over all tokens, see `scaling_rounds.peak_bytes`."""
    points = []
    for width, routing in product(sizes["widths"], ("discriminant", "sequence")):
        states = torch.randn(sizes["tokens"] // LENGTH, LENGTH, width, generator=torch.Generator().manual_seed(1))
        calls = {k: _route(router_of(width, k, routing), states) for k in sizes["clusters"]}
        seconds = interleaved(calls, rounds)
        for count, call in calls.items():
            points.append(
                {"clusters": count, "width": width, "routing": routing, "tokens": sizes["tokens"]}
                | {"microseconds": quartiles(seconds[count], 1e6 / sizes["tokens"]), "peak_bytes": peak_bytes(call)}
            )
    return points


def measure_reclustering(sizes: dict, rounds: int) -> list[dict]:
    """
    A point for each size of the reservoir and width: `seconds` and `peak_bytes` of what the callback does at one site,
    `fit_layer` with default settings on states that drift; and `reservoir_bytes`, which were there before.
    """
    points = []
    for width in sizes["widths"]:
        whole = planted_states(max(sizes["reservoirs"]), width)
        # Not the first rows: a drift of the same size over each sample.
        steps = {n: len(whole) // n for n in sizes["reservoirs"]}
        samples = {n: whole[torch.arange(n) * step] for n, step in steps.items()}
        router = router_of(width, 16, "discriminant")
        calls = {n: _fit(router, sample) for n, sample in samples.items()}
        seconds = interleaved(calls, rounds)
        for n, call in calls.items():
            held = sum(tensor.nbytes for tensor in vars(samples[n]).values())
            points.append(
                {"reservoir": n, "width": width, "seconds": quartiles(seconds[n])}
                | {"peak_bytes": peak_bytes(call), "reservoir_bytes": held}
            )
    return points


def _route(router: ClusterRouter, states: torch.Tensor) -> Callable:
    return lambda: router(states)


def _fit(router: ClusterRouter, sample: RoutingFeatures) -> Callable:
    memory = Identities.none(router.hidden_size)
    return lambda: fit_layer(router, sample, ClusterSettings(), memory, num_experts=4, drifting=True)


def measure_kmeans(sizes: dict, rounds: int) -> list[dict]:
    """
    A point for each method, sample, width and number of clusters, all on one thread. The efforts of a method grow; the
    first is taken whose inertia (sum of squared distances to the nearest centroid) is within 1 % of the least of all
    methods and efforts, or the last if none is. Of that one: `effort` (its number, from 0), `seconds`, `inertia`,
    `excess` over the least one as a share, and whether it is `close` (within 1 %).
    """
    points = []
    for rows, width, count in product(sizes["kmeans_rows"], sizes["widths"], sizes["kmeans_clusters"]):
        # as many planted clusters as are looked for
        data = planted_states(rows, width, clusters=count).embeddings.numpy()
        named = methods(data, count)
        with threadpool_limits(limits=1):
            inertias = {name: [inertia_of(data, effort()) for effort in efforts] for name, efforts in named.items()}
            least = min(min(reached) for reached in inertias.values())
            close = {name: [x <= CLOSE_ENOUGH * least for x in reached] for name, reached in inertias.items()}
            taken = {name: each.index(True) if any(each) else len(each) - 1 for name, each in close.items()}
            seconds = interleaved({name: named[name][taken[name]] for name in named}, rounds, warm=False)
        for name, effort in taken.items():
            inertia = inertias[name][effort]
            points.append(
                {"method": name, "rows": rows, "width": width, "clusters": count, "effort": effort}
                | {"seconds": quartiles(seconds[name]), "inertia": float(f"{inertia:.6g}")}
                | {"excess": round(inertia / least - 1, 5), "close": close[name][effort]}
            )
    return points


def methods(data: np.ndarray, count: int) -> dict[str, list[Callable[[], np.ndarray]]]:
    """By name the efforts of each method, growing; each gives the labels (N,)."""

    def ours() -> np.ndarray:
        return find_clusters(data, "kmeans", count, 0).labels

    def mini_batches(runs: int, passes: int) -> np.ndarray:
        # without stopping early, and with whole runs as restarts: its own `n_init` compares starts only
        models = (
            MiniBatchKMeans(count, n_init=1, max_iter=passes, max_no_improvement=None, random_state=seed).fit(data)
            for seed in range(runs)
        )
        return min(models, key=lambda model: model.inertia_).labels_

    found = {"find_clusters": [ours], "MiniBatchKMeans": [lambda e=effort: mini_batches(*e) for effort in EFFORTS]}
    try:
        import faiss
    except ImportError:  # not a dependency: compared where it is there
        return found

    def of_faiss(starts: int) -> np.ndarray:
        model = faiss.Kmeans(data.shape[1], count, niter=50, nredo=starts, seed=0)
        model.train(data)
        return model.index.search(data, 1)[1][:, 0]

    return found | {"faiss": [lambda s=starts: of_faiss(s) for starts in (1, 4, 16)]}


def inertia_of(data: np.ndarray, labels: np.ndarray) -> float:
    """Sum of squared distances of points (N, d) to the mean of their cluster, (N,)."""
    points = data.astype(np.float64)
    clusters = (points[labels == label] for label in np.unique(labels))
    return sum(float(((members - members.mean(axis=0)) ** 2).sum()) for members in clusters)
