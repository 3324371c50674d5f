# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Do clusters match known domains, do tokens find the cluster of their sequence, and do experts keep their domain?

    python benchmarks/cluster_quality.py            # trains (or goes on, or reads a finished run), then measures
    python benchmarks/cluster_quality.py --smoke    # seconds: a tiny model, figures mean nothing, nothing is written

A small GPT-2 is trained with `ClusterExpertsCallback` on the sample corpus, general to legal to medical text as 60 to
20 to 20. Each fit leaves a file with its sample and with what the model then made of the held-out blocks; everything
is measured from these files, other algorithms and numbers of clusters on the same fits too.

- A held-out sequence belongs to the cluster whose centroid is nearest to its mean state, as in the sequence route.
- Agreement: share of held-out tokens whose best discriminant score is the cluster of their sequence, by position.
- Churn: of the held-out sequences that an expert owned at the earlier of two fits, the share that has another expert,
  or none, at the later one. Without matching, the same clusters get their experts as if there had been no fit before:
  the largest long-tail cluster the first slot, and so on ("by size"), or in the order in which the algorithm numbered
  them ("by number").
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from known_domains import DOMAINS, Fit, Run, known_experts, provenance, train, write_json
from sklearn.metrics import adjusted_mutual_info_score, silhouette_score

from modeling_cse.clustering import ALGORITHMS, Clustering, Identities, assign_experts, find_clusters, long_tail


RESULTS = Path(__file__).parent / "results" / "cluster_quality.json"
BUCKETS = {"0-8": (0, 8), "8-32": (8, 32), "32-128": (32, 128), "128-256": (128, 256), "32-256": (32, 256)}
PATIENCE = 3
# Other ways to cluster the same samples. None: the algorithm finds the number; a pair: the silhouette chooses.
WAYS = [
    *(("kmeans", number) for number in (3, 4, 5, 6, 8, (3, 8))),
    *(("spherical", number) for number in (3, 4, 5, 6, 8, (3, 8))),
    ("dbscan", None),
    ("hdbscan", None),
]
# The first version of the package had k-means with a given number alone.
WAYS = [way for way in WAYS if way[0] in ALGORITHMS and ("spherical" in ALGORITHMS or isinstance(way[1], int))]


def distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """(N, K) of points (N, d) and centroids (K, d)."""
    return np.linalg.norm(points[:, None].astype(np.float64) - centroids[None], axis=-1)


def ami(domains: np.ndarray, labels: np.ndarray) -> float:
    return round(float(adjusted_mutual_info_score(domains, labels)), 4)


def domain_table(domains: np.ndarray, labels: np.ndarray, count: int) -> list[list[int]]:
    """Sequences by cluster (rows) and domain (columns, as in `DOMAINS`)."""
    return [np.bincount(domains[labels == k], minlength=len(DOMAINS)).tolist() for k in range(count)]


def fit_quality(fit: Fit, layer: int, held_out_domains: np.ndarray) -> dict:
    """How the clusters that the run wrote at a fit match the domains, and how its discriminant finds them."""
    buffers = {name: rows.numpy() for name, rows in fit.buffers[layer].items()}
    count = int((buffers["cluster_sizes"] > 0).sum())
    centroids, radii = buffers["centroids"][:count], buffers["radii"][:count]
    sample, held_out = fit.sample[layer], fit.held_out[layer]
    of_sample = distances(sample.embeddings.numpy(), centroids).argmin(axis=1)
    away = distances(held_out.embeddings.numpy(), centroids)
    own = away.argmin(axis=1)
    scores = held_out.tokens.numpy() @ buffers["discriminant_weight"][:count].T + buffers["discriminant_bias"][:count]
    best, positions = scores.argmax(axis=-1), held_out.positions.numpy()
    experts = buffers["cluster_expert"][:count]
    general = np.broadcast_to((held_out_domains == 0)[:, None], best.shape)
    return {
        "ami_sample": ami(fit.domains, of_sample),
        "ami_held_out": ami(held_out_domains, own),
        "ami_held_out_over_radius": ami(held_out_domains, (away / radii).argmin(axis=1)),
        "agreement": {
            name: round(float((best == own[:, None])[(positions >= low) & (positions < high)].mean()), 4)
            for name, (low, high) in BUCKETS.items()
            if positions.max() >= low
        },
        "general_tokens_routed": round(float((experts[best] >= 0)[general].mean()), 4),
        "experts": experts.tolist(),
        "sample_by_cluster_and_domain": domain_table(fit.domains, of_sample, count),
        "held_out_by_cluster_and_domain": domain_table(held_out_domains, own, count),
    }


def other_ways(fit: Fit, layer: int, held_out_domains: np.ndarray, seed: int) -> dict[str, dict]:
    """Adjusted mutual information and silhouette of all `WAYS` on the sample of a fit."""
    points, held_out = (part[layer].embeddings.numpy() for part in (fit.sample, fit.held_out))
    result = {}
    for algorithm, number in WAYS:
        clusters = find_clusters(points, algorithm, number, seed)
        own = distances(held_out, clusters.centroids).argmin(axis=1)
        result[f"{algorithm} {number}"] = {
            "clusters": len(clusters),
            "ami_sample": ami(fit.domains, clusters.labels),
            "ami_held_out": ami(held_out_domains, own),
            "silhouette": round(float(silhouette_score(points, clusters.labels)), 4) if len(clusters) > 1 else None,
            "sample_by_cluster_and_domain": domain_table(fit.domains, clusters.labels, len(clusters)),
        }
    return result


def experts_by_number(clusters: Clustering, common_share: float, num_experts: int) -> np.ndarray:
    """Slots of the long-tail clusters (K,) in the order in which the algorithm numbered them."""
    experts = np.full(len(clusters), -1)
    tail = np.flatnonzero(long_tail(clusters.shares, common_share))[:num_experts]
    experts[tail] = np.arange(len(tail))
    return experts


