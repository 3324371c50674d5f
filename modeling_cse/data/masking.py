# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Masks that can be told again: evaluation must ask for the same tokens every time, and a resumed run for those that
the unbroken one would have asked for."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase


def mask_once(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, mlm_probability: float, seed: int) -> Dataset:
    """
    Masks packed blocks for good, so that runs and steps are compared on the same predictions.

    Args:
        dataset: blocks of equal length, with `input_ids`.
        tokenizer: the one that made them; it must have a mask token.
        mlm_probability: share of the tokens to predict, above 0 and below 1.
        seed: of the masks.

    Returns:
        The blocks with `input_ids` masked and `labels` (-100 where nothing is asked).

    Raises:
        ValueError: `mlm_probability` out of range.
    """
    _check(mlm_probability)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=seed)

    def mask(batch: dict[str, list]) -> dict[str, list]:
        masked = collator([{"input_ids": torch.tensor(ids)} for ids in batch["input_ids"]])
        return {"input_ids": masked["input_ids"].tolist(), "labels": masked["labels"].tolist()}

    # The collator draws on as it goes, so that a cached result of another start would not be the same.
    return dataset.map(mask, batched=True, load_from_cache_file=False, desc="Masking")


class FreshMasks(torch.utils.data.Dataset):
    """
    Blocks that are masked anew in every epoch. A row's masks depend on seed, epoch and row alone: a collator that
    draws from the global generator does so ahead of the step, also for the batch after a checkpoint, and the Trainer
    restores that generator a batch late, so that a resumed run would see other masks.

    Args:
        dataset: packed blocks, with `input_ids`; other columns stay.
        tokenizer: the one that made them; it must have a mask token.
        mlm_probability: share of the tokens to predict, above 0 and below 1.
        seed: of the masks.

    Raises:
        ValueError: `mlm_probability` out of range.
    """

    def __init__(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, *, mlm_probability: float, seed: int):
        _check(mlm_probability)
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self.collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Before an epoch, also one that is gone on with. The data loaders of accelerate do not tell a data set."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The row, with `input_ids` (T,) int64 masked and `labels` (T,) int64, -100 where nothing is asked."""
        kept = self.dataset[row]
        drawn = np.random.SeedSequence((self.seed, self.epoch, row)).generate_state(1)[0]
        self.collator.generator = torch.Generator().manual_seed(int(drawn))
        masked = self.collator([{"input_ids": torch.tensor(kept["input_ids"])}])
        return {**kept, "input_ids": masked["input_ids"][0], "labels": masked["labels"][0]}


def _check(mlm_probability: float) -> None:
    if not 0 < mlm_probability < 1:
        raise ValueError(f"mlm_probability={mlm_probability!r} is not allowed: it must be between 0 and 1.")
