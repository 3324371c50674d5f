# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed go on as if nothing had been: a point of each variant of `python -m benchmarks.kills`, whose
fifty are recorded in docs/evidence/robustness.md."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kills.program import VARIANTS


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is a fork")
def test_killed_runs_end_as_the_one_that_was_not(tmp_path):
    """In a process of its own: one that has computed gradients cannot be forked."""
    options = ["--count", str(len(VARIANTS)), "--seed", "1", "--output", tmp_path / "kills"]
    command = [sys.executable, "-m", "benchmarks.kills", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "kills").read_text())
    assert results["bit_exact"] == results["points"] == len(VARIANTS) <= results["kills"]
    assert results["points_by_variant"] == dict.fromkeys(VARIANTS, 1)
    assert results["checkpoints_lost"] == 0
    assert {"step", "fit", "save"} <= results["kills_by_kind"].keys()
