# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What from_dense refuses, and how it says so."""

import pytest
import torch
from tiny import dense_model, tiny_model, token_ids
from tiny_runs import rows
from transformers import GPT2DoubleHeadsModel, LlamaConfig, LlamaModel

from modeling_cse import from_dense


BATCHES = [{"input_ids": token_ids(8, 12)}, {"input_ids": token_ids(8, 12)}]
UNEQUAL = [{"input_ids": token_ids(1, length)[0]} for length in (8, 8, 6)]


def test_other_architectures_are_refused_by_name(tmp_path):
    config = dense_model("gpt2").config
    llama = LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )

    class Own(type(dense_model("gpt2"))):
        pass

    for made in (GPT2DoubleHeadsModel(config), LlamaModel(llama), Own(config)):
        name = type(made).__name__
        with pytest.raises(ValueError, match=rf"{name}.*must be one of \['BertForMaskedLM'.*'GPT2Model'\]"):
            from_dense(made, rows())
        if name != "Own":
            made.save_pretrained(tmp_path / name)
            with pytest.raises(ValueError, match=rf"its architecture is \['{name}'\].*must be one of"):
                from_dense(tmp_path / name, rows())


def test_a_folder_that_does_not_name_its_head_is_refused(tmp_path):
    dense_model("bert").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its architecture is \[\].*pass the model"):
        from_dense(tmp_path, rows())


def test_models_with_experts_are_told_what_to_do_instead(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    for checkpoint in (model, str(tmp_path)):
        with pytest.raises(ValueError, match="has experts already.*from_pretrained.*fit_experts"):
            from_dense(checkpoint, rows())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cse_layers": "all"}, "cse_layers='all'"),
        ({"cse_layers": [7]}, r"cse_layers=\[7\]"),
        ({"cse_combine": "mix"}, "cse_combine='mix'"),
        ({"layer_budget": 2}, "layer_budget=2 is not allowed without cse_layers='auto'"),
        ({"cse_layers": "auto", "layer_budget": 0}, "layer_budget=0"),
        ({"cse_layers": "auto", "layer_budget": 4}, "layer_budget=4.*from 1 to 3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_cluster": 3}, r"\['num_cluster'\] are not allowed with a model in memory"),
        ({"dtype": torch.bfloat16}, r"\['dtype'\] are not allowed with a model in memory"),
    ],
)
def test_wrong_arguments_are_refused_before_data_are_read(wrong, message):
    with pytest.raises(ValueError, match=message):
        from_dense(dense_model("gpt2"), iter(lambda: pytest.fail("a row was read"), 0), **wrong)


def test_wrong_settings_of_clusters_are_refused():
    with pytest.raises(ValueError, match="num_clusters=0"):
        from_dense(dense_model("gpt2"), rows(), num_clusters=0)
    with pytest.raises(ValueError, match="sample_size=2"):
        from_dense(dense_model("gpt2"), rows(), sample_size=2)


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="num_clusters=10 is more than the 4 sequences"):
        from_dense(dense_model("gpt2"), rows(4))
    with pytest.raises(ValueError, match="no sequence reached"):
        from_dense(dense_model("gpt2"), [])


@pytest.mark.parametrize(
    ("data", "size", "message"),
    [
        ({"train": rows(8)}, 8, "data of type dict.*one split"),
        (iter(UNEQUAL), 8, r"rows of {'input_ids': \(8,\)} and {'input_ids': \(6,\)} in one batch"),
        (BATCHES, 2, "batch_size=None for batches"),
        (rows(16), None, "Name a batch_size for rows"),
        ([{"text": "no ids"}], 8, r"data gives \['text'\].*input_ids"),
        (["no dict"], None, "data gives str.*input_ids"),
        (3, 8, "data of type int"),
    ],
)
def test_data_of_a_wrong_form_are_refused(data, size, message):
    with pytest.raises(ValueError, match=message):
        from_dense(dense_model("gpt2"), data, batch_size=size)


def test_a_model_that_is_not_of_one_piece_is_refused():
    dense = dense_model("gpt2")
    dense.transformer.ln_f.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtypes \['torch.bfloat16', 'torch.float32'\]"):
        from_dense(dense, rows())
    dense = dense_model("gpt2")
    dense.transformer.h[0].mlp.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has .*mlp.extra.*changed after it was made"):
        from_dense(dense, rows())


@pytest.mark.parametrize("checkpoint", [None, 3, torch.nn.Linear(2, 2)])
def test_what_is_no_checkpoint_is_refused(checkpoint):
    with pytest.raises(ValueError, match=f"checkpoint of type {type(checkpoint).__name__}"):
        from_dense(checkpoint, rows())
