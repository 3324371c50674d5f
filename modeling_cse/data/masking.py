# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Masks that stay: evaluation of a masked language model must ask for the same tokens every time."""

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
    if not 0 < mlm_probability < 1:
        raise ValueError(f"mlm_probability={mlm_probability!r} is not allowed: it must be between 0 and 1.")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=seed)

    def mask(batch: dict[str, list]) -> dict[str, list]:
        masked = collator([{"input_ids": torch.tensor(ids)} for ids in batch["input_ids"]])
        return {"input_ids": masked["input_ids"].tolist(), "labels": masked["labels"].tolist()}

    # The collator draws on as it goes, so that a cached result of another start would not be the same.
    return dataset.map(mask, batched=True, load_from_cache_file=False, desc="Masking")
