# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Optimizer state of experts that start anew."""

import torch

from ..experts_cse import FusedExperts


@torch.no_grad()
def clear_moments(optimizer: torch.optim.Optimizer, experts: FusedExperts, slots: list[int]) -> None:
    """Forgets what the optimizer remembers of expert slots that changed hands: the moments of another domain's expert
    would push the fresh weights about. State that is not one value per weight (step counts) stays."""
    for parameter in experts.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                value[slots] = 0
