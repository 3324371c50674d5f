# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises to scripts that know nothing of this package, as upstream's `run_clm.py` and `run_mlm.py` are: run under
`python -m modeling_cse` they know the model types, and `--config_overrides` sets their flags."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CONFIGS
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

import modeling_cse
from modeling_cse.__main__ import USAGE, main


ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "gpt2": "vocab_size=99,n_embd=32,n_layer=3,n_head=4,n_positions=32",
    "bert": "vocab_size=99,hidden_size=32,num_hidden_layers=3,num_attention_heads=4,intermediate_size=64",
}
# The habits of the two scripts, in their order; no word of this package.
SCRIPT = """
import sys
from dataclasses import dataclass, field

import torch
import transformers
from transformers import (
    CONFIG_MAPPING, MODEL_FOR_{kind}_LM_MAPPING, AutoModelFor{auto}LM, HfArgumentParser, Trainer, TrainingArguments
)

MODEL_TYPES = tuple(conf.model_type for conf in MODEL_FOR_{kind}_LM_MAPPING.keys())


@dataclass
class ModelArguments:
    model_type: str | None = field(default=None, metadata={{"help": ", ".join(MODEL_TYPES)}})
    config_overrides: str | None = field(default=None)


model_args, training_args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
assert model_args.model_type in MODEL_TYPES and __name__ == "__main__" and "modeling_cse" not in globals()
config = CONFIG_MAPPING[model_args.model_type]()
if model_args.config_overrides is not None:
    config.update_from_string(model_args.config_overrides)
model = AutoModelFor{auto}LM.from_config(config)
model.resize_token_embeddings(104)
ids = torch.randint(0, 104, (8, 12), generator=torch.Generator().manual_seed(0))
trainer = Trainer(model, training_args, train_dataset=[{{"input_ids": row, "labels": row}} for row in ids])
result = trainer.train()
trainer.save_model()
trainer.log_metrics("train", result.metrics)
trainer.save_metrics("train", result.metrics)
trainer.create_model_card(tasks="text-generation")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder of its own, and an interpreter that is put back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.parametrize(("kind", "auto"), [("CAUSAL", "Causal"), ("MASKED", "Masked")])
def test_a_script_in_the_manner_of_upstream_trains_from_scratch(here, kind, auto):
    family = "gpt2" if kind == "CAUSAL" else "bert"
    (here / "script.py").write_text(SCRIPT.format(kind=kind, auto=auto))
    overrides = SMALL[family] + ",cse_num_experts=2,cse_combine=replace"
    flags = ["--model_type", f"cse_{family}", "--config_overrides", overrides, "--output_dir", "out"]
    flags += [ "--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "true"]
    main(["script.py", *flags, "--report_to", "none", "--disable_tqdm", "true"])
    config = AutoConfig.from_pretrained(here / "out")
    assert (config.cse_num_experts, config.cse_combine, config.cse_routing) == (2, "replace", "evidence")
    assert (config.hidden_size, config.vocab_size) == (32, 104)
    loader = AutoModelForCausalLM if family == "gpt2" else AutoModelForMaskedLM
    assert type(loader.from_pretrained(here / "out")).__name__.startswith("CSE")
    assert json.loads((here / "out" / "train_results.json").read_text())["train_loss"] > 0


NEIGHBOUR = "import sys, transformers\nprint(sys.argv[1:], 'cse_bert' in transformers.CONFIG_MAPPING)\n"


def test_from_a_shell_and_with_a_module(tmp_path):
    (tmp_path / "neighbour.py").write_text(NEIGHBOUR)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "modeling_cse", "-m", "neighbour", "-m", "--flag"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "['-m', '--flag'] True", done.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--help"], ["nothing_here.py"]])
def test_nothing_to_run_is_said(arguments, here):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert str(error.value).startswith(USAGE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cse_num_experts=0", "cse_num_experts=0 is not allowed"),
        ("cse_num_experts=many", "cse_num_experts=many.*invalid literal"),
        ("cse_routing=prefix", "cse_routing='prefix' is not allowed"),
        ("cse_radius_scaling=perhaps", "can't derive true or false from perhaps"),
        ("hidden_size=30", "hidden_size=30 is not allowed"),
        ("cse_layers=-1", "cse_layers=-1.*belongs in a config file"),
        ("cse_layers=[-2,-1]", r"cse_layers=\[-2,-1\].*belongs in a config file"),
        ("cse_gate=hard", "cse_gate=hard.*belongs in a config file"),
        ("cse_expert_size=256", "cse_expert_size=256.*belongs in a config file"),
        ("cse_experts=2", "key cse_experts isn't in the original config"),
    ],
)
def test_wrong_overrides_are_named(family, text, message):
    with pytest.raises(ValueError, match=message):
        CONFIGS[family]().update_from_string(text)


def test_overrides_change_what_they_name():
    config = modeling_cse.CSEGPT2Config()
    config.update_from_string("n_embd=64,n_layer=4,cse_num_experts=2,cse_routing=sequence,cse_radius_scaling=false")
    assert config.cse_layer_indices == [2, 3] and config.expert_size == 256
    assert (config.cse_num_experts, config.cse_routing, config.cse_radius_scaling) == (2, "sequence", False)
