# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What tells clear clusters of texts from one cloud that k-means has cut? Token counts alone, no model, in minutes.

    python benchmarks/text_clarity.py

The sample corpus, and its general text alone, each cut as `compare.py` cuts it; clusters and evidence fitted as in
training, on 2,048 blocks of 256 tokens. Of each cluster with an expert the two measures that `compare.py` could judge
by: the silhouette of its sample of 1,024 training blocks in the space in which clusters are found (`embed_texts`), and
the separation on held-out blocks. Held out are the documents of the validation file, of which training has seen
nothing; or a tenth of the passages of the training file, the rest of whose documents is trained on.
"""

import argparse
import gzip
import json
import tempfile
from pathlib import Path

import numpy as np
import sklearn
from known_domains import DATA, provenance, write_json
from sklearn.metrics import silhouette_samples
from transformers import AutoTokenizer

from modeling_cse.clustering import ClusterSettings, Identities, fit_texts, held_out
from modeling_cse.clustering.evidence import separation
from modeling_cse.clustering.texts import embed_texts
from modeling_cse.data import load_corpus, pack
from modeling_cse.runs.extract import make_extract
from modeling_cse.runs.measuring import SAMPLE


CASES = {
    "general, legal, medical": ("general", "legal", "medical"),
    "general alone": ("general",),
}
HELD_OUT = ("documents", "passages")
BLOCK, TEXTS, COMMON_SHARE = 256, 2048, 0.75
SLOTS = 32  # as many as there can be clusters


def cut(folder: Path, domains: tuple[str, ...], documents: bool, vocab_size: int) -> tuple[dict, int]:
    """Blocks (N, 256) and their domains (N,) by split, as a comparison has them, and the size of the vocabulary."""
    files = {}
    for name in ("train", "validation"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [line for line in file if json.loads(line)["domain"] in domains]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(rows), encoding="utf-8")
    columns = {"text_column": "text", "domain_column": "domain"}
    extract = make_extract(
        folder / "extract",
        train=[str(files["train"])],
        validation=[str(files["validation"])] if documents else None,
        tokens=10**7,
        block_size=BLOCK,
        vocab_size=vocab_size,
        **columns,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "extract" / "tokenizer")
    paths = {f"{name}_file": str(Path(extract.folder) / f"{name}.jsonl") for name in files}
    corpus, blocks = load_corpus(**paths, **columns), {}
    for name in files:
        found = pack(corpus[name], tokenizer, block_size=BLOCK, domain_column="domain").with_format("numpy")
        blocks[name] = np.stack(list(found["input_ids"])).astype(np.int64), np.asarray(found["domain"])
    return blocks, len(tokenizer)


def measure(blocks: dict, vocab_size: int, seed: int) -> list[dict]:
    """The clusters with an expert: share of the sample, domain that most of it is of, silhouette, separation."""
    ids, domains = blocks["train"]
    rows = np.random.default_rng(seed).permutation(len(ids))[:TEXTS]
    fit = fit_texts(
        ids[rows],
        np.full(len(rows), -1),
        held_out(len(rows)),
        ClusterSettings("text", None, COMMON_SHARE, seed=seed),
        Identities.none(vocab_size),
        vocab_size=vocab_size,
        num_experts=SLOTS,
        max_clusters=SLOTS,
    )
    rows = np.sort(np.random.default_rng(seed + 1).permutation(len(ids))[:SAMPLE])
    sample, domains, outside = ids[rows], domains[rows], blocks["validation"][0]
    labels, of_outside = fit.evidence.of_texts(sample), fit.evidence.of_texts(outside)
    silhouettes = silhouette_samples(embed_texts(sample, vocab_size, 0), labels)
    apart = separation(sample, labels, outside, of_outside, len(fit.clustering), vocab_size)
    clusters = []
    for label in np.flatnonzero(fit.ownership.experts >= 0):
        inside = labels == label
        if not inside.any():
            continue
        names, counts = np.unique(domains[inside], return_counts=True)
        clusters.append(
            {
                "domain": str(names[counts.argmax()]),
                "share": round(float(inside.mean()), 4),
                "silhouette": round(float(silhouettes[inside].mean()), 4),
                "separation": None if np.isnan(apart[label]) else round(float(apart[label]), 4),
                "held_out": int((of_outside == label).sum()),
            }
        )
    return clusters


def main() -> None:
    """Measures from the command line, prints the clearest cluster with an expert of each seed, writes a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2048])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "text_clarity.json")
    arguments = parser.parse_args()
    rows = []
    for vocab_size in arguments.vocabularies:
        for case, domains in CASES.items():
            for way in HELD_OUT:
                with tempfile.TemporaryDirectory() as folder:
                    blocks, tokens = cut(Path(folder), domains, way == "documents", vocab_size)
                of_seeds = [measure(blocks, tokens, seed) for seed in range(arguments.seeds)]
                row = {"text": case, "held_out": way, "vocabulary": tokens, "blocks": len(blocks["train"][0])}
                for name in ("silhouette", "separation"):
                    values = [[each[name] for each in found if each[name] is not None] for found in of_seeds]
                    row[name] = [max(each, default=None) for each in values]
                print(row, flush=True)
                rows.append(row | {"clusters": of_seeds})
    about = {**provenance("python benchmarks/text_clarity.py"), "scikit-learn": sklearn.__version__}
    write_json(arguments.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
