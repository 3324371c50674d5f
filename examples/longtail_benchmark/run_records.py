# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One finished run as numbers: what is kept of it, of the test split but for `validation`."""

from dataclasses import asdict, dataclass

import numpy as np
from corpus import GENERAL, Corpus
from cost import run_cost
from run_folders import Run
from transformers import PreTrainedTokenizerBase

from modeling_cse.evaluation import NGramCounts, PerplexityByBin, PerplexityByDomain, RoutingPurity, sequence_routes


LONG_TAIL = "long-tail"
POSITIONS = (0, 8, 32, 128)
ORDERS = (1, 2, 3)
BINS = 5


@dataclass(frozen=True)
class TestBlocks:
    """
    The test blocks of a corpus.

    Fields:
        domains: (N,) str.
        scores: n to (N,) float64, the sentence frequency scores by n-grams.
        tokenizer: of the corpus.
    """

    __test__ = False  # pytest takes the name for tests

    domains: np.ndarray
    scores: dict[int, np.ndarray]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, corpus: Corpus) -> "TestBlocks":
        """Scores the test blocks by the counts of the training blocks."""
        train, test = (np.asarray(part.with_format("numpy")["input_ids"][:]) for part in (corpus.train, corpus.test))
        scores = {n: NGramCounts(train, len(corpus.tokenizer), n).scores(test) for n in ORDERS}
        return cls(np.asarray(corpus.test["domain"][:]), scores, corpus.tokenizer)

    @property
    def rare(self) -> list[str]:
        """The long-tail domains, sorted."""
        return sorted(set(self.domains.tolist()) - {GENERAL})


def with_long_tail(perplexity: dict[str, float]) -> dict[str, float]:
    """Perplexities by domain, and the geometric mean over the long-tail domains."""
    rare = [value for domain, value in perplexity.items() if domain != GENERAL]
    return {**perplexity, LONG_TAIL: float(np.exp(np.mean(np.log(rare))))}


def position_bins(block_size: int) -> list[tuple[int, int]]:
    """Half-open ranges of positions: those of METHOD section 2, and doubling beyond 256."""
    edges = [edge for edge in POSITIONS if edge < block_size]
    while edges[-1] >= POSITIONS[-1] and 2 * edges[-1] < block_size:
        edges.append(2 * edges[-1])
    return list(zip(edges, [*edges[1:], block_size], strict=True))


def record_of(run: Run, start: Run | None, blocks: TestBlocks) -> dict:
    """
    Everything the report tells of a run, and what makes it again.

    Args:
        run: a finished run.
        start: the run it went on from, if any.
        blocks: the test blocks it was measured on.

    Raises:
        ValueError: the losses of its tokens are of other blocks than those.
    """
    nll, predicted, experts = run.token_losses()
    if len(nll) != len(blocks.domains):
        raise ValueError(
            f"folder={str(run.folder)!r} is not allowed: it holds losses of {len(nll)} blocks, the corpus has "
            f"{len(blocks.domains)} for the test."
        )
    by_domain = _by_domain(nll, predicted, blocks.domains)
    measured = run.result["test"]["perplexity"]
    # token losses are kept in 16 bits, perplexities were computed before that
    if set(by_domain) != set(measured) or any(not _close(by_domain[name], measured[name]) for name in measured):
        raise ValueError(
            f"folder={str(run.folder)!r} is not allowed: its result.json says {measured}, the losses of its tokens "
            f"say {by_domain}."
        )
    arm = run.arm
    return {
        "arm": arm.name,
        "seed": run.seed,
        "command": run.command,
        "settings": run.settings,
        "kind": arm.kind,
        "reads_ahead": run.family == "gpt2" and arm.model.get("cse_routing") == "sequence",
        "start": arm.start,
        "domain": arm.domain,
        "perplexity": with_long_tail(measured),
        "validation": with_long_tail(run.result["validation"]["perplexity"]),  # not in records until 2026-11-30
        "by_position": by_position(nll, predicted, blocks.domains, run.settings["mixture"]["block_size"]),
        "by_frequency": {str(n): _by_frequency(nll, predicted, scores) for n, scores in blocks.scores.items()},
        "purity": {site: _purity(ids, blocks.domains) for site, ids in experts.items()},
        "routed": {
            site: {domain: values["routed"] for domain, values in domains.items()}
            for site, domains in run.result["test"]["routing"].items()
        },
        "tasks": run.accuracies,
        "task_numbers": run.task_numbers,
        "task_settings": run.task_settings,
        "cost": asdict(run_cost(run, start, blocks.tokenizer)),
    }


def _close(first: float, second: float) -> bool:
    return not np.isfinite([first, second]).all() or abs(np.log(first / second)) < 1e-3


def _by_domain(nll: np.ndarray, predicted: np.ndarray, domains: np.ndarray) -> dict[str, float]:
    metric = PerplexityByDomain()
    return metric.compute(predictions=nll.sum(1), references=predicted.sum(1), domains=domains)["perplexity_by_domain"]


def by_position(nll: np.ndarray, predicted: np.ndarray, domains: np.ndarray, block_size: int) -> dict[str, dict]:
    """
    Perplexities by the position of the token that predicts, whose route it is.

    Args:
        nll: (N, T) nats, 0 where nothing is predicted.
        predicted: (N, T) bool.
        domains: (N,) of the blocks.
        block_size: tokens of a block.
    """
    return {
        f"{first}-{last}": with_long_tail(_by_domain(nll[:, first:last], predicted[:, first:last], domains))
        for first, last in position_bins(block_size)
    }


def _by_frequency(nll: np.ndarray, predicted: np.ndarray, scores: np.ndarray) -> list[float]:
    metric = PerplexityByBin()
    result = metric.compute(predictions=nll.sum(1), references=predicted.sum(1), scores=scores, bins=BINS)
    return result["perplexity_by_bin"]


def _purity(experts: np.ndarray, domains: np.ndarray) -> dict[str, dict[str, float]]:
    metric = RoutingPurity()
    return {
        "sequences": metric.compute(predictions=sequence_routes(experts), references=domains),
        "tokens": metric.compute(predictions=experts.ravel(), references=np.repeat(domains, experts.shape[1])),
    }


__all__ = ["LONG_TAIL", "TestBlocks", "by_position", "position_bins", "record_of", "with_long_tail"]
