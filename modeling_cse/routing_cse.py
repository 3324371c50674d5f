# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
The router: fp32 buffers that say where the clusters lie and which expert each one owns, and the ways to read them.

Shapes, here and in the experts: B batch, T tokens of a row, d hidden size, C clusters a router can hold, E expert
slots, S sequences (a row, or each document of a packed row).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .scope_cse import SequenceScope, sequence_means


logger = logging.get_logger(__name__)

# Under `cse_gate="posterior"` an expert that would count for less is not asked: it would cost as much as one that
# counts in full.
LEAST_WEIGHT = 0.1


def shapes_may_depend_on_data(tensor: torch.Tensor) -> bool:
    """Whether routes may decide how large a tensor is. On a CPU they are read for nothing; an accelerator would have
    to be waited for, and what is compiled, traced or exported has static shapes."""
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def known_ends(indices: torch.Tensor) -> tuple[int, int] | None:
    """The least and the largest of some indices; None where there are none, or where a device would be waited for."""
    if not indices.numel() or not shapes_may_depend_on_data(indices):
        return None
    low, high = indices.aminmax()
    return int(low), int(high)


class RoutingContext(NamedTuple):
    """What a forward pass tells its routers besides the states. It is an argument of every block with experts."""

    scope: SequenceScope = SequenceScope()
    # Clusters that come with the batch: (B,) or (B, T) int64, -1 for none; or the chance of each, (B, T, C) float.
    given_clusters: torch.Tensor | None = None
    # Routes by router, while activations are checkpointed: a block that is computed again in the backward pass takes
    # the same way, whatever its rounding (transformers issue 47467: a route that flips there is a silent NaN).
    routes: dict | None = None

    @classmethod
    def of(cls, model: nn.Module, input_ids, attention_mask, position_ids, given_clusters) -> "RoutingContext":
        """
        The context of a forward pass of a base model.

        Raises:
            ValueError: labels that do not fit, or see `SequenceScope.of`.
        """
        scope = SequenceScope()
        if model.config.cse_routing == "sequence":
            scope = SequenceScope.of(attention_mask, position_ids, input_ids, model.config.cse_separator_token_id)
        if given_clusters is not None and given_clusters.dtype not in (torch.int64, torch.int32):
            if not given_clusters.is_floating_point() or model.config.gate != "posterior":
                raise ValueError(
                    f"given_clusters of dtype {given_clusters.dtype} is not allowed with cse_gate="
                    f"{model.config.gate!r}: it must be int64 or 32, or with 'posterior' floating too."
                )
        recomputed = model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return cls(scope, given_clusters, {} if recomputed and model.is_activation_checkpointing else None)

    def as_argument(self) -> dict[str, "RoutingContext"]:
        """The keyword argument of the blocks, if there is anything to say: stock blocks get it too, and pass it on to
        attention functions that know nothing of it."""
        said = any(part is not None for part in (*self.scope, self.given_clusters, self.routes))
        return {"routing_context": self} if said else {}


