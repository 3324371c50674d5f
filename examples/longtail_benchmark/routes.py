# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Do clusters of texts and evidence find the domains of a corpus? Token counts alone, without a model, in minutes.

    python examples/longtail_benchmark/routes.py --output benchmarks/results/longtail_routes.json

A sample of training blocks is clustered and evidence fitted as in training; routes are then read on the validation
blocks, of which neither has seen anything. Of each long-tail domain:

- found: share of its tokens that go to experts of which it has the largest part;
- purity: its part of all tokens that these experts get, at the shares of the corpus.

`rules` compares, on one sample, ways to read a posterior from the sum of the evidence, each with the smoothing and
temper that make held-out texts likeliest; `samples` the library's way over sample sizes and numbers of clusters;
`replays` makes the fits of a run, each from what the last one left: does every domain keep an expert?
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from corpus import Corpus
from scipy.special import log_softmax

from modeling_cse.clustering import ClusterSettings, Identities, fit_texts, held_out
from modeling_cse.clustering.evidence import SMOOTHINGS, TEMPERS, log_ratios
from modeling_cse.clustering.settings import COMMON_BY
from modeling_cse.clustering.texts import count_tokens
from modeling_cse.evidence_cse import INDEPENDENT


BATCH, REPLAYED = 8, (205, 405, 605, 805, 1005, 1405, 1805)  # texts a step, and steps with a fit
POSITIONS = ((0, 8), (8, 32), (32, 128), (128, None))
GENERAL = "general"
MOST_CLUSTERS = 32
RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda tokens: np.ones(len(tokens)),
    f"sum over root of 1 + n / {INDEPENDENT}": lambda tokens: 1 / np.sqrt(1 + tokens / INDEPENDENT),
    f"sum over 1 + n / {INDEPENDENT}": lambda tokens: 1 / (1 + tokens / INDEPENDENT),
}


def ids_and_domains(blocks) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (N, T) and the domain of each block (N,)."""
    blocks = blocks.with_format("numpy")
    return np.stack(blocks["input_ids"]).astype(np.int64), np.asarray(blocks["domain"])


def quality(experts: np.ndarray, domains: np.ndarray, shares: dict[str, float]) -> dict:
    """
    Args:
        experts: (N, T) the expert of each token, -1 for none.
        domains: (N,) of the blocks.
        shares: of the domains in the corpus.
    """
    names = [GENERAL, *(name for name in shares if name != GENERAL)]
    own = {name: experts[domains == name] for name in names}
    slots = experts.max(initial=-1) + 1
    counts = np.stack([np.bincount(own[name].ravel() + 1, minlength=slots + 1) / own[name].size for name in names])
    weighted = counts[:, 1:] * np.array([shares[name] for name in names])[:, None]
    owner = np.where(weighted.sum(0) > 0, weighted.argmax(0), -1)
    found = {}
    for index, name in enumerate(names[1:], start=1):
        its = owner == index
        reached = np.isin(own[name], its.nonzero()[0])
        by_position = [reached[:, low:high].mean() for low, high in POSITIONS if low < reached.shape[1]]
        found[name] = {
            "found": float(counts[index, 1:][its].sum()),
            "found_by_position": [round(float(share), 4) for share in by_position],
            "purity": float(weighted[index, its].sum() / max(weighted[:, its].sum(), 1e-12)),
        }
    return {
        "domains": found,
        "found": float(np.mean([each["found"] for each in found.values()])),
        "purity": float(np.mean([each["purity"] for each in found.values()])),
        "general_routed": float(counts[0, 1:].sum()),
    }


def one_sample(corpus: Corpus, size: int, seed: int, settings: ClusterSettings, slots: int):
    """A fit on `size` training blocks for `slots` experts, and which they were."""
    ids, _ = ids_and_domains(corpus.train)
    ids = ids[np.random.default_rng(seed).permutation(len(ids))[:size]]
    return fit_sample(ids, settings, slots, Identities.none(len(corpus.tokenizer))), ids


def fit_sample(ids: np.ndarray, settings: ClusterSettings, slots: int, known: Identities):
    """Clusters and evidence of texts (N, T) for `slots` experts; `known` is what the fit before it left."""
    return fit_texts(
        ids,
        np.full(len(ids), -1),
        held_out(len(ids)),
        settings,
        known,
        vocab_size=known.centroids.shape[1],
        num_experts=slots,
        max_clusters=MOST_CLUSTERS,
    )


def compare_rules(corpus: Corpus, size: int, seed: int, settings: ClusterSettings, slots: int) -> list[dict]:
    """Ways to read the same evidence, on one sample."""
    fit, ids = one_sample(corpus, size, seed, settings, slots)
    held, labels = held_out(len(ids)), fit.labels
    validation, domains = ids_and_domains(corpus.validation)
    counts = count_tokens(ids[~held], len(fit.evidence.table))
    tables = {each: log_ratios(counts, labels[~held], len(fit.clustering), each) for each in SMOOTHINGS}
    experts = fit.ownership.experts
    rows = []
    for name, rule in RULES.items():
        discount = rule(np.arange(1, ids.shape[1] + 1.0))[:, None]
        likelihoods = {}
        for smoothing, table in tables.items():
            sums = table[ids[held]].cumsum(1, dtype=np.float64) * discount
            for temper in TEMPERS:
                posterior = log_softmax(temper * sums + np.log(fit.shares), axis=-1)
                right = np.take_along_axis(posterior, labels[held][:, None, None], axis=-1)
                likelihoods[smoothing, temper] = float(right.mean())
        smoothing, temper = max(likelihoods, key=likelihoods.get)
        sums = tables[smoothing][validation].cumsum(1, dtype=np.float64) * discount
        clusters = (temper * sums + np.log(fit.shares)).argmax(-1)
        row = {"rule": name, "smoothing": smoothing, "temper": temper}
        row["held_out_log_likelihood"] = likelihoods[smoothing, temper]
        rows.append(row | quality(experts[clusters], domains, corpus.mixture.shares))
    return rows


def measure_samples(
    corpus: Corpus, sizes: Sequence[int], counts: Sequence[int], seeds: int, common_share: float, slots: int
) -> list[dict]:
    """The library's way, over samples of several sizes, numbers of clusters, choices of the common ones and seeds."""
    validation, domains = ids_and_domains(corpus.validation)
    rows = []
    for size, count, common_by, seed in product(sizes, counts, COMMON_BY, range(seeds)):
        settings = ClusterSettings("text", count, common_share, seed=seed, common_by=common_by)
        fit, _ = one_sample(corpus, size, seed, settings, slots)
        experts = fit.ownership.experts[fit.evidence.clusters(validation)]
        row = {"texts": size, "clusters": count, "common_by": common_by, "seed": seed}
        row |= {"experts": int((fit.ownership.experts >= 0).sum()), "unserved": fit.ownership.unserved}
        row |= {"smoothing": fit.evidence.smoothing, "temper": fit.evidence.temper}
        rows.append(row | quality(experts, domains, corpus.mixture.shares))
        print({name: value for name, value in rows[-1].items() if name != "domains"}, flush=True)
    return rows


