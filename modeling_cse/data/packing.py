# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Blocks: the tokens of many documents put end to end and cut into pieces of one length."""

from collections.abc import Collection, Iterator
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER


DOMAIN_COLUMN = "domain"

# `datasets` knows a function of an installed package by its name only: it would serve blocks from its cache that an
# older version of this file has made. Raise this number with every change to what comes out.
_VERSION = 1
_STREAMED_DOCUMENTS = 100


def pack(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_size: int,
    text_column: str = "text",
    domain_column: str | None = None,
    num_proc: int | None = None,
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Tokenises documents, puts them end to end and cuts them into blocks of exactly `block_size` tokens.

    With a causal tokenizer (GPT-2) every document is followed by the end-of-text token. With a masked-language one
    (BERT: it has a mask, a [CLS] and a [SEP] token) every document becomes `[CLS] document [SEP]`; a block is cut
    wherever it is full, so that it need not begin with [CLS]. Blank documents are left out. The incomplete block at
    the end, one for each domain, is dropped. Blocks stand in the order in which they fill up; shuffle them for
    training.

    Causal blocks carry their own `labels`. A collator that makes labels would mask the end-of-text token wherever it
    is the padding token too, and the model would never learn to end a document.

    Args:
        dataset: rows of text. An `IterableDataset` is packed as it is read.
        tokenizer: a tokenizer with a mask, [CLS] and [SEP] token, or else with an end-of-text token.
        block_size: tokens in a block, from 2 to the tokenizer's `model_max_length`.
        text_column: column with the text.
        domain_column: column with the domain (string, number or `ClassLabel`). Blocks then hold one domain each.
        num_proc: processes that tokenise a `Dataset`; without effect on the result.
        streaming: pack a `Dataset` lazily too.

    Returns:
        Columns `input_ids` and `attention_mask`, both `[block_size]`; `labels` equal to `input_ids` for a causal
        tokenizer; `domain`, a string, if `domain_column` is given.

    Raises:
        ValueError: wrong `block_size`; no such column; a tokenizer without the tokens needed; a row whose domain is
            missing, blank, a list or a mapping; a dataset, or a domain of a `Dataset`, that does not fill one block.
            A stream raises the last two while it is read, and the last one only if it does not fill any block.
    """
    is_stream = isinstance(dataset, IterableDataset)
    if not is_stream and not isinstance(dataset, Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}; it must be one split, a Dataset or IterableDataset.")
    _check_block_size(block_size, tokenizer)
    _check_columns(dataset, text_column, domain_column)
    masked = _is_masked(tokenizer)
    encoder = _Encoder(tokenizer, masked, text_column, domain_column, _class_names(dataset, domain_column))
    cutter: dict[str, Any] = {
        "block_size": block_size,
        "with_labels": not masked,
        "with_domain": domain_column is not None,
    }
    features = _block_features(not masked, domain_column is not None)
    if streaming or is_stream:
        arguments = {"dataset": dataset, "encoder": encoder, "cutter": cutter}
        return IterableDataset.from_generator(_stream_blocks, features=features, gen_kwargs=arguments)

    tokens = dataset.map(
        encoder,
        batched=True,
        num_proc=num_proc,
        remove_columns=dataset.column_names,
        features=_token_features(),
        desc="Tokenising",
    )
    expected = {encoder.name_of(value) for value in dataset.unique(domain_column)} if domain_column else {""}
    _check_filled(_count_tokens(tokens, expected), block_size, domain_column)
    # No processes here: the cutter carries the rest of one batch over to the next.
    return tokens.map(
        _Cutter(**cutter),
        batched=True,
        remove_columns=tokens.column_names,
        features=features,
        desc=f"Cutting blocks of {block_size}",
    )


def split_by_domain(dataset: Dataset) -> dict[str, Dataset]:
    """The blocks of each domain, without the column that says so.

    Args:
        dataset: blocks from `pack`.

    Returns:
        Domain to blocks, sorted by name; `{"all": dataset}` if there is no column `domain`.

    Raises:
        ValueError: a stream with domains, which are not known before it ends; a domain `all` beside others.
    """
    has_domains = DOMAIN_COLUMN in (dataset.column_names or [])
    if has_domains and isinstance(dataset, IterableDataset):
        raise ValueError("dataset is an IterableDataset; only a Dataset can be split, pack without streaming.")
    if not has_domains:
        return {"all": dataset}
    domains = np.asarray(dataset[DOMAIN_COLUMN][:], dtype=object)
    blocks, names = dataset.remove_columns(DOMAIN_COLUMN), sorted(set(domains))
    check_domains(names)
    return {domain: blocks.select(np.flatnonzero(domains == domain)) for domain in names}


def check_domain(column: str, value: Any) -> None:
    """
    Whether a value can name a domain, or is missing.

    Raises:
        ValueError: a list or a mapping.
    """
    if isinstance(value, (list, dict)):
        raise ValueError(
            f"domain_column={column!r} must hold strings, numbers or class labels; found {type(value).__name__} "
            f"{value!r}."
        )


def is_missing(domain: Any) -> bool:
    """Whether a row is without a domain: a blank name is none."""
    return domain is None or (isinstance(domain, str) and not domain.strip())


def check_domains(names: Collection[str]) -> None:
    """
    Whether results by domain can be told from those over all text.

    Raises:
        ValueError: a domain `all` beside others.
    """
    others = sorted(set(names) - {"all"})
    if others and "all" in names:
        raise ValueError(
            f"domain 'all' is not allowed beside others {others}: results over the text of all domains have that "
            "name. Name the domain otherwise."
        )


class _Encoder:
    """Batch of rows to batch of documents: columns `input_ids` and `domain`, which is "" where there is none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        masked: bool,
        text_column: str,
        domain_column: str | None,
        class_names: list[str] | None,
    ) -> None:
        self.version = _VERSION
        self.tokenizer = tokenizer
        self.masked = masked
        self.text_column = text_column
        self.domain_column = domain_column
        self.class_names = class_names

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        texts = batch[self.text_column]
        kept = [row for row, text in enumerate(texts) if text and not text.isspace()]
        domains = [self.name_of(batch[self.domain_column][row]) if self.domain_column else "" for row in kept]
        return {"input_ids": self._encode([texts[row] for row in kept]), DOMAIN_COLUMN: domains}

    def name_of(self, value: Any) -> str:
        check_domain(cast(str, self.domain_column), value)
        if is_missing(value):
            raise ValueError(f"domain_column={self.domain_column!r} has rows without a value; every row needs one.")
        return self.class_names[value] if self.class_names is not None else str(value)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # Whole documents are longer than any model takes, and meant to be: `verbose=False` stops the warning.
        ids = self.tokenizer(
            texts,
            add_special_tokens=self.masked,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return ids if self.masked else [[*document, end_token_id(self.tokenizer)] for document in ids]


class _Cutter:
    """Batch of documents to batch of blocks. What does not fill a block waits for the next batch."""

    def __init__(self, block_size: int, with_labels: bool, with_domain: bool) -> None:
        self.version = _VERSION
        self.block_size = block_size
        self.with_labels = with_labels
        self.with_domain = with_domain
        self.waiting: dict[str, list[int]] = {}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        blocks: list[list[int]] = []
        domains: list[str] = []
        for ids, domain in zip(batch["input_ids"], batch[DOMAIN_COLUMN], strict=True):
            waiting = self.waiting.setdefault(domain, [])
            waiting.extend(ids)
            full = len(waiting) - len(waiting) % self.block_size
            blocks.extend(waiting[start : start + self.block_size] for start in range(0, full, self.block_size))
            domains.extend([domain] * (full // self.block_size))
            del waiting[:full]
        columns: dict[str, list] = {"input_ids": blocks, "attention_mask": [[1] * self.block_size for _ in blocks]}
        if self.with_labels:
            columns["labels"] = blocks
        if self.with_domain:
            columns[DOMAIN_COLUMN] = domains
        return columns


def _stream_blocks(dataset: Dataset | IterableDataset, encoder: _Encoder, cutter: dict) -> Iterator[dict]:
    # A new cutter for every pass, so that an epoch does not begin with what the last one left over.
    cutter = _Cutter(**cutter)
    cut = 0
    for batch in dataset.iter(batch_size=_STREAMED_DOCUMENTS):
        columns = cutter(encoder(batch))
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))
        cut += len(columns["input_ids"])
    if not cut:
        _check_filled(
            {name: len(ids) for name, ids in cutter.waiting.items()}, cutter.block_size, encoder.domain_column
        )


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """
    The token that ends each document in the blocks of `pack`: what `cse_separator_token_id` is to be where blocks hold
    several documents.

    Raises:
        ValueError: a tokenizer without such a token.
    """
    return tokenizer.sep_token_id if _is_masked(tokenizer) else tokenizer.eos_token_id


def _token_features() -> Features:
    return Features({"input_ids": List(Value("int32")), DOMAIN_COLUMN: Value("string")})


def _block_features(with_labels: bool, with_domain: bool) -> Features:
    features = {"input_ids": List(Value("int32")), "attention_mask": List(Value("int8"))}
    if with_labels:
        features["labels"] = List(Value("int32"))
    if with_domain:
        features[DOMAIN_COLUMN] = Value("string")
    return Features(features)


def _is_masked(tokenizer: PreTrainedTokenizerBase) -> bool:
    if None not in (tokenizer.mask_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id):
        return True
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={type(tokenizer).__name__} must have an eos_token to end documents with, or else a "
            "mask_token, a cls_token and a sep_token."
        )
    return False


