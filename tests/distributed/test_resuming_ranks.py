# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a run of several processes that goes on from a checkpoint."""

import shutil

import pytest
from scenarios import run

from benchmarks.ranks import different_tensors


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["resumed", "by_evidence_resumed"])
def test_it_is_the_unbroken_run_bit_for_bit(outcome, name):
    for own in outcome(name, 2):
        whole, resumed = own["whole"], own["resumed"]
        assert resumed["history"] == whole["history"] and whole["losses"]
        assert resumed["fits"] == [4, 6, 8]
        assert not different_tensors([whole["state"], resumed["state"]])


def test_another_number_of_processes_is_refused(outcome, tmp_path):
    """Each file holds a part of the sample: one process would go on with half of it."""
    outcome("resumed", 2)
    place = tmp_path / "checkpoint-7"
    shutil.copytree(outcome.folder("resumed", 2) / "checkpoint-7", place)
    for rank in (0, 1):
        assert (place / f"cluster_state_rank{rank}.safetensors").is_file()
    with pytest.raises(ValueError, match="2 processes.*a run of 1 cannot go on exactly"):
        run(tmp_path, update="recluster+ema", resume=str(place))