def replay(
    corpus: Corpus, size: int, counts: Sequence[int], seeds: int, common_share: float, slots: int
) -> list[dict]:
    """
    The fits of a run of 2,048 steps, one after the other, for several orders of the text.

    Returns rows of a number of clusters and a choice of the common ones: of each domain the share of its sampled texts
    whose cluster has an expert, `mean` and `least` over fits and orders, and `by_seed` those of single fits.
    """
    ids, domains = ids_and_domains(corpus.train)
    rows = []
    for count, common_by in product(counts, COMMON_BY):
        served: dict[str, list[list[float]]] = {name: [] for name in corpus.mixture.shares}
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(ids))
            settings = ClusterSettings("text", count, common_share, seed=seed, common_by=common_by)
            known = Identities.none(len(corpus.tokenizer))
            of_fits = []
            for end in (BATCH * step for step in REPLAYED):
                sample = order[: min(end, len(ids))][-size:]
                fit = fit_sample(ids[sample], settings, slots, known)
                known = fit.ownership.identities
                owned = fit.ownership.experts[fit.labels] >= 0
                of_fits.append({name: float(owned[domains[sample] == name].mean()) for name in served})
            for name, by_seed in served.items():
                by_seed.append([round(each[name], 4) for each in of_fits])
        row = {"texts": size, "clusters": count, "common_by": common_by}
        row["domains"] = {
            name: {"mean": float(np.mean(each)), "least": float(np.min(each)), "by_seed": each}
            for name, each in served.items()
        }
        means = {name: (round(each["mean"], 3), each["least"]) for name, each in row["domains"].items()}
        print({**row, "domains": means}, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--texts", type=int, nargs="+", default=[640, 1640, 4096])
    parser.add_argument("--clusters", type=int, nargs="+", default=[8, 10, 14, 20])
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--orders", type=int, default=8, help="of the text, for replayed fits")
    parser.add_argument("--common_share", type=float, default=0.75)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    corpus = Corpus.load(arguments.corpus)
    settings = ClusterSettings("text", None, arguments.common_share)
    record = {
        "mixture": corpus.mixture.shares,
        "common_share": arguments.common_share,
        "slots": arguments.experts,
        "positions": POSITIONS,
        "rules": [
            {"texts": size, **row}
            for size in arguments.texts
            for row in compare_rules(corpus, size, 0, settings, arguments.experts)
        ],
        "samples": measure_samples(
            corpus,
            arguments.texts,
            arguments.clusters,
            arguments.seeds,
            arguments.common_share,
            arguments.experts,
        ),
        "replays": replay(
            corpus,
            max(arguments.texts),
            arguments.clusters,
            arguments.orders,
            arguments.common_share,
            arguments.experts,
        ),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
