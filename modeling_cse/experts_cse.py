# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The experts: fused weights of all slots, and the FFN that sends routed tokens through them.

Shapes are named in routing_cse.py.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from transformers import initialization as init
from transformers.activations import ACT2FN

from .routing_cse import SequenceScope


class CSEExperts(nn.Module):
    """
    GELU FFN experts as fused 3-D tensors, in the layout of transformers' experts interface: `up_proj` (E, f, d),
    `up_proj_bias` (E, f), `down_proj` (E, d, f), `down_proj_bias` (E, d), with f the width of an expert.

    Each modeling file derives its own class under `@use_experts_implementation`, because transformers looks for the
    decorator in the source file of the model.
    """

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.cse_num_experts
        self.combine = config.cse_combine
        self.initializer_range = config.initializer_range
        experts, hidden, width = config.cse_num_experts, config.hidden_size, config.expert_size
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, width))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.ffn_activation]

    def init_weights(self) -> None:
        """Fills what no checkpoint has filled. A slot is written anew when a cluster takes it (`fill`)."""
        init.normal_(self.up_proj, std=self.initializer_range)
        init.zeros_(self.up_proj_bias)
        init.normal_(self.down_proj, std=self.initializer_range if self.combine == "replace" else 0.0)
        init.zeros_(self.down_proj_bias)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """The `eager` experts implementation: (N, d), (N, k) and (N, k) give (N, d). It visits every expert, also
        one without tokens, so that each parameter gets a gradient, as DistributedDataParallel demands."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            state = F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            state = F.linear(self.act_fn(state), self.down_proj[expert], self.down_proj_bias[expert])
            state = state * top_k_weights[token, slot].unsqueeze(-1)
            output = output.index_add(0, token, state.to(output.dtype))
        return output

    def run(self, states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor | None = None):
        """One expert a token, whatever implementation is configured: states (N, d), expert ids (N,) in [0, E),
        weights (N,) or None for ones; returns (N, d)."""
        weights = states.new_ones(len(states)) if weights is None else weights
        arguments = (states, expert_ids.unsqueeze(-1), weights.unsqueeze(-1))
        device = states.device.type
        if not torch.is_autocast_enabled(device):
            return self(*arguments)
        # grouped matrix products do not know autocast: without this they would run in fp32
        dtype = torch.get_autocast_dtype(device)
        cast = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        return functional_call(self, cast, (arguments[0].to(dtype), *arguments[1:]))

    @torch.no_grad()
    def fill(self, slot: int, base: dict[str, torch.Tensor], generator: torch.Generator) -> None:
        """
        Writes an expert that changes no logit: a copy of the base FFN (`replace`; units beyond the base's width have
        a zero output), or an expert with a zero output layer (`add`).

        Args:
            slot: the expert to write.
            base: weights of the base FFN in `nn.Linear` layout, under the names of the fused tensors.
            generator: source of the fresh input weights, on the CPU.
        """
        fresh = torch.empty(self.up_proj.shape[1:]).normal_(std=self.initializer_range, generator=generator)
        self.up_proj[slot] = fresh.to(self.up_proj)
        for tensor in (self.up_proj_bias, self.down_proj, self.down_proj_bias):
            tensor[slot].zero_()
        if self.combine == "replace":
            width = len(base["up_proj"])
            self.up_proj[slot, :width] = base["up_proj"]
            self.up_proj_bias[slot, :width] = base["up_proj_bias"]
            self.down_proj[slot, :, :width] = base["down_proj"]
            self.down_proj_bias[slot] = base["down_proj_bias"]


class RoutedFFN:
    """
    What the FFNs of both families share. A class with this mixin has a `router`, its `experts`, the base FFN as
    `base_ffn(states)` without dropout, and the base weights as `base_weights()`.
    """

    def routed_ffn(self, hidden_states: torch.Tensor, scope: SequenceScope) -> torch.Tensor:
        """Base FFN and experts for (B, T, d) states, before dropout and residual."""
        _, _, expert_ids = self.router(hidden_states, scope)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._mix_static(hidden_states, expert_ids)
        return self._mix_gathered(hidden_states, expert_ids)

    def _mix_gathered(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """Each token pays for what it uses: rows are gathered by kind first, which makes shapes depend on data."""
        states, expert_ids = hidden_states.flatten(0, 1), expert_ids.flatten()
        routed = (expert_ids >= 0).nonzero().squeeze(-1)
        if not len(routed) and not self._experts_must_have_gradients():
            return self.base_ffn(hidden_states)
        answers = self.experts.run(states.index_select(0, routed), expert_ids.index_select(0, routed))
        if self.experts.combine == "add" or not len(routed):
            base = self.base_ffn(hidden_states)
            return base.flatten(0, 1).index_add(0, routed, answers.to(base.dtype)).view_as(base)
        common = (expert_ids < 0).nonzero().squeeze(-1)
        base = self.base_ffn(states.index_select(0, common))
        mixed = base.new_empty(hidden_states.shape).flatten(0, 1)
        mixed = mixed.index_copy(0, common, base).index_copy(0, routed, answers.to(base.dtype))
        return mixed.view(hidden_states.shape)

    def _mix_static(self, hidden_states: torch.Tensor, expert_ids: torch.Tensor) -> torch.Tensor:
        """The same with shapes that do not depend on data, for compilation and export: tokens without an expert go
        through slot 0 and count for nothing."""
        routed = expert_ids >= 0
        answers = self.experts.run(
            hidden_states.flatten(0, 1),
            expert_ids.clamp_min(0).flatten(),
            routed.flatten().to(hidden_states.dtype),
        )
        base = self.base_ffn(hidden_states)
        answers = answers.view(hidden_states.shape).to(base.dtype)
        if self.experts.combine == "add":
            return base + answers
        return torch.where(routed.unsqueeze(-1), answers, base)

    def _experts_must_have_gradients(self) -> bool:
        """DistributedDataParallel waits for a gradient of every parameter, also in a batch that routes nothing."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return distributed and torch.is_grad_enabled() and self.training

    def fill_expert(self, slot: int, generator: torch.Generator) -> None:
        """Starts the expert of a slot from the base FFN (`CSEExperts.fill`)."""
        self.experts.fill(slot, self.base_weights(), generator)


__all__ = ["CSEExperts", "RoutedFFN"]
