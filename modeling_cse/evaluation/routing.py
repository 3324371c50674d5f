# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Where tokens go: the share of each expert, by domain."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..training import routed_base_model


@torch.no_grad()
def expert_shares(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """
    The share of the tokens that each expert of the last routed module answers, padding left out. What is missing to 1
    stays with the base. Under `cse_gate="posterior"` a token whose clusters, more than ten, are nearly equally likely
    counts for the likeliest of them, although no expert is asked for so little.

    Args:
        model: a CSE head or base model, or what wraps one; its mode (training or evaluation) is kept.
        batches: dicts of tensors with `input_ids` (B, T); labels are ignored.

    Returns:
        One share an expert slot.

    Raises:
        ValueError: the model is not of this family or has no layer with experts; there is no batch, or no token in
            them.
    """
    base: Any = routed_base_model(model)
    module = list(base.routed_modules().values())[-1]
    counts = torch.zeros(module.num_experts + 1, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for batch in batches:
        inputs = {name: value.to(base.device) for name, value in batch.items() if name != "labels"}
        clusters = base(**inputs, output_cluster_ids=True).cluster_ids[-1]
        experts = torch.where(clusters >= 0, module.router.cluster_expert[clusters], -1)
        mask = inputs.get("attention_mask")
        experts = experts if mask is None else experts[mask.bool()]
        counts += torch.bincount(experts.flatten().cpu() + 1, minlength=len(counts)).double()
    model.train(was_training)
    if not counts.sum():
        raise ValueError("batches holds no token: there is no share to compute.")
    return (counts[1:] / counts.sum()).tolist()
