# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What tells clear clusters of texts from one cloud that k-means has cut? Token counts alone, no model, in minutes.

    python benchmarks/text_clarity.py
    python benchmarks/text_clarity.py --general FILE --output benchmarks/results/text_clarity_general.json

The sample corpus, and its general text alone, each cut as `compare.py` cuts it; clusters and evidence fitted as in
training, on 2,048 blocks of 256 tokens. Of each cluster with an expert the two measures that `compare.py` could judge
by: the silhouette of its sample of 1,024 training blocks in the space in which clusters are found (`embed_texts`), and
the separation on held-out blocks. Held out are the documents of the validation file, of which training has seen
nothing; or a tenth of the passages of the training file, the rest of whose documents is trained on.

With `--general` it is asked of a file of general text alone (whole documents, no rare domain): how often is the
clearest cluster with an expert clear by its separation on so many held-out blocks, with any number of them in a
cluster, and with the number that `compare.py` asks for? Draws of held-out blocks, of several fits.
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

from modeling_cse.analysis import CLARITY, LEAST_SEQUENCES
from modeling_cse.clustering import ClusterSettings, Identities, JointFit, fit_texts, held_out
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
OUTSIDE, DRAWS = (16, 32, 64, 128, 256), 25


def cut(folder: Path, domains: tuple[str, ...], documents: bool, vocab_size: int) -> tuple[dict, int]:
    """Blocks (N, 256) and their domains (N,) by split, as a comparison has them, and the size of the vocabulary."""
    files = {}
    for name in ("train", "validation"):
        with gzip.open(DATA / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [line for line in file if json.loads(line)["domain"] in domains]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("".join(rows), encoding="utf-8")
    files = files if documents else {"train": files["train"]}
    return cut_files(folder, files, "domain", 10**7, vocab_size)


def cut_files(
    folder: Path, files: dict[str, Path], domain_column: str | None, tokens: int, vocab_size: int
) -> tuple[dict, int]:
    """The same of files of text by split; without domains, all are of one."""
    columns = {"text_column": "text", "domain_column": domain_column}
    extract = make_extract(
        folder / "extract",
        train=[str(files["train"])],
        validation=[str(files["validation"])] if "validation" in files else None,
        tokens=tokens,
        block_size=BLOCK,
        vocab_size=vocab_size,
        **columns,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "extract" / "tokenizer")
    paths = {f"{name}_file": str(Path(extract.folder) / f"{name}.jsonl") for name in extract.blocks}
    corpus, blocks = load_corpus(**paths, **columns), {}
    for name in extract.blocks:
        found = pack(corpus[name], tokenizer, block_size=BLOCK, domain_column=domain_column).with_format("numpy")
        domains = np.asarray(found["domain"]) if domain_column else np.full(len(found), "all")
        blocks[name] = np.stack(list(found["input_ids"])).astype(np.int64), domains
    return blocks, len(tokenizer)


def fit_and_sample(ids: np.ndarray, vocab_size: int, seed: int) -> tuple[JointFit, np.ndarray]:
    """A fit as training makes it, and the rows by which a comparison describes its clusters."""
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
    return fit, np.sort(np.random.default_rng(seed + 1).permutation(len(ids))[:SAMPLE])


def measure(blocks: dict, vocab_size: int, seed: int) -> list[dict]:
    """The clusters with an expert: share of the sample, domain that most of it is of, silhouette, separation."""
    ids, domains = blocks["train"]
    fit, rows = fit_and_sample(ids, vocab_size, seed)
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


def clear_by_chance(blocks: dict, vocab_size: int, seeds: int) -> list[dict]:
    """How often the clearest cluster with an expert is clear, by the number of held-out blocks."""
    ids, outside = blocks["train"][0], blocks["validation"][0]
    clear: dict[tuple[int, int], list[bool]] = {}
    for seed in range(seeds):
        fit, rows = fit_and_sample(ids, vocab_size, seed)
        owners = fit.ownership.experts >= 0
        labels, of_outside = fit.evidence.of_texts(ids[rows]), fit.evidence.of_texts(outside)
        for number in OUTSIDE:
            for draw in range(DRAWS):
                drawn = np.random.default_rng([seed, draw]).permutation(len(outside))[:number]
                known = ids[rows], labels, outside[drawn], of_outside[drawn]
                apart = np.nan_to_num(separation(*known, len(owners), vocab_size), nan=-np.inf)
                counts = np.bincount(of_outside[drawn], minlength=len(owners))
                for least in (1, LEAST_SEQUENCES):
                    clearest = apart[owners & (counts >= least)].max(initial=-np.inf)
                    clear.setdefault((number, least), []).append(bool(clearest >= CLARITY["evidence"].clear))
    return [
        {"held_out": number, "least_in_a_cluster": least, "clear": float(np.mean(found)), "draws": len(found)}
        for (number, least), found in clear.items()
    ]


def general_text(file: Path, vocab_size: int, seeds: int) -> dict:
    """`clear_by_chance` of a file of general text, cut as a comparison cuts it."""
    with tempfile.TemporaryDirectory() as folder:
        blocks, tokens = cut_files(Path(folder), {"train": file}, None, 10**6, vocab_size)
    counts = {name: len(found[0]) for name, found in blocks.items()}
    return {"text": file.name, "vocabulary": tokens, "blocks": counts, "rows": clear_by_chance(blocks, tokens, seeds)}


def main() -> None:
    """Measures from the command line, prints the clearest cluster with an expert of each seed, writes a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[2048])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "text_clarity.json")
    parser.add_argument("--general", type=Path, help="a .jsonl or .jsonl.gz file of general text, whole documents")
    arguments = parser.parse_args()
    of = f" --general {arguments.general.name}" if arguments.general is not None else ""
    about = {**provenance(f"python benchmarks/text_clarity.py{of}"), "scikit-learn": sklearn.__version__}
    if arguments.general is not None:
        found = [general_text(arguments.general, size, arguments.seeds) for size in arguments.vocabularies]
        print(*(row for each in found for row in each["rows"]), sep="\n")
        write_json(arguments.output, {**about, "general": found})
        return
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
    write_json(arguments.output, {**about, "rows": rows})


if __name__ == "__main__":
    main()