def replay(fits: list[Fit], layer: int, algorithm: str, number, run: Run) -> dict[str, np.ndarray]:
    """
    Clusters every fit's sample anew, and gives out experts with matching and without. Samples of consecutive fits
    overlap by half.

    Returns:
        The expert (fits, N) of each held-out sequence, -1 for none, by way to give them out.
    """
    identities = Identities.none(fits[0].sample[layer].embeddings.shape[1])
    outcome: dict[str, list[np.ndarray]] = {"matched": [], "by size": [], "by number": []}
    settings = {"common_share": run.common_share, "num_experts": known_experts(run), "patience": PATIENCE}
    for fit in fits:
        points = fit.sample[layer].embeddings.numpy()
        clusters = find_clusters(points, algorithm, number, run.seed)
        found = (clusters.centroids, clusters.radii, clusters.shares)
        ownership = assign_experts(identities, *found, **settings)
        identities = ownership.identities
        own = distances(fit.held_out[layer].embeddings.numpy(), clusters.centroids).argmin(axis=1)
        outcome["matched"].append(ownership.experts[own])
        outcome["by size"].append(assign_experts(Identities.none(points.shape[1]), *found, **settings).experts[own])
        outcome["by number"].append(experts_by_number(clusters, run.common_share, settings["num_experts"])[own])
    return {name: np.stack(experts) for name, experts in outcome.items()}


def of_the_run(fits: list[Fit], layer: int) -> np.ndarray:
    """The expert (fits, N) of each held-out sequence under the buffers that the run itself wrote at its fits."""
    experts = []
    for fit in fits:
        buffers = {name: rows.numpy() for name, rows in fit.buffers[layer].items()}
        count = int((buffers["cluster_sizes"] > 0).sum())
        own = distances(fit.held_out[layer].embeddings.numpy(), buffers["centroids"][:count]).argmin(axis=1)
        experts.append(buffers["cluster_expert"][:count][own])
    return np.stack(experts)


def churn(experts: np.ndarray, domains: np.ndarray) -> dict:
    """Churn from fit to fit, of sequences that had an expert at the earlier one and of all whose domain is rare;
    experts (fits, N). Pairs of fits of which the earlier one gave out no expert are left out."""
    changed = experts[:-1] != experts[1:]
    owned = [
        float(moved[before >= 0].mean()) for moved, before in zip(changed, experts, strict=False) if any(before >= 0)
    ]
    rare = changed[:, domains > 0].mean(axis=1)
    if not owned:
        return {"pairs": 0}
    return {
        "pairs": len(owned),
        "owned": [round(value, 4) for value in owned],
        "owned_mean": round(float(np.mean(owned)), 4),
        "owned_max": round(float(np.max(owned)), 4),
        "rare_domain_mean": round(float(np.mean(rare)), 4),
        "rare_domain_max": round(float(np.max(rare)), 4),
    }


def measure(run: Run, fits: list[Fit], held_out_domains: np.ndarray) -> dict:
    """All measures by layer."""
    layers = {}
    for layer in sorted(fits[0].sample):
        replays = {f"{algorithm} {number}": replay(fits, layer, algorithm, number, run) for algorithm, number in WAYS}
        layers[str(layer)] = {
            "fits": {fit.step: fit_quality(fit, layer, held_out_domains) for fit in fits},
            "churn_of_the_run": churn(of_the_run(fits, layer), held_out_domains),
            "churn": {
                name: {way: churn(experts, held_out_domains) for way, experts in outcome.items()}
                for name, outcome in replays.items()
            },
            "other_ways": {
                fit.step: other_ways(fit, layer, held_out_domains, run.seed) for fit in (fits[0], fits[-1])
            },
        }
    return layers


def show(layers: dict) -> None:
    for layer, found in layers.items():
        for step, fit in found["fits"].items():
            print(
                f"layer {layer}, step {step}: AMI {fit['ami_sample']} (sample), {fit['ami_held_out']} (held-out);",
                f"agreement {fit['agreement']}; {fit['held_out_by_cluster_and_domain']} -> {fit['experts']}",
            )
        print(f"layer {layer}, churn of the run: {found['churn_of_the_run']}")
        for name, outcome in found["churn"].items():
            cells = [f"{way} mean {c.get('owned_mean')} max {c.get('owned_max')}" for way, c in outcome.items()]
            print(f"layer {layer}, churn of {name}:", "; ".join(cells))
        for step, ways in found["other_ways"].items():
            cells = [f"{name}: {w['ami_sample']}/{w['ami_held_out']} ({w['silhouette']})" for name, w in ways.items()]
            print(f"layer {layer}, step {step}, AMI sample/held-out (silhouette):", "; ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", type=Path, default=Path("runs/cluster_quality"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model; no result is written")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run.smoke() if options.smoke else Run()
    folder = options.run_folder / "smoke" if options.smoke else options.run_folder
    corpus = run.corpus()
    train(run, corpus, folder)
    fits = [Fit.load(folder / "fits" / f"{step}.safetensors") for step in run.fits]
    layers = measure(run, fits, corpus.held_out_domains)
    show(layers)
    if options.smoke:
        return
    blocks = {
        "training": dict(zip(DOMAINS, np.bincount(corpus.training_domains).tolist(), strict=True)),
        "held_out": dict(zip(DOMAINS, np.bincount(corpus.held_out_domains).tolist(), strict=True)),
    }
    result = provenance("python " + " ".join(sys.argv)) | {"run": vars(run), "blocks": blocks, "layers": layers}
    write_json(options.output, result)


if __name__ == "__main__":
    main()
