# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
How a token's cluster is best read from its own state: four ideas against the discriminant of the package.

    python benchmarks/discriminant.py --run-folder runs/cluster_quality          # after benchmarks/cluster_quality.py
    python benchmarks/discriminant.py --smoke                                    # seconds, figures mean nothing

Features of a trained model, `SPLITS` random draws of 80 % of the training sequences: clusters by k-means, each idea
fitted on 16 tokens a sequence. Measured on 64 tokens of each held-out sequence, whose cluster is that of the nearest
centroid of its mean state. Domains are weighted as they occur in training. Intervals: 95 %, paired with the plain
discriminant, over draws and over held-out sequences (bootstrap within domains).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from discriminant_variants import BUCKET_NAMES, VARIANTS, Rule, Tokens, bucket_of, plain
from known_domains import DOMAINS, FAMILIES, Corpus, Run, known_domains, look, provenance, train, write_json
from scipy.special import softmax
from sklearn.metrics import adjusted_mutual_info_score
from threadpoolctl import threadpool_limits
from torch import nn
from transformers.trainer_utils import get_last_checkpoint

from modeling_cse import CSEBertForMaskedLM
from modeling_cse.clustering import RoutingFeatures, find_clusters, long_tail


RESULTS = Path(__file__).parent / "results" / "discriminant.json"
SPLITS, KEPT, BOOTSTRAPS = 6, 0.8, 1000
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
# per held-out sequence and bucket: tokens, those whose cluster (whose expert) is the sequence's, routed ones, those
# routed to the sequence's own expert, and tokens of a sequence that has an expert
COUNTS = ("tokens", "agree", "expert_agrees", "routed", "routed_right", "tail")


class Draw:
    """Clusters and rules fitted on one draw of the training sequences, counted on the held-out ones."""

    def __init__(
        self, training: RoutingFeatures, held_out: RoutingFeatures, num_clusters: int, common: float, seed: int
    ):
        rows = np.random.default_rng(seed).permutation(len(training))[: int(KEPT * len(training))]
        embeddings = training.embeddings.numpy()[rows]
        clusters = find_clusters(embeddings, "kmeans", num_clusters, seed)
        distance = self.distances(embeddings, clusters.centroids)
        self.tokens = Tokens(
            training.tokens.numpy()[rows],
            bucket_of(training.positions.numpy()[rows]),
            clusters.labels,
            -distance / clusters.radii,
            clusters.shares,
        )
        self.held_out = held_out
        away = self.distances(held_out.embeddings.numpy(), clusters.centroids)
        self.labels, self.labels_over_radius = away.argmin(axis=1), (away / clusters.radii).argmin(axis=1)
        self.tail = long_tail(clusters.shares, common)

    @staticmethod
    def distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None].astype(np.float64) - centroids[None], axis=-1)

    def count(self, rule: Rule, threshold: float = 0.0) -> np.ndarray:
        """`COUNTS` of the held-out sequences, (N, buckets, counts). Tokens whose best posterior is below `threshold`
        stay with the base."""
        states, buckets = self.held_out.tokens.numpy(), bucket_of(self.held_out.positions.numpy())
        scores = rule.scores(states, buckets)
        best = scores.argmax(axis=-1)
        sure = softmax(scores, axis=-1).max(axis=-1) >= threshold
        own = self.labels[:, None]
        expert = np.where(self.tail[best] & sure, best, -1)
        own_expert = np.where(self.tail[own], own, -1)
        routed = expert >= 0
        measures = [
            np.ones_like(routed),
            (best == own) & (sure | ~self.tail[best]),
            expert == own_expert,
            routed,
            routed & (expert == own_expert),
            np.broadcast_to(own_expert >= 0, routed.shape),
        ]
        counts = [[(m & (buckets == b)).sum(axis=1) for m in measures] for b in range(len(BUCKET_NAMES))]
        return np.array(counts, np.float64).transpose(2, 0, 1)


SPANS = {**{name: [b] for b, name in enumerate(BUCKET_NAMES)}, "before 32": [0, 1], "from 32": [2, 3]}


