# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the measure itself, on gradients made by hand: what agreement, opposition and rarity look like."""

import math

import pytest
import torch

from modeling_cse.training.gradients import (
    NO_TOKEN,
    SequenceGradients,
    gradient_consistency,
    principal_eigenvector,
    scale_steps,
    sentence_frequency_scores,
)


TAIL = torch.arange(40) % 4 == 0


def pulling(tail: torch.Tensor, rest: torch.Tensor, noise: float = 0.05) -> torch.Tensor:
    """Gradients (40, 6) of sequences that pull one way each, the tail its own."""
    generator = torch.Generator().manual_seed(0)
    return torch.where(TAIL.unsqueeze(1), tail, rest) + noise * torch.randn(40, 6, generator=generator)


def axis(number: int) -> torch.Tensor:
    return torch.eye(6)[number]


def test_all_sequences_agree_with_themselves():
    gradients = torch.randn(40, 6)
    everyone = torch.ones(40, dtype=torch.bool)
    assert gradient_consistency(gradients, everyone) == pytest.approx(1.0)
    assert gradient_consistency(gradients, everyone, torch.arange(40) // 8) == pytest.approx(1.0)


@pytest.mark.parametrize(("tail", "wanted"), [(axis(0), 1.0), (-axis(0), -1.0), (axis(1), 0.0), (-axis(1), 0.0)])
def test_a_tail_that_agrees_opposes_or_goes_its_own_way(tail, wanted):
    assert gradient_consistency(pulling(tail, axis(0)), TAIL) == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("wanted", [1.0, -1.0])
def test_a_direction_that_swings_from_step_to_step_does_not_hide_the_sign(wanted):
    """Over the swings the sums of u are near zero: only within a step is it seen whether the tail pulls along."""
    steps = torch.arange(40) // 4
    for seed in range(5):
        swing = torch.randn(10, generator=torch.Generator().manual_seed(seed))
        gradients = pulling(wanted * axis(0), axis(0)) * (swing - swing.mean())[steps].unsqueeze(1)
        assert gradient_consistency(gradients, TAIL, steps) == pytest.approx(wanted, abs=0.05)


@pytest.mark.parametrize("steps", [None, torch.arange(40) // 8, torch.arange(40)], ids=["one", "some", "single"])
def test_the_sign_of_the_eigenvectors_does_not_matter(monkeypatch, steps):
    gradients = torch.randn(40, 6)
    wanted = gradient_consistency(gradients, TAIL, steps)
    assert abs(wanted) > 1e-3
    for signs in ((1, -1), (-1, 1), (-1, -1)):
        left = list(signs)
        name = "modeling_cse.training.gradients.principal_eigenvector"
        monkeypatch.setattr(name, lambda g, left=left: left.pop() * principal_eigenvector(g))
        assert gradient_consistency(gradients, TAIL, steps) == wanted


def test_steps_of_a_single_sequence_fall_back_on_the_whole_window():
    gradients = pulling(-axis(0), axis(0))
    assert gradient_consistency(gradients, TAIL, torch.arange(40)) == gradient_consistency(gradients, TAIL) < -0.9


def test_the_factor_that_all_gradients_share_does_not_matter():
    gradients = torch.randn(40, 6)
    assert gradient_consistency(1e-8 * gradients, TAIL) == pytest.approx(gradient_consistency(gradients, TAIL))


def test_the_factor_of_a_step_is_taken_out_and_lengths_within_it_are_kept():
    gradients, steps = torch.randn(40, 6), torch.arange(40) // 8
    scaled = scale_steps(gradients, steps)
    assert scaled.square().sum(1).view(5, 8).mean(1).sqrt().tolist() == pytest.approx([1.0] * 5)
    factors = torch.tensor([1.0, 64.0, 1e-6, 3.0, 0.5])[steps].unsqueeze(1)
    torch.testing.assert_close(scale_steps(gradients * factors, steps), scaled)
    ratios = gradients.norm(dim=1)[:8] / scaled.norm(dim=1)[:8]
    torch.testing.assert_close(ratios, ratios[:1].expand(8))
    assert torch.equal(scale_steps(torch.zeros(3, 2), torch.arange(3)), torch.zeros(3, 2))


def test_principal_eigenvector_is_the_one_of_the_largest_eigenvalue():
    gradients = torch.randn(12, 5, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gradients @ gradients.T)
    assert principal_eigenvector(gradients).dot(vectors[:, -1]).abs() == pytest.approx(1.0)
    assert values[-1] > values[-2]


def test_what_is_not_defined_is_nan():
    assert math.isnan(gradient_consistency(torch.randn(40, 6), torch.zeros(40, dtype=torch.bool)))
    assert math.isnan(gradient_consistency(torch.randn(40, 6) * ~TAIL.unsqueeze(1), TAIL))


def test_scores_are_mean_relative_frequencies_of_the_tokens_there_are():
    counts = torch.tensor([6, 3, 1, 0])
    tokens = torch.tensor([[0, 0, 1], [2, 3, NO_TOKEN], [NO_TOKEN, NO_TOKEN, NO_TOKEN]])
    scores = sentence_frequency_scores(tokens, counts)
    assert scores[:2].tolist() == pytest.approx([(0.6 + 0.6 + 0.3) / 3, 0.05])
    assert math.isnan(scores[2])


def test_joining_pads_shorter_sequences_with_no_token():
    parts = [
        SequenceGradients(torch.ones(1, 4), torch.tensor([[5, 6, 7]]), torch.tensor([1])),
        SequenceGradients(torch.zeros(1, 4), torch.tensor([[8]]), torch.tensor([2])),
    ]
    joined = SequenceGradients.concatenate(parts)
    assert joined.tokens.tolist() == [[5, 6, 7], [8, NO_TOKEN, NO_TOKEN]] and joined.steps.tolist() == [1, 2]
