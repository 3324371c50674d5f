# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Little text to try a run on: a sample that is large enough for its blocks."""

from typing import cast

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .arguments import DataArguments
from .extract import CHARACTERS_PER_TOKEN


def little_text(
    corpus: DatasetDict | IterableDatasetDict, data: DataArguments, sequences: int, seed: int
) -> DatasetDict | IterableDatasetDict:
    """
    The part of a corpus that `--smoke` reads. Where documents are short it is more of them, lest a domain fills no
    block that fills many in the run itself; of a stream, whose domains are not known beforehand, lest all of it fills
    too few.

    Args:
        sequences: that are trained on.
    """
    sizes = {"train": (data.max_train_samples, sequences), "validation": (data.max_eval_samples, 1)}
    few: dict[str, Dataset] = {}
    first: dict[str, IterableDataset] = {}
    for split, (samples, blocks) in sizes.items():
        documents, count = corpus[split], cast(int, samples)
        if isinstance(documents, IterableDataset):
            first[split] = first_documents(
                documents, count, blocks=blocks, block_size=data.block_size, text_column=data.text_column
            )
        else:
            few[split] = few_documents(
                documents,
                count,
                blocks=blocks,
                block_size=data.block_size,
                text_column=data.text_column,
                domain_column=data.domain_column,
                seed=seed,
            )
    return DatasetDict(few) if few else IterableDatasetDict(first)


def first_documents(
    documents: IterableDataset, count: int, *, blocks: int, block_size: int, text_column: str
) -> IterableDataset:
    """
    The beginning of a stream, which is read once for that.

    Args:
        documents: a split, with text in every row.
        count: documents to take; where they are short, more of them.
        blocks: that their text is to fill.
        block_size: tokens of a block.
    """
    wanted, taken = blocks * block_size * CHARACTERS_PER_TOKEN, 0
    for taken, row in enumerate(documents, start=1):
        wanted -= len(row[text_column])
        if taken >= count and wanted <= 0:
            break
    return documents.take(taken)


def few_documents(
    documents: Dataset,
    count: int,
    *,
    blocks: int,
    block_size: int,
    text_column: str,
    domain_column: str | None,
    seed: int,
) -> Dataset:
    """
    A seeded sample of documents, that of `load_corpus`; where they are short, more of them.

    Args:
        documents: a split, with text in every row.
        count: documents of the sample.
        blocks: that all its text is to fill; that of each domain is to fill one.
        block_size: tokens of a block.

    Returns:
        The sample in the order of `documents`, with all text of a domain that has too little.
    """
    domains = documents[domain_column][:] if domain_column else [""] * len(documents)
    wanted = blocks * block_size * CHARACTERS_PER_TOKEN
    short = dict.fromkeys(domains, block_size * CHARACTERS_PER_TOKEN)
    kept = []
    for place, row in enumerate(np.random.default_rng(seed).permutation(len(documents))):  # as `load_corpus` does
        if place < count or wanted > 0 or domains[row] in short:
            kept.append(row)
            characters = len(documents[int(row)][text_column])
            wanted -= characters
            missing = short.pop(domains[row], 0) - characters
            if missing > 0:
                short[domains[row]] = missing
        elif not short:
            break
    return documents.select(np.sort(kept))
