# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the routing sample over ranks and micro-batches: each sequence once, whoever has seen it."""

import pytest
import torch


pytestmark = pytest.mark.slow


def samples(run: dict) -> list[list[int]]:
    return [numbers for numbers, _ in run["samples"]]


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["plain", "accumulated"])
def test_each_sequence_of_the_last_two_steps_is_sampled_once(outcome, name, processes):
    """Eight rows a step, in one micro-batch or two, on one rank or two: sixteen sequences, in their order."""
    run = outcome(name) if processes == 1 else outcome(name, processes)[0]
    assert all(len(numbers) == len(set(numbers)) == 16 for numbers in samples(run))
    assert samples(run) == samples(outcome("plain"))


def test_four_ranks_sample_the_same(outcome):
    assert samples(outcome("plain", 4)[0]) == samples(outcome("plain"))
    assert outcome("plain", 4)[3]["kept"] == [4, 4, 4]


def test_states_are_sampled_as_in_one_process(outcome):
    for (_, ours), (_, expected) in zip(outcome("plain", 2)[0]["samples"], outcome("plain")["samples"], strict=True):
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_ranks_may_hold_different_numbers_of_sequences(outcome):
    """22 rows in batches of four: on two ranks the last step of an epoch has four rows and two."""
    first, second = outcome("uneven", 2)
    assert first["kept"] != second["kept"]
    assert samples(first) == samples(second)
    assert all(len(numbers) == 14 for numbers in samples(first))
    assert len(first["fits"]) == 3


def test_a_rank_may_have_none_of_a_cluster(outcome):
    """The rare domain is on the second rank alone; it still becomes a cluster of everybody."""
    run = outcome("one_sided", 2)[0]
    assert samples(run) == samples(outcome("one_sided"))


def test_a_rank_may_have_nothing_to_give(outcome):
    """All rows of the second rank are padding."""
    first, second = outcome("padded", 2)
    assert min(first["kept"]) > 0 and second["kept"] == [0, 0, 0]
    assert samples(first) == samples(second) == samples(outcome("padded"))
    assert all(torch.isfinite(torch.tensor(run["losses"])).all() for run in (first, second))
