# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The experts: fused weights of all slots of a module, for FFNs (MoF) and for attention (MoA).

Shapes are named in routing_cse.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _grouped_linear

from .routing_cse import shapes_may_depend_on_data
from .sharding_cse import whole, write_slot


def _autocast_dtype(states: torch.Tensor) -> torch.dtype | None:
    """What autocast, if on, computes in. Grouped products do not know autocast: they would run in fp32."""
    device = states.device.type
    known = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if known else None


def _is_single_token(states: torch.Tensor) -> bool:
    """Whether this is the one token that a text has grown by. Its expert is a plain linear layer then, without the
    sorting of grouped products, which would take as long as the product itself (docs/evidence/speed.md)."""
    # `len` would tie what torch.export traces to the size of its example
    return states.shape[0] == 1 and not torch.is_grad_enabled() and shapes_may_depend_on_data(states)


class FusedExperts(nn.Module):
    """
    What all experts share. Parameters are fused: their first dimension is the slot.

    A slot is written when a cluster takes it (`fill`), in a way that changes no logit: as a copy of the base
    (`cse_combine="replace"`), or with a zero output (`"add"`). That of a cluster that split off from another one's
    expert is a copy of it (`read`, `write`).
    """

    _some_experts_elsewhere = False  # whether expert parallelism has left this process a part of the slots

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.cse_num_experts
        self.combine = config.cse_combine
        self.initializer_range = config.initializer_range

    def init_weights(self) -> None:
        """Fills what no checkpoint has filled."""
        raise NotImplementedError  # FFN and attention experts each have their own

    def fresh_slot(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """A slot on the CPU that adds nothing to the base (`"add"`), but learns from its first gradient on."""
        raise NotImplementedError  # as above

    def lay_base(self, base: dict[str, torch.Tensor], slot: dict[str, torch.Tensor]) -> None:
        """Writes the base over a slot, as far as it reaches. Weights and optimizer moments alike.

        Args:
            base: of the base module, in `nn.Linear` layout under the names of the fused tensors.
            slot: in the shapes of one slot; written in place.
        """
        for name, tensor in base.items():
            slot[name].copy_(tensor)

    @torch.no_grad()
    def fill(self, slot: int, base: dict[str, torch.Tensor], generator: torch.Generator) -> None:
        """
        Writes a slot so that no logit changes.

        Args:
            slot: the expert to write.
            base: weights of the base module in `nn.Linear` layout, under the names of the fused tensors.
            generator: source of fresh weights, on the CPU.
        """
        tensors = self.fresh_slot(generator)
        if self.combine == "replace":
            self.lay_base(base, tensors)
        self.write(slot, tensors)

    @torch.no_grad()
    def read(self, slot: int) -> dict[str, torch.Tensor]:
        """A copy of a slot's weights, by the names of the fused tensors. Every process must call it."""
        return {name: whole(parameter.detach())[slot].clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def write(self, slot: int, tensors: dict[str, torch.Tensor]) -> None:
        """Writes what `read` gave, or another's weights of the same shapes."""
        for name, parameter in self.named_parameters():
            write_slot(parameter, slot, tensors[name])


class ExpertsEntrance:
    """
    What stands between the `forward` of FFN experts and upstream's implementations of it: the single token, and
    autocast. It stands inside `forward`, so that whoever hooks or wraps the module (adapters, offloading, expert
    parallelism) has it all. An `experts_interface` of `@use_experts_implementation`.
    """

    @staticmethod
    def get_interface(name: str, default: Callable) -> Callable:
        """The implementation of this name behind the entrance; `default` is the eager one."""
        implementation = ALL_EXPERTS_FUNCTIONS.get_interface(name, default)
        return partial(_enter, implementation, knows_autocast=implementation is default)


def _enter(implementation, experts, states, top_k_index, top_k_weights, knows_autocast):
    if _is_single_token(states) and not experts._some_experts_elsewhere:
        return experts._one(states, int(top_k_index)) * top_k_weights
    dtype = None if knows_autocast else _autocast_dtype(states)
    if dtype is not None:
        experts, states = _CastExperts(experts, dtype), states.to(dtype)
    return implementation(experts, states, top_k_index, top_k_weights)


class _CastExperts:
    """Experts in another dtype, for one call. Weights are read by name: what stands in the place of a parameter, as
    an adapter does, is cast with it."""

    def __init__(self, experts: "CSEExperts", dtype: torch.dtype):
        self.experts = experts
        for name in CSEExperts.WEIGHTS:
            setattr(self, name, getattr(experts, name).to(dtype))

    def __getattr__(self, name: str):
        return getattr(self.experts, name)


class CSEExperts(FusedExperts):
    """
    FFN experts in the layout of transformers' experts interface: `up_proj` (E, f, d), `up_proj_bias` (E, f),
    `down_proj` (E, d, f), `down_proj_bias` (E, d), with f the width of an expert.

    Each modeling file derives its own class under `@use_experts_implementation`, because transformers looks for the
    decorator in the source file of the model.
    """

    WEIGHTS = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")

    def __init__(self, config):
        super().__init__(config)
        experts, hidden, width = config.cse_num_experts, config.hidden_size, config.expert_size
        self.up_proj = nn.Parameter(torch.empty(experts, width, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(experts, width))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj_bias = nn.Parameter(torch.empty(experts, hidden))
        self.act_fn = ACT2FN[config.ffn_activation]

    def init_weights(self) -> None:
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
            state = self._one(hidden_states[token], expert)
            state = state * top_k_weights[token, slot].unsqueeze(-1)
            output = output.index_add(0, token, state.to(output.dtype))
        return output

    @property
    def _is_expert_parallel(self) -> bool:
        # What upstream calls so means to its implementations that an id of E is no expert, whose rows grouped products
        # pass over. Such ids come in only where rows are not gathered.
        return self._some_experts_elsewhere or not shapes_may_depend_on_data(self.up_proj)

    @_is_expert_parallel.setter
    def _is_expert_parallel(self, value: bool) -> None:
        self._some_experts_elsewhere = value

    def _one(self, states: torch.Tensor, expert: int) -> torch.Tensor:
        states = self.act_fn(F.linear(states, self.up_proj[expert], self.up_proj_bias[expert]))
        return F.linear(states, self.down_proj[expert], self.down_proj_bias[expert])

    def lay_base(self, base: dict[str, torch.Tensor], slot: dict[str, torch.Tensor]) -> None:
        # units beyond the base's width keep what they have, with a zero output
        width = len(base["up_proj"])
        inner = {"up_proj": slot["up_proj"][:width], "up_proj_bias": slot["up_proj_bias"][:width]}
        super().lay_base(base, {**slot, **inner, "down_proj": slot["down_proj"][:, :width]})

    def fresh_slot(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        slot = {name: torch.zeros(parameter.shape[1:]) for name, parameter in self.named_parameters()}
        slot["up_proj"].normal_(std=self.initializer_range, generator=generator)
        return slot


class ExpertGroups(NamedTuple):
    """Tokens in the order of their experts, those without one last: what grouped products need, made once a route."""

    order: torch.Tensor  # (N,) int64, which token stands where
    inverse: torch.Tensor  # (N,) int64, where each token stands
    sorted_ids: torch.Tensor  # (N,) int64, experts in that order, E for none
    ends: torch.Tensor  # (E,) int32, where the tokens of each expert end

    @classmethod
    def of(cls, expert_ids: torch.Tensor, num_experts: int) -> "ExpertGroups":
        """Groups expert ids (N,) in [0, E], without reading them on the host."""
        sorted_ids, order = torch.sort(expert_ids, stable=True)
        places = torch.arange(num_experts, device=expert_ids.device)
        # The grouped product of ONNX, as transformers translates it, gives back no row beyond the last group: rows
        # without an expert are part of it then, and are masked as ever.
        grouped = sorted_ids.clamp(max=num_experts - 1) if torch.compiler.is_exporting() else sorted_ids
        ends = torch.searchsorted(grouped, places, right=True).to(torch.int32)
        return cls(order, torch.argsort(order), sorted_ids, ends)


# Where each projection of the base lies in the fused output of `qkv_proj`, in units of d.
QKV = {"qkv": (0, 3), "query": (0, 1), "key": (1, 2), "value": (2, 3)}


class CSEAttentionExperts(FusedExperts):
    """
    Attention experts: per slot the projections to query, key and value, and the output projection. The attention
    between them is one for all tokens, so that a cache holds one key and one value a token.

    Parameters: `qkv_proj` (E, 3d, d), `qkv_proj_bias` (E, 3d), `out_proj` (E, d, d), `out_proj_bias` (E, d).
    """

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        experts, hidden = config.cse_num_experts, config.hidden_size
        self.qkv_proj = nn.Parameter(torch.empty(experts, 3 * hidden, hidden))
        self.qkv_proj_bias = nn.Parameter(torch.empty(experts, 3 * hidden))
        self.out_proj = nn.Parameter(torch.empty(experts, hidden, hidden))
        self.out_proj_bias = nn.Parameter(torch.empty(experts, hidden))

    def init_weights(self) -> None:
        std = self.initializer_range if self.combine == "replace" else 0.0
        init.normal_(self.qkv_proj, std=std)
        init.zeros_(self.qkv_proj_bias)
        init.normal_(self.out_proj, std=std)
        init.zeros_(self.out_proj_bias)

    def forward(self, states: torch.Tensor, groups: ExpertGroups, projection: str) -> torch.Tensor:
        """One expert a token: states (N, d), their grouping, and which projection: `"out"` or one of `QKV`. Returns
        (N, width of the projection), zeros where there is no expert."""
        weight, bias = self._projection(projection)
        if _is_single_token(states):
            expert = int(groups.sorted_ids)
            return F.linear(states, weight[expert], bias[expert])
        dtype = _autocast_dtype(states)
        if dtype is not None:
            states, weight, bias = states.to(dtype), weight.to(dtype), bias.to(dtype)
        if self.config._experts_implementation == "eager":
            return _linear_by_loop(states, weight, bias, groups)
        return _linear_by_group(states, weight, bias, groups)

    def _projection(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        if name == "out":
            return self.out_proj, self.out_proj_bias
        width = self.out_proj.shape[-1]
        first, last = (place * width for place in QKV[name])
        return self.qkv_proj[:, first:last], self.qkv_proj_bias[:, first:last]

    def fresh_slot(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # one linear map each: it learns from zero
        return {name: torch.zeros(parameter.shape[1:]) for name, parameter in self.named_parameters()}


def _linear_by_loop(states, weight, bias, groups):
    """Visits every expert, also one without tokens: see `CSEExperts.forward`."""
    output = states.new_zeros(states.shape[0], weight.shape[1])
    for expert in range(len(weight)):
        token = groups.order[groups.sorted_ids == expert]
        output = output.index_add(0, token, F.linear(states[token], weight[expert], bias[expert]).to(output.dtype))
    return output


def _linear_by_group(states, weight, bias, groups):
    """One grouped matrix product. It leaves rows past the last group as they happen to lie in memory, in the output
    and in the gradient of its input: where there are such rows, they are masked before and after."""
    ordered, ids = states[groups.order], groups.sorted_ids
    without = None if shapes_may_depend_on_data(states) else (ids == len(weight)).unsqueeze(-1)
    if without is not None:
        ordered, ids = ordered.masked_fill(without, 0.0), ids.clamp(max=len(weight) - 1)
    answers = _grouped_linear(ordered, weight, groups.ends, bias=bias[ids])
    if without is not None:
        answers = answers.masked_fill(without, 0.0)
    return answers[groups.inverse].to(states.dtype)


__all__ = ["CSEAttentionExperts", "CSEExperts", "ExpertGroups", "ExpertsEntrance", "FusedExperts", "QKV"]