class RoutingState(nn.Module):
    """A module whose whole state is persistent buffers that clustering writes: those of `empty_state()`."""

    def empty_state(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # each kind of router has its own

    def register_state(self) -> None:
        """Makes the buffers, once `empty_state` can be asked."""
        for name, value in self.empty_state().items():
            self.register_buffer(name, value)

    def reset_buffers(self) -> None:
        """Fills every buffer that no checkpoint has filled. Models are built on the meta device, so that what
        `__init__` computed is gone by then."""
        for name, value in self.empty_state().items():
            init.copy_(getattr(self, name), value)

    def check_precision(self) -> None:
        """
        Raises:
            ValueError: a loader has rounded the state, past all that keeps it in fp32: routes of it would be others.
        """
        for name, value in self._buffers.items():
            if value.is_floating_point() and value.dtype != torch.float32:
                raise ValueError(
                    f"{name} of dtype {value.dtype} is not allowed: the routing state must be torch.float32 whatever "
                    "dtype the model has. Load it by from_pretrained(..., dtype=...); a loader that casts every "
                    "tensor, as accelerate's load_checkpoint_and_dispatch(dtype=...) does, must be told no dtype."
                )

    def _apply(self, fn, recurse=True):
        # `model.to(torch.bfloat16)` must not round the routing state: only the device may change.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class ClusterRouter(RoutingState):
    """
    Gives every token a cluster, and through it an expert or none. Nothing here is learned by gradient: clustering
    writes the buffers, the forward pass only reads them. Without clusters every token is common.

    Buffers (persistent; floats stay fp32 whatever the model is cast to):
        centroids (C, d): mean sequence embedding of each cluster.
        radii (C,): mean distance of its members to the centroid.
        cluster_sizes (C,) int64: members at the last fit; 0 marks an unused row.
        discriminant_weight (C, d), discriminant_bias (C,): log-posterior scores of a token's own state.
        cluster_expert (C,) int64: the expert slot a cluster owns, -1 for a common cluster.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.routing = config.cse_routing
        self.gate = config.gate
        self.radius_scaling = config.cse_radius_scaling
        self.hidden_size = config.hidden_size
        self.max_clusters = config.max_clusters
        self.register_state()

    def empty_state(self) -> dict[str, torch.Tensor]:
        """The buffers of a router that holds no cluster."""
        rows, width = self.max_clusters, self.hidden_size
        return {
            "centroids": torch.zeros(rows, width, dtype=torch.float32),
            "radii": torch.ones(rows, dtype=torch.float32),
            "cluster_sizes": torch.zeros(rows, dtype=torch.int64),
            "discriminant_weight": torch.zeros(rows, width, dtype=torch.float32),
            "discriminant_bias": torch.zeros(rows, dtype=torch.float32),
            "cluster_expert": torch.full((rows,), -1, dtype=torch.int64),
        }

    @property
    def num_clusters(self) -> int:
        """Clusters in use; 0 before the first fit. Reads the device."""
        return int((self.cluster_sizes > 0).sum())

    @torch.no_grad()
    def flaw(self, num_experts: int) -> str | None:
        """What no clustering can have written into the buffers, by the name of the buffer; None if all is well. For
        what was loaded from a file. Reads the device; says nothing of buffers on the meta device."""
        state = {name: value.cpu() for name, value in self.named_buffers() if not value.is_meta}
        if state.keys() != self.empty_state().keys():
            return None
        broken = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            return f"{broken[0]} is not finite"
        if not (state["radii"] > 0).all():
            return "radii are not all above 0"
        sizes, owned = state["cluster_sizes"], state["cluster_expert"]
        if (sizes < 0).any() or ((sizes[:-1] == 0) & (sizes[1:] > 0)).any():
            return f"cluster_sizes are {sizes.tolist()}: they must be 0 or more, unused rows last"
        if (owned < -1).any() or (owned >= num_experts).any() or (owned[sizes == 0] != -1).any():
            return (
                f"cluster_expert is {owned.tolist()}: it must be from -1 to {num_experts - 1}, and -1 where "
                "cluster_sizes is 0"
            )
        return None

    @property
    def lacks_discriminant(self) -> bool:
        """Whether tokens are to be routed by a discriminant, and there is none for the clusters in use: those found
        for `cse_routing="evidence"` have none. Reads the device."""
        state = self.discriminant_weight, self.cluster_sizes
        if self.routing != "discriminant" or any(value.is_meta for value in state):
            return False
        return self.num_clusters > 1 and not bool(self.discriminant_weight.any())

    @torch.no_grad()
    def write(self, **state: torch.Tensor) -> None:
        """
        Replaces the whole routing state; rows beyond those given become unused.

        Args:
            **state: every buffer by name, with k <= C rows.

        Raises:
            ValueError: a buffer is missing or unknown, or there are more clusters than the router can hold.
        """
        empty = self.empty_state()
        if state.keys() != empty.keys():
            raise ValueError(f"state has {sorted(state)}: it must have exactly {sorted(empty)}.")
        for name, rows in state.items():
            if len(rows) > self.max_clusters:
                raise ValueError(
                    f"{name} has {len(rows)} clusters, but this router holds at most cse_max_clusters="
                    f"{self.max_clusters}."
                )
            empty[name][: len(rows)] = rows
        for name, value in empty.items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, context: RoutingContext = RoutingContext()
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """
        Args:
            hidden_states: (B, T, d) states that enter the module, any float dtype.
            context: of the forward pass: padding and documents (`"sequence"`), labels (`"given"`, `"evidence"`).

        Returns:
            Router logits (B * T, C) fp32 as mixture-of-experts models report them (unused clusters at the lowest
            float); cluster ids (B, T) int64, of the expert that answers or else the likeliest (-1 while there are no
            clusters); expert ids (B, T) int64 (-1: none); for how much each expert counts (B, T) fp32, None: in full.

        Raises:
            ValueError: `"given"` or `"evidence"` routes without fitting labels.
        """
        if context.routes is None:
            return self._route(hidden_states, context)
        if self not in context.routes:
            context.routes[self] = self._route(hidden_states, context)
        return context.routes[self]

    def _route(self, hidden_states, context):
        self.check_precision()
        told = self.routing in ("given", "evidence")
        given = self._given(context.given_clusters, hidden_states) if told else None
        if shapes_may_depend_on_data(hidden_states) and not self.cluster_sizes.any():
            return self._without_clusters(hidden_states)
        logits, index = self._scores(hidden_states, context.scope, given)
        cluster_ids = logits.argmax(-1)
        known = (self.cluster_sizes > 0)[cluster_ids]
        if given is not None:  # whoever is told nothing has no logit above the lowest
            known = known & (logits.amax(-1) > torch.finfo(torch.float32).min)
        weights = None
        if self.gate == "posterior":
            weights, owners = self._likeliest_owners(logits)
            known_owner = known & (weights >= LEAST_WEIGHT)
            cluster_ids = torch.where(known_owner, owners, cluster_ids)
            expert_ids = torch.where(known_owner, self.cluster_expert[owners], -1)
        else:
            expert_ids = torch.where(known, self.cluster_expert[cluster_ids], -1)
        cluster_ids = torch.where(known, cluster_ids, -1)
        if index is not None:
            logits, cluster_ids, expert_ids = logits[index], cluster_ids[index], expert_ids[index]
        return logits.flatten(0, 1), cluster_ids, expert_ids, weights

    def _likeliest_owners(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the clusters with an expert the likeliest one: its probability (B, T) fp32, and which it is (B, T)."""
        return logits.softmax(-1).masked_fill(self.cluster_expert < 0, 0.0).max(-1)

    def _scores(self, hidden_states, scope, given) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores of tokens (B, T, C); or of sequences (S, C), with the row that each token belongs to (B, T)."""
        lowest = torch.finfo(torch.float32).min
        unused = self.cluster_sizes == 0
        with maybe_autocast(hidden_states.device.type, enabled=False):
            if self.routing == "discriminant":
                # unused rows have a weight of zero: the bias alone, which is small, needs the mask
                bias = self.discriminant_bias.masked_fill(unused, lowest)
                return F.linear(hidden_states.float(), self.discriminant_weight, bias), None
            if self.routing == "sequence":
                means, _, index = sequence_means(hidden_states, scope)
                return self.nearness(means).masked_fill(unused, lowest), index
        if given.is_floating_point():
            return given.log().masked_fill((given <= 0) | unused, lowest), None
        others = given.unsqueeze(-1) != torch.arange(self.max_clusters, device=given.device)
        return (others | unused).float() * lowest, None

    def _without_clusters(self, hidden_states):
        """The route before the first fit: nothing is computed."""
        shape = hidden_states.shape[:2]
        none = torch.full(shape, -1, device=hidden_states.device)
        lowest = hidden_states.new_full((1, 1), torch.finfo(torch.float32).min, dtype=torch.float32)
        return lowest.expand(shape.numel(), self.max_clusters), none, none, None

    def _given(self, labels: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """What all tokens are told: labels (B, T) int64, or probabilities (B, T, C) fp32."""
        batch, length = hidden_states.shape[:2]
        if labels is not None and labels.is_floating_point():
            if labels.shape != (batch, length, self.max_clusters):
                raise ValueError(
                    f"given_clusters of shape {tuple(labels.shape)} and floating type is not allowed: it must be "
                    f"({batch}, {length}, cse_max_clusters={self.max_clusters}), a probability for each cluster."
                )
            return labels.float().to(hidden_states.device)
        if labels is None:
            raise ValueError(
                f"given_clusters=None is not allowed with cse_routing={self.routing!r}: pass the cluster of each "
                "sequence (B,) or token (B, T), -1 for none."
            )
        if labels.shape not in ((batch,), (batch, length)):
            raise ValueError(
                f"given_clusters of shape {tuple(labels.shape)} is not allowed: it must be ({batch},) or "
                f"({batch}, {length}), as the states are."
            )
        ends = known_ends(labels)
        if ends is not None and (ends[0] < -1 or ends[1] >= self.max_clusters):
            raise ValueError(
                f"given_clusters from {ends[0]} to {ends[1]} is not allowed: it must be from -1, for none, to "
                f"cse_max_clusters - 1 = {self.max_clusters - 1}."
            )
        return labels.long().to(hidden_states.device).view(batch, -1).expand(batch, length)

    def nearness(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Minus the distance of sequence embeddings (S, d) fp32 to each centroid, over its radius if
        `cse_radius_scaling` (the paper's dispatch rule): (S, C)."""
        if torch.compiler.is_exporting():  # ONNX has no `cdist`
            distance = (embeddings.unsqueeze(1) - self.centroids).norm(dim=-1)
        else:
            distance = torch.cdist(embeddings, self.centroids, compute_mode="donot_use_mm_for_euclid_dist")
        return -(distance / self.radii if self.radius_scaling else distance)


def warn_that_routes_see_the_future(model_name: str) -> None:
    """Says once that a causal model was given routes over whole sequences."""
    if torch.compiler.is_compiling():
        return
    logger.warning_once(
        f"{model_name} with cse_routing='sequence': a route is read from the whole sequence, so logits see later "
        "tokens. Use it to train or score as a replication of the paper, never to judge a language model by its "
        "perplexity; cse_routing='discriminant' is causal."
    )


__all__ = [
    "ClusterRouter",
    "RoutingContext",
    "RoutingState",
    "known_ends",
    "shapes_may_depend_on_data",
    "warn_that_routes_see_the_future",
]
