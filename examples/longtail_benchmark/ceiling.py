# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""How much of the oracle's gain can routes keep that read from left to right? A bound, without new training.

    python examples/longtail_benchmark/ceiling.py --size cpu --seeds 3 4 --output ceiling.json

The oracle's experts were trained with each text's domain told from its first token on. Here they answer where evidence
sends the tokens, and evidence is *taught* the domains of training blocks: no cluster has to be found. What is missing
then is missing because a text's first tokens tell little of its domain, not because of the clusters. No strict bound:
these experts were trained under labels, not under such routes.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from blocks import held_out_blocks
from comparisons import Roles
from corpus import Corpus
from measure import measure
from origin import origin
from records import read_result
from routes import ids_and_domains
from run_folders import Run
from run_records import LONG_TAIL, by_position, with_long_tail
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel

from modeling_cse.clustering import held_out
from modeling_cse.clustering.evidence import Evidence
from modeling_cse.evaluation import share_of_gain
from modeling_cse.evidence_cse import EvidenceRouter


class TaughtRoutes(nn.Module):
    """A model with `cse_routing="given"` that is given what evidence says of its tokens."""

    def __init__(self, model: PreTrainedModel, evidence: Evidence):
        super().__init__()
        self.base_model = nn.Module()  # no sites: `measure` is not to read routes
        self.model, self.router = model, EvidenceRouter(model.config).to(model.device)
        self.router.write(torch.from_numpy(evidence.table), torch.from_numpy(evidence.shares))

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: torch.Tensor, **inputs):
        return self.model(input_ids, given_clusters=self.router(input_ids, None, None), **inputs)


def teach(corpus: Corpus, texts: int, seed: int) -> Evidence:
    """Evidence of the domains, in the order in which the oracle has them, from so many training blocks."""
    ids, domains = ids_and_domains(corpus.train)
    drawn = np.random.default_rng(seed).permutation(len(ids))[:texts]
    names, labels = np.unique(domains[drawn], return_inverse=True)
    if names.tolist() != sorted(corpus.mixture.shares):
        raise ValueError(f"texts={texts} is not allowed: they are of {names.tolist()} only.")
    shares = np.bincount(labels) / len(labels)
    return Evidence.fit(ids[drawn], labels, shares, len(corpus.tokenizer), held_out(len(labels)))


@dataclass(frozen=True)
class Found:
    """
    What a model makes of the test text.

    Fields:
        perplexity: by domain, and of the long tail.
        by_position: the same by ranges of positions of the token that predicts.
    """

    perplexity: dict[str, float]
    by_position: dict[str, dict[str, float]]


def taught(run: Path, corpus: Corpus, evidence: Evidence) -> Found:
    """A finished oracle under routes that were taught, in the precision of its training: that of the figures it is
    compared with."""
    causal = corpus.mixture.family == "gpt2"
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    model = TaughtRoutes(auto.from_pretrained(run / "model"), evidence)
    bf16 = Run.load(run).training.get("bf16") or False
    losses = measure(model, held_out_blocks(corpus.test, corpus), causal, bf16)
    perplexity = {name: losses.perplexity(name) for name in sorted(corpus.mixture.shares)}
    nll = losses.nll.astype(np.float64)
    places = by_position(nll, losses.predicted, losses.domains, corpus.mixture.block_size)
    return Found(with_long_tail(perplexity), places)


def told(run: Path, corpus: Corpus) -> Found:
    """A run as it was measured when it had finished.

    Raises:
        ValueError: it is not finished.
    """
    if (result := read_result(run)) is None:
        raise ValueError(f"runs={str(run.parent)!r} is not allowed: {run.name!r} is not there, or not finished.")
    nll, predicted, _ = Run.load(run).token_losses()
    domains = np.asarray(corpus.test["domain"][:])
    places = by_position(nll, predicted, domains, corpus.mixture.block_size)
    return Found(with_long_tail(result["test"]["perplexity"]), places)


def compare(
    runs: Path, corpus: Corpus, seeds: Sequence[int], sizes: Sequence[int], arm: str = Roles.oracle
) -> list[dict]:
    """
    A row a number of texts that teach: the share of the oracle's gain on the long tail, over the seeds, in all and by
    position; and test perplexities over the dense twin's by seed and domain.

    Args:
        runs: folder of `<arm>-<seed>`, finished.
        corpus: of the runs.
        seeds: of the dense model and the oracle.
        sizes: training blocks that teach.
        arm: the oracle.
    """
    dense, oracle = ({seed: told(runs / f"{name}-{seed}", corpus) for seed in seeds} for name in (Roles.baseline, arm))
    rows = []
    for texts in sizes:
        found = {seed: taught(runs / f"{arm}-{seed}", corpus, teach(corpus, texts, seed)) for seed in seeds}
        places = next(iter(found.values())).by_position
        over = {
            seed: {name: value / dense[seed].perplexity[name] for name, value in each.perplexity.items()}
            for seed, each in found.items()
        }
        row = {"texts": texts, "share_of_oracle": _share(lambda one: one.perplexity, found, oracle, dense)}
        row["by_position"] = {
            place: _share(lambda one, place=place: one.by_position[place], found, oracle, dense) for place in places
        }
        rows.append({**row, "over_dense": over})
        print(rows[-1], flush=True)
    return rows


def _share(read: Callable[[Found], dict[str, float]], *parts: dict[int, Found]) -> dict | None:
    """Of the oracle's gain on the long tail what taught routes keep, given what was found by seed."""
    share = share_of_gain(*({seed: read(one)[LONG_TAIL] for seed, one in part.items()} for part in parts))
    return None if share is None else asdict(share)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu")
    parser.add_argument("--corpus", type=Path, default=Path("runs/longtail/corpus/main"))
    parser.add_argument("--runs", type=Path, default=Path("runs/longtail"), help="folder with <size>/<corpus>/...")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--oracle", default=Roles.oracle, metavar="ARM")
    parser.add_argument("--texts", type=int, nargs="+", default=[2048, 16000], help="training blocks that teach")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args(arguments)
    corpus = Corpus.load(given.corpus)
    rows = compare(given.runs / given.size / given.corpus.name, corpus, given.seeds, given.texts, given.oracle)
    record = {"size": given.size, "corpus": given.corpus.name, "oracle": given.oracle, "rows": rows, **origin()}
    given.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
