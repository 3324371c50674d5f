# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Routers that send a wanted share of a batch to experts: on random weights there are no clusters to be found."""

import torch
from torch import nn

from modeling_cse.routing_cse import ClusterRouter, RoutingContext

from .contenders import EVIDENCE, Contender
from .opponents import MixtralFFN, NaiveFFN


# Clusters that own no expert. With four experts there are six clusters then, as many as k-means looks for by default.
COMMON_CLUSTERS = 2
SWEEPS = 60
HALVINGS = 30
SPREAD = 0.5  # nats of evidence in a token: so that routes stay for a while, as those of a text do
FAR = 1e6  # where centroids lie that nothing is near to


class _Captured(Exception):
    """The states have been seen: what comes after them need not run."""


def entering(contender: Contender, ffn: nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """The states (B, T, d) that enter an FFN of a model for these tokens (B, T)."""
    seen: list[torch.Tensor] = []

    def hook(module, args):
        seen.append(args[0].detach().clone())
        raise _Captured

    handle = ffn.register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            contender.model.base_model(input_ids=token_ids, use_cache=False)
    except _Captured:
        pass
    finally:
        handle.remove()
    return seen[0]


def calibrate(contender: Contender, token_ids: torch.Tensor, share: float, first: int = 0) -> float | None:
    """
    Writes the routers of a contender, layer after layer, so that `share` of the tokens (B, T) goes to experts, each of
    them the same number (by evidence: as it comes). The loop over samples can only route whole rows: `share` of them,
    rounded.

    Args:
        first: count tokens from this position on.

    Returns:
        The share that is reached, over all such layers; None for a contender without experts.
    """
    generator = torch.Generator().manual_seed(0)
    reached = []
    if contender.name == EVIDENCE:
        return write_evidence(contender, token_ids, share, generator, first)
    for ffn in contender.ffns:
        states = entering(contender, ffn, token_ids)[:, first:]
        if isinstance(ffn, NaiveFFN):
            write_centroids(ffn, states, share)
            reached.append(sum(ffn.expert_of(row) >= 0 for row in states) / len(states))
        elif hasattr(ffn, "router"):
            write_discriminant(ffn.router, states, share, ffn.experts.num_experts, generator)
            reached.append((ffn.router(states)[2] >= 0).float().mean().item())
        elif isinstance(ffn, MixtralFFN):
            reached.append(1.0)
    return sum(reached) / len(reached) if reached else None


def write_discriminant(
    router: ClusterRouter, states: torch.Tensor, share: float, num_experts: int, generator: torch.Generator
) -> None:
    """Random discriminant weights, and biases from quantiles of the scores of these states (B, T, d): each expert is
    the argmax of `share` over their number of the tokens, the common clusters share the rest."""
    clusters = num_experts + COMMON_CLUSTERS
    width = states.shape[-1]
    weight = torch.randn(clusters, width, generator=generator) / width**0.5
    shares = torch.tensor([share / num_experts] * num_experts + [(1 - share) / COMMON_CLUSTERS] * COMMON_CLUSTERS)
    bias = biases_for(states.flatten(0, 1).double().cpu() @ weight.double().T, shares)
    router.write(
        centroids=torch.zeros(clusters, width),
        radii=torch.ones(clusters),
        cluster_sizes=(1000 * shares).round().long().clamp_min(1),
        discriminant_weight=weight,
        discriminant_bias=bias.float(),
        cluster_expert=torch.tensor([*range(num_experts), *[-1] * COMMON_CLUSTERS]),
    )


def write_evidence(
    contender: Contender, token_ids: torch.Tensor, share: float, generator: torch.Generator, first: int
) -> float:
    """
    Random evidence for every token of the vocabulary, and shares of the clusters with which `share` of these tokens
    (B, T), from position `first` on, go to experts. All sites route alike.

    Returns:
        The share that is reached.
    """
    router, modules = contender.model.base_model.evidence_router, contender.ffns
    experts = modules[0].experts.num_experts
    owners = torch.tensor([*range(experts), *[-1] * COMMON_CLUSTERS])
    for module in modules:
        rows = {name: value[: len(owners)] for name, value in module.router.empty_state().items()}
        module.router.write(**rows | {"cluster_sizes": torch.ones_like(owners), "cluster_expert": owners})
    evidence = SPREAD * torch.randn(contender.model.config.vocab_size, len(owners), generator=generator)

    def reached(rare: float) -> float:
        shares = torch.where(owners >= 0, rare / experts, (1 - rare) / COMMON_CLUSTERS)
        router.write(evidence, shares)
        context = RoutingContext(given_clusters=router(token_ids, None, None))
        states = router.evidence.new_zeros(*token_ids.shape, contender.model.config.hidden_size)
        return (modules[0].router(states, context)[2][:, first:] >= 0).float().mean().item()

    # the share grows with what experts are thought to own
    least, most = 1e-6, 1 - 1e-6
    for _ in range(HALVINGS):
        middle = torch.tensor([least, most]).double().logit().mean().sigmoid().item()
        least, most = (middle, most) if reached(middle) < share else (least, middle)
    return reached(least)


def biases_for(scores: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """
    Biases (C,) with which column c is the largest in `shares[c]` of the rows of `scores` (N, C), float64.

    One column after the other gets the bias that gives it exactly its share while the others stay; after some rounds
    all are right together (the auction of optimal transport with equal steps).
    """
    rows, columns = scores.shape
    wanted = (shares.double() * rows).round().long().clamp(1, rows - 1)
    biases = torch.zeros(columns, dtype=torch.float64)
    for _ in range(SWEEPS):
        for column in range(columns):
            others = (scores + biases).index_fill(1, torch.tensor([column]), -torch.inf).amax(1)
            lacking = (others - scores[:, column]).sort().values
            place = int(wanted[column])
            biases[column] = (lacking[place - 1] + lacking[place]) / 2
    return biases


def write_centroids(ffn: NaiveFFN, states: torch.Tensor, share: float) -> None:
    """Centroids on the means of the rows (B, T, d) themselves: the first `share` of them, rounded, belong to experts
    in turn; the mean of the others is one common cluster."""
    means = states.float().mean(1)
    routed = round(share * len(means))
    owners = [row % len(ffn.experts) for row in range(routed)]
    centroids = means[:routed]
    if routed < len(means):
        centroids, owners = torch.cat([centroids, means[routed:].mean(0, keepdim=True)]), [*owners, -1]
    if len(centroids) > len(ffn.centroids):
        raise ValueError(f"{routed} routed rows are too many: there is room for {len(ffn.centroids)} clusters.")
    # a model that was cast to bf16 has cast its buffers, where the means of two rows may be the same
    ffn.centroids = torch.full_like(ffn.centroids, FAR, dtype=torch.float32)
    ffn.centroids[: len(centroids)] = centroids
    ffn.cluster_expert.fill_(-1)
    ffn.cluster_expert[: len(owners)] = torch.tensor(owners)
