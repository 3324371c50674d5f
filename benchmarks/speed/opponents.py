# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The FFNs that cluster experts are measured against: transformers' own sparse layer, and the loop over samples."""

import copy

import torch
from torch import nn
from torch.func import functional_call
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from modeling_cse import CSEGPT2Config


# Row strides of a grouped matrix product are multiples of 16 bytes, in bf16 too.
WIDTH_MULTIPLE = 8


def mixtral_config(config: CSEGPT2Config) -> MixtralConfig:
    """
    As many experts as `config` has, one a token, each with the weights of one of its experts. A Mixtral expert is
    gated: three matrices (d, m), where ours has two (d, f) and biases. Its activation stays its own.
    """
    hidden, width = config.hidden_size, config.expert_size
    weights = 2 * hidden * width + width + hidden
    gated = round(weights / (3 * hidden) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    mixtral = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=gated,
        num_local_experts=config.cse_num_experts,
        num_experts_per_tok=1,
        initializer_range=config.initializer_range,
    )
    mixtral._experts_implementation = "grouped_mm"
    return mixtral


class MixtralFFN(nn.Module):
    """
    transformers' `MixtralSparseMoeBlock` as it is, (B, T, d) to (B, T, d).

    Under autocast its experts are given weights in the autocast type, as ours are: grouped matrix products do not
    know autocast, and it would be the only contender that computes in fp32.
    """

    def __init__(self, config: MixtralConfig):
        super().__init__()
        self.block = MixtralSparseMoeBlock(config)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=config.initializer_range)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        device = hidden_states.device.type
        if not torch.is_autocast_enabled(device):
            return self.block(hidden_states)
        dtype = torch.get_autocast_dtype(device)
        weights = {f"experts.{name}": weight.to(dtype) for name, weight in self.block.experts.named_parameters()}
        return functional_call(self.block, weights, (hidden_states.to(dtype),))


class NaiveFFN(nn.Module):
    """
    Dispatch as the files of the paper do it, written anew: sample after sample the mean state of the row, its distance
    to each centroid, and the FFN of the nearest cluster, or the base, on that row alone.

    Args:
        base: the FFN of common clusters.
        experts: FFNs of the clusters that own one.
        max_clusters: rows of the buffers `centroids` (C, d) and `cluster_expert` (C,), -1 for common.
    """

    def __init__(self, base: nn.Module, experts: list[nn.Module], hidden_size: int, max_clusters: int):
        super().__init__()
        self.base = base
        self.experts = nn.ModuleList(experts)
        self.register_buffer("centroids", torch.zeros(max_clusters, hidden_size))
        self.register_buffer("cluster_expert", torch.full((max_clusters,), -1))

    @classmethod
    def of(cls, base: nn.Module, num_experts: int, hidden_size: int, max_clusters: int) -> "NaiveFFN":
        """Experts that are copies of the base."""
        return cls(base, [copy.deepcopy(base) for _ in range(num_experts)], hidden_size, max_clusters)

    @torch.no_grad()
    def expert_of(self, row: torch.Tensor) -> int:
        """The expert of a row (T, d), -1 for none."""
        distances = torch.cdist(row.float().mean(0, keepdim=True), self.centroids.float())
        return int(self.cluster_expert[distances.argmin()])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        outputs = []
        for row in hidden_states:
            expert = self.expert_of(row)
            ffn = self.base if expert < 0 else self.experts[expert]
            outputs.append(ffn(row))
        return torch.stack(outputs)
