# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Dispatch: how a module with experts sends its tokens to them or to its base.

Shapes are named in routing_cse.py.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from .experts_cse import CSEAttentionExperts, ExpertGroups, FusedExperts
from .routing_cse import ClusterRouter, RoutingContext, shapes_may_depend_on_data
from .sharding_cse import whole
from .threads_cse import PerThread


if TYPE_CHECKING:
    # what a mixin stands before
    from torch.nn import Module as Stock
else:
    Stock = object


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


def is_quantized(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds codes: integers (bitsandbytes), or a class of its own that knows how to undo it
    (torchao)."""
    return not tensor.is_floating_point() or type(tensor).dequantize is not torch.Tensor.dequantize


def unchanged(parameter: nn.Parameter) -> torch.Tensor:
    """The base parameter itself.

    Raises:
        ValueError: it is quantised, or offloaded, so that no expert can start from it.
    """
    if parameter.is_meta:
        raise ValueError(
            "A base weight on the meta device is not allowed where experts start from the base. If it was offloaded "
            "(device_map, cpu_offload, disk_offload), load the model without that."
        )
    if is_quantized(parameter):
        raise ValueError(
            f"A base weight of type {type(parameter).__name__} and dtype {parameter.dtype} is not allowed where "
            "experts start from the base: it must be a plain floating tensor. Fit the clusters first, save the model, "
            "and load it quantised then."
        )
    return parameter


class RoutedTokens(NamedTuple):
    """Where the N tokens of a batch go, made once a route. Where shapes may depend on data, experts see only the R
    tokens that are theirs; elsewhere all of them, with the id E for none."""

    expert_ids: torch.Tensor  # (R,) int64 in [0, E), of the routed tokens; or (N,) in [0, E]
    routed: torch.Tensor | None = None  # (R,) int64, the tokens with an expert; None: experts see all tokens
    common: torch.Tensor | None = None  # (N - R,) int64, the others
    weights: torch.Tensor | None = None  # (R,) or (N,) fp32, for how much the experts count; None: in full

    @classmethod
    def of(cls, expert_ids: torch.Tensor, num_experts: int, weights: torch.Tensor | None = None) -> "RoutedTokens":
        """Reads the router's expert ids (B, T), -1 for none, and their weights (B, T)."""
        expert_ids, weights = expert_ids.flatten(), None if weights is None else weights.flatten()
        without = expert_ids < 0
        if not shapes_may_depend_on_data(expert_ids):
            return cls(expert_ids.masked_fill(without, num_experts), weights=weights)
        routed = (~without).nonzero().squeeze(-1)
        weights = None if weights is None else weights.index_select(0, routed)
        return cls(expert_ids.index_select(0, routed), routed, without.nonzero().squeeze(-1), weights)

    def weighted(self, answers: torch.Tensor) -> torch.Tensor:
        """What experts answer (N, o), for as much as it counts."""
        return answers if self.weights is None else answers * self.weights.unsqueeze(-1).to(answers.dtype)


class RoutedModule(Stock):
    """
    A module with experts: it has a `router`, `experts` under a base, and the base's weights as
    `base_weights(of)`, in `nn.Linear` layout under the names of the fused tensors. `of` may put something else in the
    place of each base parameter, like its optimizer moment. Its block leaves the context of the forward pass in
    `contexts`.
    """

    router: ClusterRouter
    experts: FusedExperts
    contexts: PerThread

    def base_weights(self, of: Callable[[nn.Parameter], torch.Tensor] = unchanged) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # each module of each family has its own

    @property
    def context(self) -> RoutingContext:
        """Of the forward pass under way in this thread."""
        found = self.contexts.get()
        return RoutingContext() if found is None else found

    @property
    def num_experts(self) -> int:
        """Expert slots. Not asked of `experts`: an adapter around them has a number of its own by this name."""
        return self.router.config.cse_num_experts

    @property
    def combine(self) -> str:
        return self.router.config.cse_combine

    @property
    def _some_experts_elsewhere(self) -> bool:
        """Whether the experts are spread over processes; asked of them, and not of an adapter around them."""
        return next(part for part in self.experts.modules() if isinstance(part, FusedExperts))._some_experts_elsewhere

    def check_base(self) -> None:
        """Says at the start of a fit what would otherwise fail at its end.

        Raises:
            ValueError: experts cannot start from this base; see `unchanged`.
        """
        self.base_weights(of=lambda parameter: torch.empty(unchanged(parameter).shape, device="meta"))

    def fill_expert(self, slot: int, generator: torch.Generator) -> None:
        """Starts the expert of a slot from the base (`FusedExperts.fill`)."""
        self.experts.fill(slot, self.base_weights(of=lambda parameter: whole(unchanged(parameter))), generator)

    def route_tokens(self, hidden_states: torch.Tensor, context: RoutingContext) -> RoutedTokens:
        """Routes (B, T, d) states."""
        _, _, expert_ids, weights = self.router(hidden_states, context)
        return RoutedTokens.of(expert_ids, self.num_experts, weights)

    def mix(self, states: torch.Tensor, tokens: RoutedTokens, base: Callable, answer: Callable) -> torch.Tensor:
        """
        Base and experts together.

        Args:
            states: (B, T, d) that enter.
            tokens: which of them go where.
            base: from (..., d) to (..., o).
            answer: the experts: the states that they see, (N, d), give (N, o).

        Returns:
            (B, T, o).
        """
        way = self._mix_static if tokens.routed is None else self._mix_gathered
        return way(states, tokens, base, answer)

    def _mix_gathered(self, hidden_states, tokens, base, answer):
        """Each token pays for what it uses: rows are gathered by kind first."""
        states, routed = hidden_states.flatten(0, 1), tokens.routed
        if not len(routed) and not self._experts_must_be_asked():
            return base(hidden_states)
        answers = tokens.weighted(answer(states.index_select(0, routed)))
        if self.combine == "add" or not len(routed):
            output = base(hidden_states)
            return output.flatten(0, 1).index_add(0, routed, answers.to(output.dtype)).view_as(output)
        if not len(tokens.common) and not torch.is_grad_enabled():
            return answers.view(*hidden_states.shape[:2], -1)
        output = base(states.index_select(0, tokens.common))
        mixed = output.new_empty(len(states), output.shape[-1])
        mixed = mixed.index_copy(0, tokens.common, output).index_copy(0, routed, answers.to(output.dtype))
        return mixed.view(*hidden_states.shape[:2], -1)

    def _mix_static(self, hidden_states, tokens, base, answer):
        """The same with shapes that do not depend on data. Experts pass over rows that are not theirs; the base
        answers for all, also those that an expert replaces: one plain product is what accelerators are best at."""
        answers = tokens.weighted(answer(hidden_states.flatten(0, 1)))
        output = base(hidden_states)
        answers = answers.view(output.shape).to(output.dtype)
        if self.combine == "add":
            return output + answers
        routed = (tokens.expert_ids < self.num_experts).view(*output.shape[:2], 1)
        return torch.where(routed, answers, output)

    def _experts_must_be_asked(self) -> bool:
        """Also where nothing is routed. Of expert-parallel ranks with batches of their own, the others wait for it.

        DistributedDataParallel waits for a gradient of every parameter, also in a batch that routes nothing. Where
        experts are in use one process gives it too: without a gradient the optimizer passes experts over, with a zero
        one their momentum goes on, and a run must not depend on how many processes share its batches."""
        if self._some_experts_elsewhere:
            return True
        if not (torch.is_grad_enabled() and self.training):
            return False
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        return distributed or self.router.num_clusters > 0


class RoutedFFN(RoutedModule):
    """What the FFNs of both families share: a class with this mixin has its base, without dropout, as
    `base_ffn(states)`."""

    def routed_ffn(self, hidden_states: torch.Tensor, context: RoutingContext) -> torch.Tensor:
        """Base FFN and experts for (B, T, d) states, before dropout and residual."""
        tokens = self.route_tokens(hidden_states, context)
        return self.mix(hidden_states, tokens, self.base_ffn, partial(self._answer, tokens.expert_ids))

    def _answer(self, expert_ids, states):
        """One expert a token: ids (N,) and states (N, d) give (N, d), zeros where there is no expert (id E)."""
        ids, weights = expert_ids.unsqueeze(-1), states.new_ones(states.shape[0], 1)
        if self._some_experts_elsewhere:
            # upstream brings each token to the rank of its expert, and knows none called E: any will do, at weight 0
            weights = weights.masked_fill(ids == self.num_experts, 0.0)
            ids = ids.clamp(max=self.num_experts - 1)
        return self.experts(states, ids, weights)


class RoutedAttention(RoutedModule):
    """
    What the attentions of both families share. Their stock `forward` calls the projections one by one; those that
    have experts are `RoutedProjection`s and look up here where the tokens of this forward pass go. Whatever takes
    their place has to call them (as adapters do) or to be made one of them (`RoutedProjection.hand_over`).

    This mixin stands before the stock attention. A class with it names its `projections()`.
    """

    def add_experts(self, config) -> None:
        """Router, experts, and what the projections share; once the stock modules stand."""
        self.router = ClusterRouter(config)
        self.experts = CSEAttentionExperts(config)
        self.dispatch = AttentionDispatch()
        self.contexts = PerThread()

    def route(self, hidden_states: torch.Tensor, context: RoutingContext) -> None:
        """
        Reads the route of (B, T, d) states, once for all projections.

        Raises:
            ValueError: something stands in the place of a projection, or around it, that would give other logits than
                one expects.
        """
        self._check_projections()
        self.dispatch.group(self, self.route_tokens(hidden_states, context))

    def _check_projections(self) -> None:
        for name, module in self.projections().items():
            if isinstance(module, RoutedProjection):
                continue
            kind = type(module).__name__
            if not any(isinstance(part, RoutedProjection) for part in module.modules()):
                raise ValueError(
                    f"{name}={kind} is not allowed in an attention with experts: it was put in the place of a "
                    "projection that sends tokens to them, so that all would pass them over. Quantise with "
                    "from_pretrained(quantization_config=...), replace by model.set_submodule(name, module), or leave "
                    "the attention out."
                )
            if self.combine == "replace":
                raise ValueError(
                    f"{name}={kind} is not allowed around a projection of an attention with experts and "
                    "cse_combine='replace': an adapter would act on tokens of experts as well, and be lost to them "
                    "once it is merged. Leave the attention's projections out (exclude_modules), and adapt the "
                    "experts: target_parameters=['experts.qkv_proj', 'experts.out_proj']."
                )

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        self.route(hidden_states, self.context)
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self.dispatch.clear()


class RoutedBlock(Stock):
    """
    A block of which some modules (`routed_parts`) have experts. Stands before the stock block.

    They get the context of the forward pass, also when a checkpointed block is computed again, and keep it no longer
    than that.
    """

    def forward(self, *args, routing_context: RoutingContext = RoutingContext(), **kwargs):
        parts = self.routed_parts().values()
        for module in parts:
            module.contexts.put(routing_context)
        try:
            return super().forward(*args, **kwargs)
        finally:
            for module in parts:
                module.contexts.drop()


class AttentionDispatch:
    """Shared by an attention and its projections. No module, so that nothing is registered twice."""

    def __init__(self):
        self.routes = PerThread()

    def group(self, attention: RoutedAttention, tokens: RoutedTokens) -> None:
        """Takes up a route, for all projections. The attention comes along: it may be a copy (`nn.DataParallel`)."""
        self.routes.put((attention, tokens, ExpertGroups.of(tokens.expert_ids, attention.num_experts)))

    def clear(self) -> None:
        """Forgets the route."""
        self.routes.drop()

    def __call__(self, states: torch.Tensor, base: Callable, projection: str) -> torch.Tensor:
        attention, tokens, groups = self.routes.get()  # projections are asked between `group` and `clear` only
        return attention.mix(states, tokens, base, partial(attention.experts, groups=groups, projection=projection))


class RoutedProjection(Stock):
    """A base projection under its stock parameter names, that lets experts answer for routed tokens. Stands before
    `nn.Linear` or `Conv1D`."""

    def __init__(self, *args, dispatch: AttentionDispatch, projection: str):
        super().__init__(*args)
        self.dispatch = dispatch
        self.projection = projection

    def hand_over(self, module: nn.Module) -> None:
        """Makes a module that is to stand here, like a quantised linear layer, a routed projection as well."""
        module.__class__ = routed_class(type(module))  # type: ignore[arg-type]  # mypy: `type[Any]` is not Hashable
        module.dispatch, module.projection = self.dispatch, self.projection

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.dispatch(states, super().forward, self.projection)


@cache
def routed_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Routed{base.__name__}", (RoutedProjection, base), {})


__all__ = [
    "RoutedAttention",
    "RoutedBlock",
    "RoutedFFN",
    "RoutedModule",
    "RoutedProjection",
    "RoutedTokens",
    "Site",
    "is_quantized",
]
