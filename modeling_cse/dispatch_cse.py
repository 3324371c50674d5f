# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Dispatch: how a module with experts sends its tokens to them or to its base.

Shapes are named in routing_cse.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from .experts_cse import CSEAttentionExperts, FusedExperts
from .routing_cse import ClusterRouter, RoutingContext


class Site(NamedTuple):
    """Where in a model experts stand: the layer, and which of its modules. Sorted as the data meets them."""

    layer: int
    module: str  # "attention" or "ffn"

    def __str__(self) -> str:
        return f"layer_{self.layer}/{self.module}"

    @classmethod
    def parse(cls, text: str) -> "Site":
        """Reads what `str` wrote.

        Raises:
            ValueError: it is no such text.
        """
        head, _, module = text.partition("/")
        if not head.startswith("layer_") or not head[6:].isdigit() or module not in ("attention", "ffn"):
            raise ValueError(f"site={text!r} is not allowed: it must be like 'layer_3/ffn'.")
        return cls(int(head[6:]), module)


def unchanged(parameter: nn.Parameter) -> torch.Tensor:
    return parameter


class RoutedModule:
    """
    A module with experts: it has a `router`, `experts` under a base, and the base's weights as
    `base_weights(of)`, in `nn.Linear` layout under the names of the fused tensors. `of` may put something else in the
    place of each base parameter, like its optimizer moment.
    """

    router: ClusterRouter
    experts: FusedExperts

    def base_weights(self, of: Callable[[nn.Parameter], torch.Tensor] = unchanged) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # each module of each family has its own

    def fill_expert(self, slot: int, generator: torch.Generator) -> None:
        """Starts the expert of a slot from the base (`FusedExperts.fill`)."""
        self.experts.fill(slot, self.base_weights(), generator)

    def mix(self, states: torch.Tensor, expert_ids: torch.Tensor, base: Callable, answer: Callable) -> torch.Tensor:
        """
        Base and experts together.

        Args:
            states: (B, T, d) that enter.
            expert_ids: (B, T) int64, -1 for no expert.
            base: from (..., d) to (..., o).
            answer: the experts: states (N, d), expert ids (N,), weights (N,) or None give (N, o).

        Returns:
            (B, T, o).
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self._mix_static(states, expert_ids, base, answer)
        return self._mix_gathered(states, expert_ids, base, answer)

    def _mix_gathered(self, hidden_states, expert_ids, base, answer):
        """Each token pays for what it uses: rows are gathered by kind first, which makes shapes depend on data."""
        states, expert_ids = hidden_states.flatten(0, 1), expert_ids.flatten()
        routed = (expert_ids >= 0).nonzero().squeeze(-1)
        if not len(routed) and not self._experts_must_have_gradients():
            return base(hidden_states)
        answers = answer(states.index_select(0, routed), expert_ids.index_select(0, routed), None)
        if self.experts.combine == "add" or not len(routed):
            output = base(hidden_states)
            return output.flatten(0, 1).index_add(0, routed, answers.to(output.dtype)).view_as(output)
        common = (expert_ids < 0).nonzero().squeeze(-1)
        output = base(states.index_select(0, common))
        mixed = output.new_empty(len(states), output.shape[-1])
        mixed = mixed.index_copy(0, common, output).index_copy(0, routed, answers.to(output.dtype))
        return mixed.view(*hidden_states.shape[:2], -1)

    def _mix_static(self, hidden_states, expert_ids, base, answer):
        """The same with shapes that do not depend on data, for compilation and export: tokens without an expert go
        through slot 0 and count for nothing."""
        routed = expert_ids >= 0
        answers = answer(
            hidden_states.flatten(0, 1),
            expert_ids.clamp_min(0).flatten(),
            routed.flatten().to(hidden_states.dtype),
        )
        output = base(hidden_states)
        answers = answers.view(output.shape).to(output.dtype)
        if self.experts.combine == "add":
            return output + answers
        return torch.where(routed.unsqueeze(-1), answers, output)

    def _experts_must_have_gradients(self) -> bool:
        """DistributedDataParallel waits for a gradient of every parameter, also in a batch that routes nothing."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return distributed and torch.is_grad_enabled() and self.training


class RoutedFFN(RoutedModule):
    """What the FFNs of both families share: a class with this mixin has its base, without dropout, as
    `base_ffn(states)`."""

    def routed_ffn(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Base FFN and experts for (B, T, d) states, before dropout and residual."""
        _, _, expert_ids = self.router(hidden_states, context)
        return self.mix(hidden_states, expert_ids, self.base_ffn, self.experts.run)


class RoutedAttention(RoutedModule):
    """
    What the attentions of both families share. Their stock `forward` calls the projections one by one; those that
    have experts are `RoutedProjection`s and look up here where the tokens of this forward pass go.

    A class with this mixin calls `route` before its stock `forward`.
    """

    def add_experts(self, config) -> None:
        """Router, experts, and what the projections share; once the stock modules stand."""
        self.router = ClusterRouter(config)
        self.experts = CSEAttentionExperts(config)
        self.dispatch = AttentionDispatch(self)

    def route(self, hidden_states: torch.Tensor, context: RoutingContext) -> None:
        """Reads the route of (B, T, d) states, once for all projections."""
        self.dispatch.expert_ids = self.router(hidden_states, context)[2]


class AttentionDispatch:
    """Shared by an attention and its projections. No module, so that nothing is registered twice."""

    def __init__(self, attention: RoutedAttention):
        self.attention = attention
        self.expert_ids: torch.Tensor | None = None  # (B, T) of the forward pass under way

    def __call__(self, states: torch.Tensor, base: Callable, projection: str) -> torch.Tensor:
        answer = partial(self.attention.experts, projection=projection)
        return self.attention.mix(states, self.expert_ids, base, answer)


class RoutedProjection:
    """A base projection under its stock parameter names, that lets experts answer for routed tokens. Stands before
    `nn.Linear` or `Conv1D`."""

    def __init__(self, *args, dispatch: AttentionDispatch, projection: str):
        super().__init__(*args)
        self.dispatch = dispatch
        self.projection = projection

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.dispatch(states, super().forward, self.projection)


__all__ = ["RoutedAttention", "RoutedFFN", "RoutedModule", "RoutedProjection", "Site"]
