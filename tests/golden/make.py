# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Golden losses: a tiny run of each family on the sample corpus, fp32, with two fits. A refactoring must not move them.

    python tests/golden/make.py          # compare with losses.json, to the bit
    python tests/golden/make.py --write  # write it anew, when a change of method is meant
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments, default_data_collator, set_seed

from modeling_cse import (
    ClusterExpertsCallback,
    CSEBertConfig,
    CSEBertForMaskedLM,
    CSEGPT2Config,
    CSEGPT2ForCausalLM,
)
from modeling_cse.data import load_corpus, pack, train_tokenizer


HERE = Path(__file__).parent
CORPUS = HERE.parent.parent / "examples" / "data"
SHAPE = {"gpt2": {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}, "bert": {}}
SHAPE["bert"] = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}


# Clusters of hidden states; "evidence" is another run.
ROUTING = {"gpt2": "discriminant", "bert": "sequence"}


def losses(family: str, cse_combine: str, cse_routing: str | None = None) -> list[float]:
    """The loss of each of 24 steps; experts come on after step 8, clusters are fitted again after step 16."""
    corpus = load_corpus(
        train_file=str(CORPUS / "train.jsonl.gz"),
        validation_file=str(CORPUS / "validation.jsonl.gz"),
        max_train_samples=200,
        domain_column="domain",
    )
    tokenizer = train_tokenizer((row["text"] for row in corpus["train"]), kind=family, vocab_size=1024)
    blocks = pack(corpus["train"], tokenizer, block_size=64, domain_column="domain").remove_columns("domain")
    config_class = CSEGPT2Config if family == "gpt2" else CSEBertConfig
    model_class = CSEGPT2ForCausalLM if family == "gpt2" else CSEBertForMaskedLM
    collator = default_data_collator if family == "gpt2" else DataCollatorForLanguageModeling(tokenizer)
    set_seed(0)
    torch.set_num_threads(1)
    model = model_class(
        config_class(
            vocab_size=len(tokenizer),
            cse_combine=cse_combine,
            cse_routing=cse_routing or ROUTING[family],
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **SHAPE[family],
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=24,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            seed=0,
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, data_collator=collator, train_dataset=blocks)
        # by their words all four clusters of so few texts would be common, and none have an expert
        own = {"common_share": 0.5} if cse_routing == "evidence" else {}
        ClusterExpertsCallback(warmup=8, recluster_every=8, num_clusters=4, sample_size=96, **own).attach(trainer)
        trainer.train()
    fits = [entry for entry in trainer.state.log_history if "cse/seconds" in entry]
    if not all(entry["cse/layer_2/ffn/experts"] for entry in fits):
        raise RuntimeError("a fit gave out no expert in the last layer, so that the losses say nothing of routes.")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def all_losses() -> dict[str, list[float]]:
    runs = [(family, combine) for family in SHAPE for combine in ("replace", "add")]
    runs += [(family, "add", "evidence") for family in SHAPE]
    return {"-".join(run): losses(*run) for run in runs}


if __name__ == "__main__":
    path, now = HERE / "losses.json", all_losses()
    if "--write" in sys.argv:
        path.write_text(json.dumps(now, indent=1) + "\n")
    same = json.loads(path.read_text()) == now
    print("losses are the same, to the bit" if same else "losses differ")
    sys.exit(not same)
