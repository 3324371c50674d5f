# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Reading the sequences to cluster from whatever data there are."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import default_data_collator

from .gathering import local_capacity, rank, world_size


# What a base model is given besides labels, and how many dimensions it has for one sequence.
INPUTS = {
    "input_ids": 1,
    "inputs_embeds": 2,
    "attention_mask": 1,
    "token_type_ids": 1,
    "position_ids": 1,
    "given_clusters": 0,
}


def read_batches(
    data: Iterable[Mapping[str, Any]], batch_size: int | None, sample_size: int, seed: int
) -> list[dict[str, torch.Tensor]]:
    """
    Batches of at least `sample_size` sequences over all processes, or of all there are.

    Args:
        data: rows, or batches if `batch_size` is `None` (see `from_dense`). The processes share rows among them;
            batches are each process's own.
        batch_size: rows in a batch.
        sample_size: sequences to read.
        seed: of the sample of data that have a length.

    Raises:
        ValueError: data or rows of a wrong form, or a wrong `batch_size`.
    """
    if isinstance(data, Mapping | str) or not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ValueError(
            f"data of type {type(data).__name__} is not allowed: it must be one split of rows, or give batches "
            "(batch_size=None)."
        )
    wanted = local_capacity(sample_size)
    if batch_size is None:
        return _first_batches(data, wanted)
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is not allowed: it must be None or an int >= 1.")
    rows = _sample(data, sample_size, seed)
    return [_collate(group) for group in iter(lambda: list(islice(rows, batch_size)), [])]


def _sample(data: Any, sample_size: int, seed: int) -> Iterator[Mapping[str, Any]]:
    """This process's share of `sample_size` rows: drawn at random where there is a length, else the first ones."""
    if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
        drawn = np.random.default_rng(seed).permutation(len(data))[:sample_size]
        return (data[int(row)] for row in drawn[rank() :: world_size()])
    return islice(data, rank(), sample_size, world_size())


def _first_batches(data: Iterable[Mapping[str, Any]], wanted: int) -> list[dict[str, torch.Tensor]]:
    batches, read = [], 0
    for batch in data:
        batch = _inputs_of(batch)
        if any(not isinstance(value, torch.Tensor) or value.dim() <= INPUTS[name] for name, value in batch.items()):
            raise ValueError(
                f"data gives {_shapes(batch)}, which is not allowed with batch_size=None: it must give batches, dicts "
                "of tensors (B, T). Name a batch_size for rows."
            )
        batches.append(batch)
        read += len(next(iter(batch.values())))
        if read >= wanted:
            break
    return batches


def _collate(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    rows = [_inputs_of(row) for row in rows]
    shapes = [_shapes(row) for row in rows]
    if any(shape != shapes[0] for shape in shapes):
        other = next(shape for shape in shapes if shape != shapes[0])
        raise ValueError(
            f"data has rows of {shapes[0]} and {other} in one batch: they must be of one length. Pack or pad them "
            "(with an attention_mask), or use batch_size=1."
        )
    if any(len(shape) != INPUTS[name] for name, shape in shapes[0].items()):
        raise ValueError(
            f"data has rows of {shapes[0]}, which is not allowed: it must be one sequence a row, of shape (T,). Use "
            "batch_size=None for batches."
        )
    return default_data_collator(rows)


def _inputs_of(row: Any) -> dict[str, Any]:
    inputs = {name: row[name] for name in INPUTS if row.get(name) is not None} if isinstance(row, Mapping) else {}
    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        found = sorted(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise ValueError(f"data gives {found}, which is not allowed: it must give dicts with input_ids.")
    return inputs


def _shapes(row: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(np.shape(value)) for name, value in row.items()}