def summarise(counts: np.ndarray, domains: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Measures by span, out of counts (N, buckets, counts) and the weight of each sequence (N,)."""
    result = {}
    general = weights * (domains == DOMAINS.index("general"))
    for span, buckets in SPANS.items():
        part = counts[:, buckets].sum(axis=1)
        total = dict(zip(COUNTS, weights @ part, strict=True))
        majority = dict(zip(COUNTS, general @ part, strict=True))
        if not total["tokens"]:  # blocks that are shorter
            continue
        result[f"{span} / agreement"] = total["agree"] / total["tokens"]
        result[f"{span} / agreement of experts"] = total["expert_agrees"] / total["tokens"]
        result[f"{span} / routed"] = total["routed"] / total["tokens"]
        result[f"{span} / precision"] = total["routed_right"] / max(total["routed"], 1e-12)
        result[f"{span} / recall"] = total["routed_right"] / max(total["tail"], 1e-12)
        result[f"{span} / general routed"] = majority["routed"] / majority["tokens"]
    return result


def compare(
    counts: np.ndarray, baseline: np.ndarray, domains: np.ndarray, shares: np.ndarray, bootstraps: int
) -> dict[str, list[float]]:
    """By measure: mean over draws, its difference to plain, and the lower and upper end of the 95 % interval of that.
    Counts (draws, N, buckets, counts)."""
    generator = np.random.default_rng(0)
    members = [np.flatnonzero(domains == number) for number in range(len(DOMAINS))]
    own = shares[domains] / np.bincount(domains, minlength=len(DOMAINS))[domains]
    point = [(summarise(c, domains, own), summarise(p, domains, own)) for c, p in zip(counts, baseline, strict=True)]
    differences = []
    for _ in range(bootstraps):
        draw = generator.integers(len(counts))
        times = np.zeros(len(domains))
        for rows in members:
            np.add.at(times, generator.choice(rows, len(rows)), 1)
        weights = own * times
        ours, theirs = (summarise(c[draw], domains, weights) for c in (counts, baseline))
        differences.append([ours[name] - theirs[name] for name in ours])
    low, high = np.quantile(np.array(differences), (0.025, 0.975), axis=0)
    table = {}
    for number, name in enumerate(point[0][0]):
        values = np.array([(ours[name], theirs[name]) for ours, theirs in point])
        table[name] = [
            float(values[:, 0].mean()),
            float((values[:, 0] - values[:, 1]).mean()),
            low[number],
            high[number],
        ]
        table[name] = [round(float(value), 4) for value in table[name]]
    return table


def study(
    training: RoutingFeatures,
    held_out: RoutingFeatures,
    domains: np.ndarray,
    shares: np.ndarray,
    num_clusters: int,
    common_share: float,
    splits: int,
    bootstraps: int = BOOTSTRAPS,
) -> dict[str, dict]:
    """All variants and thresholds on the features of one layer. `shares` (domains,) of the training corpus."""
    counts: dict[str, list[np.ndarray]] = {}
    for seed in range(splits):
        draw = Draw(training, held_out, num_clusters, common_share, seed)
        rules = {name: fit(draw.tokens) for name, fit in VARIANTS.items()}
        for name, rule in rules.items():
            counts.setdefault(name, []).append(draw.count(rule))
        for threshold in THRESHOLDS:
            key = f"base below a posterior of {threshold}"
            counts.setdefault(key, []).append(draw.count(rules["plain"], threshold))
    baseline = np.stack(counts["plain"])
    return {name: compare(np.stack(found), baseline, domains, shares, bootstraps) for name, found in counts.items()}


def study_whole_texts(
    training: RoutingFeatures, held_out: RoutingFeatures, domains: np.ndarray, common_share: float, splits: int
) -> dict[str, dict]:
    """
    The discriminant in place of the nearest centroid where a model reads whole texts (BERT): the summed scores of a
    text's tokens (with the prior once, or once a token), or each token for itself. Mean and range over draws of the
    adjusted mutual information with the domains, and of the shares of texts (tokens) that get an expert.
    """
    found: dict[str, list[float]] = {}

    def note(name: str, labels: np.ndarray, tail: np.ndarray) -> None:
        of_texts = labels if labels.ndim == 1 else None
        if of_texts is not None:
            found.setdefault(f"{name} / AMI with domains", []).append(adjusted_mutual_info_score(domains, of_texts))
        found.setdefault(f"{name} / general routed", []).append(float(tail[labels[domains == 0]].mean()))
        found.setdefault(f"{name} / rare domains routed", []).append(float(tail[labels[domains > 0]].mean()))

    for number in (3, 4):
        for seed in range(splits):
            draw = Draw(training, held_out, number, common_share, seed)
            scores = plain(draw.tokens).scores(held_out.tokens.numpy(), bucket_of(held_out.positions.numpy()))
            prefix = f"{number} clusters / "
            note(prefix + "nearest centroid", draw.labels, draw.tail)
            note(prefix + "nearest centroid over radius", draw.labels_over_radius, draw.tail)
            again = (scores.shape[1] - 1) * np.log(draw.tokens.shares)
            note(prefix + "summed discriminant", (scores.sum(axis=1) - again).argmax(axis=-1), draw.tail)
            note(prefix + "summed discriminant, prior a token", scores.sum(axis=1).argmax(axis=-1), draw.tail)
            note(prefix + "discriminant of each token", scores.argmax(axis=-1), draw.tail)
            agrees = float((scores.argmax(axis=-1) == draw.labels[:, None]).mean())
            found.setdefault(prefix + "discriminant of each token / agreement", []).append(agrees)
    return {
        name: {"mean": round(float(np.mean(v)), 4), "range": [round(float(min(v)), 4), round(float(max(v)), 4)]}
        for name, v in found.items()
    }


def model_of(run: Run, corpus: Corpus, folder: Path) -> nn.Module:
    """The model of a run: the trained one, else its last checkpoint (named on the console), else trained now."""
    checkpoint = get_last_checkpoint(folder) if folder.is_dir() else None
    if (folder / "final").is_dir() or checkpoint is None:
        return train(run, corpus, folder)
    print(f"{folder} is not complete: {checkpoint} is studied.")
    return FAMILIES[run.family][1].from_pretrained(checkpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-folder", type=Path, default=Path("runs/cluster_quality"))
    parser.add_argument("--bert-model", type=Path, help="a trained CSE BERT, as the recipe quickstart_bert makes it")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a tiny model; no result is written")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run = Run.smoke() if options.smoke else Run()
    folder = options.run_folder / "smoke" if options.smoke else options.run_folder
    splits, bootstraps = (2, 20) if options.smoke else (SPLITS, BOOTSTRAPS)
    corpus = run.corpus()
    model = model_of(run, corpus, folder)
    training, held_out = look(model, corpus.training, 16), look(model, corpus.held_out, min(64, run.block_size))
    shares = np.bincount(corpus.training_domains) / len(corpus.training_domains)
    result = provenance("python " + " ".join(sys.argv)) | {"training_sequences": len(corpus.training)}
    result |= {"columns": ["value", "minus plain", "interval from", "to"], "layers": {}}
    with threadpool_limits(limits=1):
        for layer in training:
            for clusters in (3, 4):
                sides = (training[layer], held_out[layer])
                table = study(*sides, corpus.held_out_domains, shares, clusters, run.common_share, splits, bootstraps)
                result["layers"][f"{layer}, {clusters} clusters"] = table
                show(layer, clusters, table)
        if options.bert_model is not None:
            result["bert"] = bert(options.bert_model, run, splits)
    if not options.smoke:
        write_json(options.output, result)


def bert(path: Path, run: Run, splits: int) -> dict[int, dict]:
    """`study_whole_texts` of a trained CSE BERT by layer, on the same texts; unmasked, as a user would read them."""
    model = CSEBertForMaskedLM.from_pretrained(path)
    corpus = known_domains("bert", model.config.vocab_size, run.block_size, run.shares, None, run.seed)
    training, held_out = look(model, corpus.training, 16), look(model, corpus.held_out, 64)
    found = {}
    for layer in training:
        sides = (training[layer], held_out[layer])
        found[layer] = study_whole_texts(*sides, corpus.held_out_domains, run.common_share, splits)
        for name, measure in found[layer].items():
            print(f"BERT layer {layer}, {name}: {measure['mean']} {measure['range']}")
    return found


def show(layer: int, clusters: int, table: dict[str, dict]) -> None:
    names = ("before 32 / agreement of experts", "from 32 / agreement of experts", "before 32 / general routed")
    names = [name for name in names if name in table["plain"]]
    print(f"layer {layer}, {clusters} clusters: " + "; ".join(names))
    for variant, measures in table.items():
        cells = [f"{measures[n][0]:.3f} {measures[n][2:]}" for n in names]
        print(f"  {variant:45}", *cells)


if __name__ == "__main__":
    main()
