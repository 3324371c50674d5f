# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Blocks of a corpus as a model of either family takes them: with labels, and masked for BERT."""

from corpus import Corpus
from datasets import Dataset
from transformers import TrainerCallback

from modeling_cse.data import FreshMasks, mask_once
from modeling_cse.runs.folder import EpochCallback


# Devlin et al. (arXiv 1810.04805, section 3.1).
MLM_PROBABILITY = 0.15


def training_blocks(blocks: Dataset, corpus: Corpus, seed: int) -> tuple[Dataset | FreshMasks, list[TrainerCallback]]:
    """
    What a model is trained on, without the column `domain`, and the callbacks that it needs.

    Args:
        blocks: `input_ids` and `domain`; further columns stay.
        corpus: tells the family, and the tokenizer for the masks.
        seed: of the masks, which are other ones in every epoch.
    """
    blocks = blocks.remove_columns("domain")
    if corpus.mixture.family == "gpt2":
        return _with_labels(blocks), []
    masked = FreshMasks(blocks, corpus.tokenizer, mlm_probability=MLM_PROBABILITY, seed=seed)
    return masked, [EpochCallback(masked)]


def held_out_blocks(blocks: Dataset, corpus: Corpus) -> Dataset:
    """The blocks with `labels`; BERT's are masked for good, the same way for every arm and seed."""
    if corpus.mixture.family == "gpt2":
        return _with_labels(blocks)
    return mask_once(blocks, corpus.tokenizer, mlm_probability=MLM_PROBABILITY, seed=corpus.mixture.seed)


def _with_labels(blocks: Dataset) -> Dataset:
    return blocks.map(lambda batch: {"labels": batch["input_ids"]}, batched=True)
