# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
What docs/tools.md tells of that no test can hold: upstream's own scripts, and how exact PEFT's merging is.

    python benchmarks/tools.py --scripts FOLDER     # a few minutes

FOLDER has `run_clm.py` and `run_mlm.py` of transformers' `examples/pytorch/language-modeling`, unmodified; they are
not part of this project. Writes `benchmarks/results/tools.json`.
"""

import argparse
import datetime
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

import modeling_cse
from modeling_cse import CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM, fit_experts
from modeling_cse.data import train_tokenizer


ROOT = Path(__file__).resolve().parents[1]
BERT_SIZES = "hidden_size=64,num_hidden_layers=4,num_attention_heads=4,intermediate_size=256"
SCRIPTS = {
    "run_clm.py": ("gpt2", "n_embd=64,n_layer=4,n_head=4,n_positions=128", "--block_size"),
    "run_mlm.py": ("bert", BERT_SIZES, "--max_seq_length"),
}
LOADERS = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
# Adapters by family and name: PEFT's targets.
BASE_FFN = {"gpt2": ["mlp.c_fc", "mlp.c_proj"], "bert": ["intermediate.dense", "output.dense"]}
ATTENTION = {"gpt2": ["c_attn"], "bert": ["query", "value"]}
EXPERTS = ["mlp.experts.up_proj", "mlp.experts.down_proj"]
PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "trl", "lm_eval", "tensorboard")


def write_texts(folder: Path, samples: int) -> Path:
    """The first texts of the sample corpus, one a line."""
    with gzip.open(ROOT / "examples" / "data" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"].replace("\n", " ") for _, line in zip(range(samples), file, strict=False)]
    place = folder / "train.txt"
    place.write_text("\n".join(texts), encoding="utf-8")
    return place


def run_script(path: Path, folder: Path, texts: Path, steps: int) -> dict:
    """One of upstream's scripts from scratch, in a process of its own, and what it leaves."""
    family, overrides, length = SCRIPTS[path.name]
    train_tokenizer(texts.read_text().splitlines(), kind=family, vocab_size=2000).save_pretrained(folder / family)
    overrides += ",vocab_size=2000,cse_num_experts=2"
    flags = ["--model_type", f"cse_{family}", "--config_overrides", overrides, "--tokenizer_name", family]
    flags += ["--train_file", texts.name, length, "128", "--do_train", "--max_steps", str(steps), "--use_cpu", "true"]
    flags += ["--per_device_train_batch_size", "8", "--learning_rate", "3e-3", "--logging_steps", str(steps // 4)]
    flags += ["--seed", "0", "--report_to", "none", "--output_dir", f"out-{family}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment |= {"HF_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "modeling_cse", str(path), *flags]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{path.name} failed: {done.stderr[-3000:]}")
    model = LOADERS[family].from_pretrained(folder / f"out-{family}")
    state = json.loads((folder / f"out-{family}" / "trainer_state.json").read_text())
    return {
        "command": " ".join(["python -m modeling_cse", path.name, *flags]),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "model": type(model).__name__,
        "cse_num_experts": model.config.cse_num_experts,
        "cse_layers": model.config.cse_layer_indices,
        "losses": {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry},
    }


def merging(family: str, options: dict, hidden: int = 128) -> dict[str, float]:
    """Largest differences of logits, beside their own size: merged and unmerged, and before and after merging."""
    torch.manual_seed(0)
    sizes = {"n_embd": hidden, "n_layer": 4, "n_head": 4} if family == "gpt2" else {}
    sizes |= {} if family == "gpt2" else {"hidden_size": hidden, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {} if family == "gpt2" else {"intermediate_size": 4 * hidden}
    config, head = (CSEGPT2Config, CSEGPT2ForCausalLM) if family == "gpt2" else (CSEBertConfig, CSEBertForMaskedLM)
    model = head(config(vocab_size=1000, **sizes)).eval()
    ids = torch.randint(5, 1000, (64, 64), generator=torch.Generator().manual_seed(0))
    fit_experts(model, [{"input_ids": ids}], sample_size=64, num_clusters=4)
    lora = LoraConfig(r=8, lora_alpha=16, init_lora_weights=False, **options)
    with torch.no_grad():
        plain = model(ids).logits
        model = get_peft_model(model, lora)
        adapted = model(ids).logits
        model.merge_adapter()
        merged = model(ids).logits
        model.unmerge_adapter()
        with model.disable_adapter():
            back = model(ids).logits
    return {
        "logits": plain.abs().max().item(),
        "adapter moves them by": (adapted - plain).abs().max().item(),
        "merged - adapted": (merged - adapted).abs().max().item(),
        "unmerged - plain": (back - plain).abs().max().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scripts", type=Path, required=True)
    parser.add_argument("--source", default="", help="where they are from: a tag or commit of transformers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tools.json")
    arguments = parser.parse_args()
    targets = {
        "attention": lambda family: {"target_modules": ATTENTION[family]},
        "base FFN": lambda family: {"target_modules": BASE_FFN[family]},
        "experts": lambda family: {"target_modules": [], "target_parameters": EXPERTS},
    }
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        texts = write_texts(folder, arguments.samples)
        scripts = {
            name: run_script((arguments.scripts / name).resolve(), folder, texts, arguments.steps) for name in SCRIPTS
        }
    settings = f"--source {arguments.source!r} --steps {arguments.steps} --samples {arguments.samples}"
    results = {
        "command": f"python benchmarks/tools.py --scripts FOLDER {settings}",
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores",
        "versions": {"modeling_cse": modeling_cse.__version__, **{name: version(name) for name in PACKAGES}},
        "upstream_scripts": {"source": arguments.source, **scripts},
        "peft_merging": {
            family: {name: merging(family, options(family)) for name, options in targets.items()}
            for family in ("gpt2", "bert")
        },
    }
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
