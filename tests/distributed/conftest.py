# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Runs in two and four processes, started once for all tests: importing the libraries takes longer than they do."""

import os
from functools import cache
from pathlib import Path

import pytest
import torch
from scenarios import SCENARIOS

from benchmarks.ranks import launch


TESTS = Path(__file__).resolve().parents[1]
SCRIPT = TESTS / "distributed" / "scenarios.py"
IN_FOUR = ["measured", "plain", "clipped"]


@pytest.fixture(scope="session")
def outcome(tmp_path_factory):
    """`outcome(name, processes)`: what each rank ended with, a list; `outcome(name)`: what one process ended with."""
    folders = {}

    def start(processes: int) -> Path:
        folder = tmp_path_factory.mktemp(f"processes_{processes}")
        names = IN_FOUR if processes == 4 else list(SCENARIOS)
        launch(processes, [str(SCRIPT), str(folder), *names], timeout=500)
        return folder

    @cache
    def of(name: str, processes: int = 1):
        if processes == 1:
            return SCENARIOS[name](tmp_path_factory.mktemp(name))
        if processes not in folders:
            folders[processes] = start(processes)
        return [torch.load(folders[processes] / f"{name}-{rank}.pt") for rank in range(processes)]

    of.folder = lambda name, processes: folders[processes] / name
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), *filter(None, [before])])
    yield of
    os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)
