# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of what a comparison measures: a cluster is clear by enough text, or not measured."""

from types import SimpleNamespace

import numpy as np
import pytest

from modeling_cse.analysis import LEAST_SEQUENCES
from modeling_cse.runs.measuring import _clarities


def sequences(counts: list[int], seed: int) -> SimpleNamespace:
    """Sequences of clusters with words of their own."""
    generator = np.random.default_rng(seed)
    labels = np.arange(len(counts)).repeat(counts)
    ids = generator.integers(0, 10, (len(labels), 20)) + 10 * labels[:, None]
    return SimpleNamespace(ids=ids, clusters=labels, experts=np.arange(len(counts)) - 1)


def test_of_few_held_out_sequences_separation_is_not_measured():
    config = SimpleNamespace(cse_routing="evidence", vocab_size=40)
    held_out = sequences([20, LEAST_SEQUENCES, LEAST_SEQUENCES - 1, 0], 1)
    found = _clarities(SimpleNamespace(config=config), sequences([30, 20, 10, 10], 0), held_out)
    assert found[0] > 0.5 and found[1] > 0.5 and found[2:] == [None, None]


def test_silhouettes_are_of_the_sample():
    sample = sequences([30, 20], 0)
    sample.embeddings = np.eye(2)[sample.clusters] + np.random.default_rng(0).normal(scale=0.05, size=(50, 2))
    model = SimpleNamespace(config=SimpleNamespace(cse_routing="discriminant"))
    found = _clarities(model, sample, sequences([0, 0], 1))
    assert found == [pytest.approx(0.9, abs=0.1)] * 2