def _check_block_size(block_size: int, tokenizer: PreTrainedTokenizerBase) -> None:
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 2:
        raise ValueError(f"block_size={block_size!r} must be a whole number of at least 2.")
    longest = tokenizer.model_max_length
    if longest < VERY_LARGE_INTEGER and block_size > longest:
        raise ValueError(
            f"block_size={block_size} is above the tokenizer's model_max_length={longest}. Lower block_size, or set "
            "tokenizer.model_max_length to the number of positions of the model if that is larger."
        )


def _check_columns(dataset: Dataset | IterableDataset, text_column: str, domain_column: str | None) -> None:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    for argument, column in (("text_column", text_column), ("domain_column", domain_column)):
        if column is not None and column not in columns:
            raise ValueError(f"{argument}={column!r} is not a column of the dataset; it has {columns}.")


def _class_names(dataset: Dataset | IterableDataset, domain_column: str | None) -> list[str] | None:
    feature = (dataset.features or {}).get(domain_column)
    return feature.names if isinstance(feature, ClassLabel) else None


def _count_tokens(tokens: Dataset, expected: set[str]) -> dict[str, int]:
    """Tokens by domain, 0 for an expected one of which nothing is left once blank documents are gone."""
    counts = dict.fromkeys(sorted(expected), 0)
    if len(tokens):
        table = tokens.data.table
        lengths = table.select([DOMAIN_COLUMN]).append_column("length", pc.list_value_length(table["input_ids"]))
        for row in lengths.group_by(DOMAIN_COLUMN).aggregate([("length", "sum")]).to_pylist():
            counts[row[DOMAIN_COLUMN]] = row["length_sum"]
    return counts


def _check_filled(counts: dict[str, int], block_size: int, domain_column: str | None) -> None:
    short = {domain: count for domain, count in counts.items() if count < block_size}
    if not short and counts:
        return
    if domain_column is None or not counts:
        found = f"the dataset has {sum(counts.values())} tokens"
    else:
        found = ", ".join(f"domain {domain!r} has {count} tokens" for domain, count in short.items())
    raise ValueError(f"block_size={block_size} leaves no block: {found}. Lower block_size or add text.")
