# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Losses that mean the same however a step's batch was cut into micro-batches, or spread over processes."""

from collections.abc import Callable
from functools import wraps
from inspect import signature

import torch
from torch.nn.functional import cross_entropy


IGNORED = -100


def sums_over_the_step(forward: Callable) -> Callable:
    """
    Wraps a stock head's `forward`, whose loss is a mean over the labels of a micro-batch.

    `Trainer` counts the labels of a whole step, over its micro-batches and processes, hands the number on as
    `num_items_in_batch`, and adds up what comes back. The stock heads pass over it, and their losses and gradients
    grow with the number of micro-batches. Here the mean is weighted by the micro-batch's share of the labels: single
    labels, several labels a row and numbers alike, as all their stock losses are means over the labels.
    """
    place = list(signature(forward).parameters).index("labels")

    @wraps(forward)
    def wrapper(self, *args, num_items_in_batch: torch.Tensor | int | None = None, **kwargs):
        labels = args[place - 1] if len(args) >= place else kwargs.get("labels")
        outputs = forward(self, *args, **kwargs)
        if labels is None or num_items_in_batch is None:
            return outputs
        loss = outputs[0]
        count = (labels != IGNORED).sum().to(loss.device)
        # The mean over no label is not a number, while nothing is what it adds to the step.
        loss = torch.where(count > 0, loss, 0.0) * (count / num_items_in_batch)
        if isinstance(outputs, tuple):
            return loss, *outputs[1:]
        outputs["loss"] = loss
        return outputs

    wrapper.__signature__ = signature(forward)  # type: ignore[attr-defined]  # unknown to typeshed
    return wrapper


def pretraining_loss(
    token_logits: torch.Tensor,
    row_logits: torch.Tensor,
    labels: torch.Tensor,
    row_labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int,
) -> torch.Tensor:
    """
    BERT's two losses as a sum over a step, of which only the number of token labels is known.

    Each row's next-sentence loss counts as often as the row has token labels, so that both divide by that number. On
    a whole batch it is the stock loss where all rows have as many token labels; a row without any does not count.

    Args:
        token_logits: (B, T, vocabulary).
        row_logits: (B, 2).
        labels: (B, T) int64, -100 where nothing is asked.
        row_labels: (B,) int64.
        num_items_in_batch: token labels of the whole step.

    Returns:
        Scalar, fp32.
    """
    labels, row_labels = labels.to(token_logits.device), row_labels.view(-1).to(row_logits.device)
    tokens = cross_entropy(token_logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
    rows = cross_entropy(row_logits.float(), row_labels, reduction="none")
    return (tokens + (rows * (labels != IGNORED).sum(-1)).sum()) / num_items_in_batch


__all__ = ["pretraining_loss", "sums_over_the_step"]
