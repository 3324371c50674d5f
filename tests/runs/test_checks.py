# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a run refuses at its start, and that the best checkpoint is the best one."""

import json

import pytest
from small_run import flags, metrics

from modeling_cse.runs import GPT2, pretrain


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"text_column": "body"}, "body"),
        ({"num_clusters": 40, "sample_size": 64}, "cse_max_clusters"),
        ({"num_clusters": 12, "sample_size": 12, "warmup": 2, "cse_routing": "discriminant"}, "num_clusters=12"),
        ({"block_size": 65}, "block_size=65"),
        ({"tokenizer_vocab_size": None}, "tokenizer_name"),
        ({"model_type": "gpt_neo"}, "gpt_neo"),
        ({"cse_routing": "nearest"}, "cse_routing='nearest'"),
        ({"update": "never"}, "update='never'"),
        ({"train_file": "missing.jsonl"}, "missing.jsonl"),
        ({"model_name_or_path": "somewhere", "tokenizer_vocab_size": None}, "config_overrides"),
        ({"model_name_or_path": "somewhere", "config_overrides": None}, "tokenizer_vocab_size=800"),
        ({"tokenizer_name": "somewhere"}, "tokenizer_vocab_size=800"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint='latest'"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss' .*'eval_general_loss', 'eval_general_perp"),
        ({"metric_for_best_model": "legal_perplexity"}, "greater_is_better=True"),
        ({"do_eval": True, "eval_strategy": "no"}, "do_eval=True is not allowed without do_train"),
        ({"config_overrides": "n_embed=32"}, "^config_overrides='n_embed=32' is not allowed"),
        ({"tokenizer_vocab_size": 10}, "^tokenizer_vocab_size=10 must be at least"),
        ({"control": "random", "random_shares": 0.5}, r"^random_shares=\[0.5\] is not allowed"),
        ({"max_steps": -1, "num_train_epochs": -1}, "^num_train_epochs=-1.0 is not allowed with max_steps=-1"),
    ],
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(tmp_path, changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        pretrain(GPT2, flags(tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "cse" / "model.safetensors").exists()
    if "num_clusters" not in changes:  # what only the training data can tell shows when training has begun
        assert not (tmp_path / "run").exists()


BEST = [
    {"load_best_model_at_end": True, "domain_column": None},
    {"save_strategy": "best", "metric_for_best_model": "loss", "domain_column": None},
    {"load_best_model_at_end": True, "metric_for_best_model": "legal_loss"},
]


@pytest.mark.parametrize("changes", BEST, ids=["without domains", "saved alone", "of a domain"])
def test_the_best_checkpoint_is_told_by_the_loss(tmp_path, changes):
    measuring = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 8, "compare_with_dense": None}
    pretrain(GPT2, flags(tmp_path / "run", **measuring, **changes))
    name = "eval_legal_loss" if "domain_column" not in changes else "eval_loss"
    losses = {e["step"]: e[name] for e in metrics(tmp_path / "run" / "cse" / "metrics.jsonl") if name in e}
    assert sorted(losses) == [4, 8]
    place = tmp_path / "run" / "cse" / f"checkpoint-{min(losses, key=losses.get)}"
    state = json.loads((place / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(min(losses.values()))
