# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the experts of a model are for, told by the texts that belong to them."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..analysis import passage, top_terms
from ..evaluation import expert_shares, sequence_clusters
from ..training import routed_base_model


# The row of all texts whose cluster has no expert.
COMMON = -1


@dataclass(frozen=True)
class ExpertDescription:
    """
    One expert, or the text that has none.

    Fields:
        expert: its slot; `COMMON` (-1) for the text that stays with the base.
        share: of the texts, those whose cluster it owns, 0 to 1.
        tokens: of all tokens, those that it answers, 0 to 1. A causal model knows little of a text's first tokens, so
            that fewer tokens than texts may reach an expert; tokens of common text that stray to one make it more.
        domains: known domains of its texts to their part of them, the largest first; empty where none is known.
        terms: words that its texts have more often than all others (`top_terms`), the most telling first.
        typical: the beginning of the text that is most its own.
    """

    expert: int
    share: float
    tokens: float
    domains: dict[str, float]
    terms: list[str]
    typical: str


def describe_experts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Sequence[Mapping[str, Any]],
    *,
    text_column: str = "text",
    domain_column: str = "domain",
    most: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
) -> list[ExpertDescription]:
    """
    Tells the experts of a model by texts, those of its last layer with experts. Where clusters are of texts
    (`cse_routing="evidence"`) an expert's slot belongs to the same texts in all layers.

    Args:
        model: a CSE model with clusters; its mode (training or evaluation) is kept.
        tokenizer: its tokenizer.
        dataset: rows with `input_ids`, or with text in `text_column`; anything with a length and rows by number.
            Longer texts are cut to the model's positions. Rows may name a domain in `domain_column`.
        most: so many rows at most, drawn at random.
        batch_size: rows a forward pass.
        seed: of the draw.

    Returns:
        The experts that own a cluster in the order of their slots, and last the common text (`COMMON`).

    Raises:
        ValueError: the model has no clusters, or takes them from the batch (`cse_routing="given"`); or the dataset has
            no length, no row with a token, or rows without ids and text.
    """
    base = routed_base_model(model)
    if base.config.cse_routing == "given":
        raise ValueError(
            "model has cse_routing='given': its clusters come with the batch, so that texts do not tell them."
        )
    check_dataset(dataset, text_column)
    drawn = np.sort(np.random.default_rng(seed).permutation(len(dataset))[:most])
    rows = [dataset[int(row)] for row in drawn]
    ids = [_ids(row, tokenizer, text_column, base.config.max_position_embeddings) for row in rows]
    kept = [number for number, own in enumerate(ids) if own]
    if not kept:
        raise ValueError(f"dataset has no token in the {len(rows)} rows that were drawn.")
    rows, ids = [rows[number] for number in kept], [ids[number] for number in kept]
    was_training = model.training
    found = sequence_clusters(model, _batches(ids, batch_size))
    answered = expert_shares(model, _batches(ids, batch_size))
    model.train(was_training)
    owners = found.experts[found.clusters]
    slots = [*sorted(int(slot) for slot in found.experts if slot >= 0), COMMON]
    groups = np.searchsorted(slots[:-1], owners)
    groups[owners < 0] = len(slots) - 1
    texts = [tokenizer.decode(own, skip_special_tokens=True) for own in ids]
    terms = top_terms(texts, groups, len(slots))
    own_distance = found.distances[np.arange(len(ids)), found.clusters]
    described = []
    for group, slot in enumerate(slots):
        members = np.flatnonzero(groups == group)
        described.append(
            ExpertDescription(
                expert=slot,
                share=len(members) / len(ids),
                tokens=1 - sum(answered) if slot == COMMON else answered[slot],
                domains=_domains([rows[member].get(domain_column) for member in members]),
                terms=terms[group],
                typical=passage(texts[members[own_distance[members].argmin()]]) if len(members) else "",
            )
        )
    return described


def check_dataset(dataset: Any, text_column: str = "text") -> None:
    """
    Whether experts can be told by rows like these.

    Raises:
        ValueError: it has no length or no row, or its first row has neither ids nor text.
    """
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"dataset is a {type(dataset).__name__} without a length: it must have rows by number.")
    if not len(dataset):
        raise ValueError("dataset has no rows: it must have some that tell the experts.")
    _check_row(dataset[0], text_column)


def _check_row(row: Any, text_column: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(
            f"dataset has rows that are {type(row).__name__}: they must be dicts with `input_ids`, or with text in "
            f"text_column={text_column!r}."
        )
    if "input_ids" not in row and text_column not in row:
        raise ValueError(
            f"dataset has rows of {sorted(row)}: it must have `input_ids`, or text in text_column={text_column!r}."
        )


def _ids(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, text_column: str, longest: int) -> list[int]:
    """Tokens of a row, without padding."""
    _check_row(row, text_column)
    if "input_ids" in row:
        ids = torch.as_tensor(row["input_ids"]).tolist()
        mask = torch.as_tensor(row["attention_mask"]).tolist() if "attention_mask" in row else [1] * len(ids)
        return [token for token, seen in zip(ids, mask, strict=True) if seen][:longest]
    return tokenizer(row[text_column], truncation=True, max_length=longest)["input_ids"]


def _batches(ids: list[list[int]], batch_size: int) -> Iterable[dict[str, torch.Tensor]]:
    """Rows padded on the right, in their order."""
    for start in range(0, len(ids), batch_size):
        rows = [torch.tensor(own) for own in ids[start : start + batch_size]]
        masks = [torch.ones_like(own) for own in rows]
        yield {
            "input_ids": pad_sequence(rows, batch_first=True),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }


def _domains(names: list[Any]) -> dict[str, float]:
    counts = Counter(str(name) for name in names if name is not None)
    return {name: count / counts.total() for name, count in counts.most_common()}
