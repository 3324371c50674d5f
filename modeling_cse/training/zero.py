# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""DeepSpeed's ZeRO 1 and 2: its optimizer holds fp32 copies of the parameters, spread over processes, and writes the
parameters anew from them after each step. What is written into an expert must reach the copy, or it is lost."""

import torch
from torch import nn

from ..dispatch_cse import RoutedModule


MOMENTS = ("exp_avg", "exp_avg_sq")


def has_copies(module: RoutedModule) -> bool:
    return all(hasattr(parameter, "_hp_mapping") for parameter in module.experts.parameters())


def check_stage(model: nn.Module) -> None:
    """
    Raises:
        ValueError: the parameters are spread too (ZeRO 3), so that no expert can be written.
    """
    if any(hasattr(parameter, "ds_status") for parameter in model.parameters()):
        raise ValueError(
            "zero_optimization.stage=3 is not allowed: experts are written when clusters take them, which needs whole "
            "parameters, so it must be 0, 1 or 2. FSDP2 spreads parameters too, and is supported."
        )


@torch.no_grad()
def write_copies(module: RoutedModule, slots: list[int]) -> None:
    """Carries expert slots over into the fp32 copies. Every process must call it at the same step."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    for parameter in module.experts.parameters():
        copy = safe_get_full_fp32_param(parameter)
        copy[slots] = parameter[slots].to(copy)
        safe_set_full_fp32_param(parameter, copy)


def moments_of(parameter: nn.Parameter, name: str) -> torch.Tensor:
    """One kind of moment, whole."""
    from deepspeed.utils import safe_get_full_optimizer_state

    return safe_get_full_optimizer_state(parameter, name)


def write_moments(parameter: nn.Parameter, name: str, slots: list[int], values: torch.Tensor) -> None:
    """Writes one kind of moment of expert slots."""
    from deepspeed.utils import safe_set_full_optimizer_state

    moments = moments_of(parameter, name)
    moments[slots] = values.to(moments)
    safe_set_full_optimizer_state(parameter, moments, name)
