# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Reading ahead: routes that look at no hidden state need no trained model, so that their clusters can be found on text
that training will see later, or before the first step.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from .collecting import FeatureCollector, read_batches_of, routed_base_model
from .gathering import rank, world_size


STATELESS = ("evidence", "given")  # kinds of routing that look at no hidden state


def can_read_ahead(model: nn.Module, dataloader: DataLoader | None) -> bool:
    """Whether the first clusters of this model need no training, and its data have rows by number: a stream would lose
    what is read."""
    dataset = getattr(dataloader, "dataset", None)
    by_number = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    stateless = routed_base_model(model).config.cse_routing in STATELESS
    return stateless and by_number and not isinstance(dataset, IterableDataset)


def read_ahead(
    collector: FeatureCollector, model: nn.Module, dataloader: DataLoader, batch_size: int, sample_size: int, seed: int
) -> None:
    """
    Fills a collector with rows drawn at random from the training data, one forward pass each in evaluation mode. The
    sample is the same however many processes there are, where a row is one text. What training draws at random stays
    as it is: batches are made by a copy of the collator, which may have a generator of its own.

    Args:
        collector: of the training, attached.
        model: a CSE model or head for which `can_read_ahead` holds.
        dataloader: of the training; its collator makes the batches.
        batch_size: rows of a batch and process.
        sample_size: sequences, over all processes.
        seed: of the draw.
    """
    # Where rows hold several texts, processes have them at different batches, and none may stop before the others.
    enough = sample_size if world_size() == 1 else None
    with _random_numbers_kept(seed):
        read_batches_of(collector, model, _batches(dataloader, batch_size, sample_size, seed), enough)


def _batches(dataloader: DataLoader, batch_size: int, sample_size: int, seed: int) -> Iterator[dict[str, Any]]:
    """This process's batches. Every process has as many, as forward passes of a sharded model wait for each other."""
    dataset: Any = dataloader.dataset
    drawn = np.random.default_rng(seed).permutation(len(dataset))[:sample_size]
    collate: Any = copy.deepcopy(dataloader.collate_fn)
    for start in range(0, len(drawn), batch_size * world_size()):
        parts = np.array_split(drawn[start : start + batch_size * world_size()], world_size())
        if len(parts[-1]):
            yield collate([dataset[int(row)] for row in parts[rank()]])


@contextmanager
def _random_numbers_kept(seed: int) -> Iterator[None]:
    """Data sets and collators may draw from the global generators: what they draw here depends on `seed` alone, and
    training goes on as if they had not."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it takes accelerators along, for good
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
