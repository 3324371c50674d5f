# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Perplexity as exp of the token-mean loss, over everything and by domain.

Every number here is exp(sum of losses / number of predicted tokens). Means of batch losses weigh short sequences
like long ones, and means of exponentials are dominated by the worst sequence; neither appears in this file.

Three layers, each usable without the others: `token_losses` (logits to sums), `Perplexity` and `PerplexityByDomain`
(sums to numbers, as `evaluate` metrics), and two adapters that bring the same arithmetic into the `Trainer`.
"""

from collections.abc import Callable, Sequence

import datasets
import evaluate
import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn import functional
from transformers import EvalPrediction

from .metric import InMemoryMetric


IGNORE_INDEX = -100
# Positions whose fp32 logits exist at one time: 1,024 of them take 200 MB at GPT-2's vocabulary.
POSITIONS_PER_CHUNK = 1024

_INPUTS = """
Args:
    predictions: summed negative log likelihood of each sequence, in nats (float64).
    references: number of predicted tokens of each sequence (int64); 0 is allowed for single sequences.
"""


@torch.no_grad()
def token_losses(logits: torch.Tensor, labels: torch.Tensor, *, shift: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the next-token or masked-token losses of every row.

    The log-softmax runs in fp32 whatever the dtype of the logits, over a slice of the positions at a time, so that
    no second tensor of the size of the logits is ever made. No gradient flows: this is for evaluation.

    Args:
        logits: (rows, length, vocabulary), any floating dtype.
        labels: (rows, length), token ids; -100 marks positions that are not predicted, whatever their logits hold.
        shift: `True` for causal models, where the logits at t predict the label at t + 1; `False` for masked models.

    Returns:
        (rows,) fp32 summed negative log likelihoods in nats, and (rows,) int64 counts of predicted tokens.

    Raises:
        ValueError: if the shapes do not belong together.
    """
    if logits.dim() != 3:
        raise ValueError(f"`logits` has shape {tuple(logits.shape)}, allowed is (rows, length, vocabulary)")
    if labels.shape != logits.shape[:2]:
        allowed = tuple(logits.shape[:2])
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, allowed is {allowed}, as `logits` has it")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    rows, length, vocabulary = logits.shape
    nll_sum = torch.zeros(rows, dtype=torch.float32, device=logits.device)
    step = max(1, POSITIONS_PER_CHUNK // max(rows, 1))
    for start in range(0, length, step):
        chunk = logits[:, start : start + step].float().reshape(-1, vocabulary)
        targets = labels[:, start : start + step].reshape(-1)
        losses = functional.cross_entropy(chunk, targets, ignore_index=IGNORE_INDEX, reduction="none")
        nll_sum += losses.view(rows, -1).sum(dim=1)
    return nll_sum, (labels != IGNORE_INDEX).sum(dim=1)


class Perplexity(InMemoryMetric):
    """exp(total loss / total tokens) over all sequences.

    An infinite or not-a-number loss is an answer (the model diverged) and comes out as inf or nan. Impossible input
    (negative losses, negative counts, no token at all) is a mistake of the caller and raises `ValueError`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity: exp of the token-mean negative log likelihood.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Sequence[float], references: Sequence[int]) -> dict[str, float | int]:
        return _summary(predictions, references)


class PerplexityByDomain(Perplexity):
    """Perplexity over everything and for each domain by itself; a third feature `domains` names each sequence's.

    The overall number is that of all tokens together, which is not a mean of the domains' numbers.
    """

    def _info(self) -> evaluate.MetricInfo:
        info = super()._info()
        info.description = "Perplexity by domain: exp of the token-mean negative log likelihood of each domain."
        info.inputs_description += "    domains: the name of each sequence's domain (string).\n"
        info.features = datasets.Features({**info.features, "domains": datasets.Value("string")})
        return info

    # `evaluate` hands features over by name, and a metric has its own
    def _compute(  # type: ignore[override]
        self, predictions: Sequence[float], references: Sequence[int], domains: Sequence[str] | np.ndarray
    ) -> dict:
        nll, tokens, names = np.asarray(predictions), np.asarray(references), np.asarray(domains)
        overall = _summary(nll, tokens)
        parts = {
            str(name): _summary(nll[names == name], tokens[names == name], where=f" in domain {str(name)!r}")
            for name in dict.fromkeys(names.tolist())
        }
        return {
            "perplexity": overall["perplexity"],
            "loss": overall["loss"],
            "perplexity_by_domain": {name: part["perplexity"] for name, part in parts.items()},
            "tokens_by_domain": {name: part["tokens"] for name, part in parts.items()},
        }


def row_losses_for_trainer(shift: bool) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Make a `preprocess_logits_for_metrics` that keeps two numbers a row instead of the logits.

    Args:
        shift: as in `token_losses`.

    Returns:
        A function (logits, labels) -> (nll_sum, tokens), both (rows,). The logits may be a tuple or list of model
        outputs, whose first must be the logits. It raises `ValueError` if the data set has no labels.
    """

    def row_losses(logits: torch.Tensor | Sequence, labels: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if labels is None:
            raise ValueError("`labels` is None, allowed are token ids: perplexity needs an evaluation set with labels")
        if isinstance(logits, (tuple, list)):
            logits = logits[0]
        return token_losses(logits, labels, shift=shift)

    return row_losses


def perplexity_for_trainer() -> Callable[[EvalPrediction], dict[str, float | int]]:
    """Make the `compute_metrics` that goes with `row_losses_for_trainer`.

    With `Trainer(eval_dataset={"medical": ...})` it yields `eval_medical_perplexity` and `eval_medical_tokens`, exact
    over rows of any length and a smaller last batch, unlike the exp of `eval_medical_loss`. For
    `batch_eval_metrics=True` it is not made: two numbers a row need no accumulation.

    Returns:
        A function from `EvalPrediction` to {"perplexity", "tokens"}. It raises `ValueError` if the predictions are
        not those of `row_losses_for_trainer`, or hold no predicted token.
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float | int]:
        pairs = prediction.predictions
        # With `eval_do_concat_batches=False` the Trainer hands over a list with one pair a batch.
        if isinstance(pairs, list):
            pairs = tuple(np.concatenate([np.atleast_1d(pair[part]) for pair in pairs]) for part in range(2))
        if not isinstance(pairs, tuple) or len(pairs) != 2 or any(np.ndim(part) > 1 for part in pairs):
            raise ValueError(
                f"`predictions` is {_shape_of(pairs)}, allowed is (nll_sum, tokens) of shape (rows,) each: "
                "pass `preprocess_logits_for_metrics=row_losses_for_trainer(shift)` to the Trainer"
            )
        summary = _summary(*pairs)
        return {"perplexity": summary["perplexity"], "tokens": summary["tokens"]}

    return compute_metrics


def _summary(nll: ArrayLike, tokens: ArrayLike, where: str = "") -> dict[str, float | int]:
    """exp of the token-mean loss; sums in float64, because millions of fp32 addends lose the fourth digit."""
    nll, tokens = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    if (tokens < 0).any():
        raise ValueError(f"`references` has a count of {tokens.min()} tokens{where}, allowed are counts from 0")
    # Rounding may leave a certain prediction a hair below zero; a log likelihood with its sign forgotten is far below.
    if (nll < -1e-3).any():
        raise ValueError(f"`predictions` has a loss of {np.nanmin(nll)}{where}, allowed are losses >= 0 (in nats)")
    total = int(tokens.sum())
    if total == 0:
        raise ValueError(f"`references` has 0 predicted tokens{where}, allowed is at least 1: all labels are -100?")
    loss = float(nll.sum() / total)
    with np.errstate(over="ignore"):
        return {"perplexity": float(np.exp(loss)), "loss": loss, "tokens": total}


def _shape_of(value: ArrayLike) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__} of shape {np.shape(value)}"
