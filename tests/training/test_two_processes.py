# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of training with two processes: one clustering of everybody's sequences, and one model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch


HERE = Path(__file__).resolve()
TESTS, ROOT = HERE.parents[1], HERE.parents[2]
SCRIPT = """
import sys
import torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from tiny_runs import settings, train
from modeling_cse import ClusterExpertsCallback
from modeling_cse.training.gathering import rank
callback = ClusterExpertsCallback(**settings(update={update!r}, **{decay}))
trainer = train({folder!r}, callback, per_device_train_batch_size=4, ddp_backend="gloo",
    save_strategy="steps", save_steps=7)
logged = [entry for entry in trainer.state.log_history if "cse/layer_1/ffn/clusters" in entry]
own = trainer.accelerator.unwrap_model(trainer.model)
torch.save((own.state_dict(), len(logged)), {folder!r} + f"/rank{{rank()}}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize("update", ["recluster", "ema"])
def test_both_processes_end_with_one_model(tmp_path, update):
    script, decay = tmp_path / "script.py", {"ema_decay": 0.9} if update == "ema" else {}
    paths = [str(TESTS), str(ROOT)]
    script.write_text(SCRIPT.format(paths=paths, update=update, decay=decay, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    (first, fits), (second, other_fits) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert fits == (3 if update == "recluster" else 1) and other_fits >= 0
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (first["transformer.h.2.mlp.router.cluster_sizes"] > 0).sum() == 3
    assert first["transformer.h.2.mlp.router.cluster_sizes"].sum() == 16
    for rank in (0, 1):
        assert (tmp_path / "checkpoint-7" / f"cluster_state_rank{rank}.safetensors").is_file()
