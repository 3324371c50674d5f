# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
One run in one process and, with the same global batch, in several: every rank must end with the same model, and the
losses must be those of the one process.

    python -m benchmarks.ranks                                # 200 steps, two and four processes: a few minutes
    python -m benchmarks.ranks --steps 20 --processes 2       # to see it run

Writes `benchmarks/results/ranks.json`.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers
from transformers import Trainer, TrainingArguments

from modeling_cse import ClusterExpertsCallback, CSEGPT2Config, CSEGPT2ForCausalLM
from modeling_cse.training.gathering import rank, world_size


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "ranks.json"
SEED = 0
GLOBAL_BATCH = 16
DOMAINS = (0, 0, 0, 0, 1, 1, 2, 2)
WORDS, LENGTH = 64, 32


def rows(count: int = 1024) -> list[dict[str, torch.Tensor]]:
    """Sequences (32,) of three vocabularies in unequal shares, each a random walk over its own words."""
    generator = torch.Generator().manual_seed(SEED)
    made = []
    for number in range(count):
        walk = torch.randint(1, 5, (LENGTH,), generator=generator).cumsum(0) % WORDS
        ids = walk + WORDS * DOMAINS[number % len(DOMAINS)]
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return made


def train(folder: Path, steps: int) -> dict:
    """
    This process's part of the run: experts in FFN and attention of two of four layers, in the place of the base;
    the first fit after a fifth of the steps, then four more at equal distances. Without dropout, in fp32.

    Returns:
        `losses` and `grad_norms` by step, `fits` (steps), and `state`: every parameter and buffer.
    """
    torch.manual_seed(SEED)
    config = CSEGPT2Config(
        vocab_size=WORDS * (max(DOMAINS) + 1),
        n_positions=LENGTH,
        n_embd=64,
        n_layer=4,
        n_head=4,
        cse_modules=["attention", "ffn"],
        cse_combine="replace",
        cse_routing="discriminant",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
    )
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=GLOBAL_BATCH // world_size(),
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=SEED,
        ddp_backend="gloo" if world_size() > 1 else None,
        ddp_find_unused_parameters=False,
    )
    fit = max(steps // 5, 1)
    sample = {"num_clusters": 3, "common_share": 0.4, "sample_size": 64}
    callback = ClusterExpertsCallback(warmup=fit, recluster_every=fit, **sample)
    trainer = Trainer(CSEGPT2ForCausalLM(config), arguments, train_dataset=rows())
    callback.attach(trainer)
    trainer.train()
    history = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "grad_norms": [entry["grad_norm"] for entry in history if "grad_norm" in entry],
        "fits": [entry["step"] for entry in history if "cse/seconds" in entry],
        "share_routed": [entry["cse/layer_3/ffn/share_routed"] for entry in history if "cse/seconds" in entry],
        "state": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
    }


def relative_difference(values: list[float], others: list[float]) -> float:
    """The largest |a - b| / |b| over pairs of two lists."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, others, strict=True))


def different_tensors(states: list[dict[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that are not the same, bit by bit, in all states."""
    first, *others = states
    return [name for name in first if not all(torch.equal(first[name], other[name]) for other in others)]


def launch(processes: int, arguments: list[str], timeout: float = 3600.0) -> None:
    """
    Runs a Python program in a process group.

    Args:
        processes: their number.
        arguments: a script, or `-m` and a module, and its arguments.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{processes} processes of {arguments} failed:\n{done.stderr[-6000:]}")


def in_processes(processes: int, steps: int) -> list[dict]:
    """What `train` gives on every rank."""
    with tempfile.TemporaryDirectory() as folder:
        launch(processes, ["-m", "benchmarks.ranks", "--steps", str(steps), "--worker", folder])
        return [torch.load(Path(folder) / f"rank{number}.pt") for number in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker is not None:
        torch.distributed.init_process_group("gloo")
        torch.save(train(options.worker, options.steps), options.worker / f"rank{rank()}.pt")
        return
    with tempfile.TemporaryDirectory() as folder:
        one = train(Path(folder), options.steps)
    record = {
        "command": " ".join(["python -m benchmarks.ranks", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, accelerate)},
        "machine": f"{os.cpu_count()} CPU cores, gloo, fp32",
        "steps": options.steps,
        "global_batch": GLOBAL_BATCH,
        "fits": one["fits"],
        "share_routed": one["share_routed"],
        "loss": [one["losses"][0], one["losses"][-1]],
        "runs": [],
    }
    for processes in options.processes:
        ranks = in_processes(processes, options.steps)
        run = {
            "processes": processes,
            "fits": ranks[0]["fits"],
            "share_routed": ranks[0]["share_routed"],
            "tensors": len(ranks[0]["state"]),
            "tensors_that_differ_between_ranks": different_tensors([own["state"] for own in ranks]),
            "largest_relative_difference_of_losses": relative_difference(ranks[0]["losses"], one["losses"]),
            "by_tens_of_steps": [
                relative_difference(ranks[0]["losses"][start : start + 10], one["losses"][start : start + 10])
                for start in range(0, options.steps, 10)
            ],
        }
        record["runs"].append(run)
        print(json.dumps(run, indent=1))
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
