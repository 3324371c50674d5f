# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the description of experts: shares, domains, words and a text of each, read from rows of any kind."""

import pytest
import torch
from hub_tiny import spell, texts, tokenizer
from tiny import EVIDENCE, tiny_model
from tiny_runs import make_trainer, settings

from modeling_cse import ClusterExpertsCallback, describe_experts
from modeling_cse.hub import COMMON


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    callback = ClusterExpertsCallback(**settings(algorithm="text", sample_size=48))
    data = [{**row, "labels": row["input_ids"]} for row in texts(seed=0)]
    data = [{name: value for name, value in row.items() if name != "domain"} for row in data]
    trainer = make_trainer(tmp_path_factory.mktemp("run"), callback, model=tiny_model("gpt2", **EVIDENCE), data=data)
    trainer.train()
    return trainer.model


def test_each_expert_has_its_domain_words_and_a_text(model):
    found = describe_experts(model, tokenizer(), texts())
    assert [each.expert for each in found] == sorted(each.expert for each in found[:-1]) + [COMMON]
    assert sum(each.share for each in found) == pytest.approx(1)
    assert sum(each.tokens for each in found) == pytest.approx(1)
    rare = {next(iter(each.domains)): each for each in found[:-1]}
    assert set(rare) == {"law", "medicine"}
    for name, low in (("law", 36), ("medicine", 67)):
        own = {spell(number) for number in range(low, low + 30)}
        assert rare[name].domains == {name: 1.0} and rare[name].share == 0.25
        assert rare[name].terms and set(rare[name].terms) <= own
        assert set(rare[name].typical.split()) <= own
        assert 0.1 < rare[name].tokens < 0.3
    assert found[-1].domains == {"general": 1.0} and found[-1].share == 0.5


def test_rows_may_be_text_or_padded_ids_and_many(model):
    rows, names = texts(), tokenizer()
    told = describe_experts(model, names, rows, batch_size=7)
    written = [{"passage": names.decode(row["input_ids"]), "field": row["domain"]} for row in rows]
    options = {"text_column": "passage", "domain_column": "field"}
    assert describe_experts(model, names, written, **options) == told
    padded = [
        {
            "input_ids": torch.cat([row["input_ids"], torch.zeros(4, dtype=torch.long)]),
            "attention_mask": torch.tensor([1] * 12 + [0] * 4),
            "domain": row["domain"],
        }
        for row in rows
    ]
    assert describe_experts(model, names, padded, batch_size=7) == told
    few = describe_experts(model, names, rows, most=32, seed=1)
    assert few != told and few == describe_experts(model, names, rows, most=32, seed=1)
    unknown = describe_experts(model, names, [{"input_ids": row["input_ids"]} for row in rows])
    assert all(each.domains == {} for each in unknown)


def test_the_mode_of_the_model_is_kept(model):
    for training in (True, False):
        model.train(training)
        describe_experts(model, tokenizer(), texts(8 * 5))
        assert model.training is training


def test_what_cannot_be_told_is_refused_by_name(model):
    names = tokenizer()
    with pytest.raises(ValueError, match="without a length"):
        describe_experts(model, names, iter(texts()))
    with pytest.raises(ValueError, match="no token in the 2 rows"):
        describe_experts(model, names, [{"input_ids": []}, {"input_ids": []}])
    with pytest.raises(ValueError, match=r"rows of \['body'\]"):
        describe_experts(model, names, [{"body": "wab"}])
    with pytest.raises(ValueError, match="rows that are str: they must be dicts"):
        describe_experts(model, names, ["a text with input_ids"])
    with pytest.raises(ValueError, match="cse_routing='given'"):
        describe_experts(tiny_model("gpt2", cse_routing="given"), names, texts())
    with pytest.raises(ValueError, match="no clusters"):
        describe_experts(tiny_model("gpt2"), names, texts())
