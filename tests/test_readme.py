# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the README shows works as pasted."""

import re
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_examples_run_as_pasted(tmp_path, monkeypatch):
    """With a data set as the text describes it, in a folder that has a dense model."""
    training, starting = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(0, 2048, (128, 32), generator=torch.Generator().manual_seed(0))
    names = {"train_dataset": [{"input_ids": row, "labels": row} for row in ids]}
    exec(training, names)
    assert all(ffn.router.num_clusters == 10 for ffn in names["model"].base_model.routed_modules().values())
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=2, vocab_size=2048)).save_pretrained("runs/mine/dense")
    exec(starting, names)
    modules = names["model"].base_model.routed_modules()
    assert len(modules) == 2 and all(module.router.num_clusters == 10 for module in modules.values())


def test_it_stays_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) < 250
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_flag_and_argument_is_in_its_tables():
    import inspect

    from modeling_cse import ClusterExpertsCallback
    from modeling_cse.configuration_cse import CSEFlags

    flags = [name for name in CSEFlags.__dataclass_fields__ if name.startswith("cse_")]
    arguments = [name for name in inspect.signature(ClusterExpertsCallback).parameters]
    missing = [name for name in flags + arguments if f"`{name}`" not in README]
    assert not missing
