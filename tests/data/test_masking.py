# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Masks of training: new in every epoch, and the same for whoever asks again."""

import pytest
import torch
from datasets import Dataset

from modeling_cse.data import FreshMasks, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["some words to learn a vocabulary from, again and again"] * 20, kind="bert", vocab_size=60)


def masks(tokenizer, seed: int = 0, probability: float = 0.3) -> FreshMasks:
    ids = torch.arange(40 * 50).view(40, 50) % 40 + 10
    blocks = Dataset.from_dict({"input_ids": ids.tolist(), "given_clusters": list(range(40))})
    return FreshMasks(blocks, tokenizer, mlm_probability=probability, seed=seed)


def test_masks_depend_on_seed_epoch_and_row_alone(tokenizer):
    one, other = masks(tokenizer), masks(tokenizer)
    forward = [one[row]["labels"] for row in range(40)]
    torch.rand(7)
    backward = [other[row]["labels"] for row in reversed(range(40))][::-1]
    assert all(torch.equal(*pair) for pair in zip(forward, backward, strict=True))
    one.set_epoch(1)
    assert not any(torch.equal(one[row]["labels"], forward[row]) for row in range(40))
    again = masks(tokenizer, seed=1)
    assert not any(torch.equal(again[row]["labels"], forward[row]) for row in range(40))


def test_so_many_tokens_are_asked_for_and_the_rest_stays(tokenizer):
    data = masks(tokenizer)
    rows = [data[row] for row in range(len(data))]
    labels, ids = (torch.stack([row[name] for row in rows]) for name in ("labels", "input_ids"))
    asked = labels != -100
    assert 0.25 < asked.float().mean() < 0.35
    original = torch.tensor(data.dataset["input_ids"][:])
    assert torch.equal(ids[~asked], original[~asked]) and torch.equal(labels[asked], original[asked])
    assert (ids[asked] == tokenizer.mask_token_id).float().mean() > 0.7
    assert [row["given_clusters"] for row in rows] == list(range(40))


@pytest.mark.parametrize("probability", [0, 1, -0.1])
def test_impossible_shares_are_refused(tokenizer, probability):
    with pytest.raises(ValueError, match="mlm_probability"):
        masks(tokenizer, probability=probability)
