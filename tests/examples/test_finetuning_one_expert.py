# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""examples/finetune_with_peft.py: the adapter of one expert moves, those of the others stay zero."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import activate, expert_ids, tiny_model, token_ids


pytest.importorskip("peft")
EXPERT = 2


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    yield importlib.import_module("finetune_with_peft")
    for name in ("finetune_with_peft", "small_model"):
        sys.modules.pop(name, None)


def test_held_out_text_without_text_to_train_on_is_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_with_peft.py", "--validation_file", "mine.jsonl"])
    with pytest.raises(SystemExit):
        example.parse()
    assert "--validation_file mine.jsonl alone is not allowed" in capsys.readouterr().err


def test_tokens_of_other_experts_keep_their_logits(example):
    model = activate(tiny_model("gpt2", cse_layers=[-1], cse_routing="discriminant")).eval()
    ids = token_ids()
    found = model(ids, output_cluster_ids=True)
    before, experts = found.logits.detach(), expert_ids(model, found.cluster_ids)[0]
    assert {EXPERT} < set(experts.flatten().tolist()), "the test wants tokens of this expert and of others"

    adapted = example.adapt(model, EXPERT).train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=0.1)
    for _ in range(2):
        adapted(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    moved = (adapted.eval()(ids).logits - before).abs().amax(-1) > 0
    assert torch.equal(moved, experts == EXPERT)
