# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a model makes of single sequences: the loss of each, and the cluster each belongs to."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..training import FeatureCollector, routed_base_model
from .perplexity import token_losses


# Before it a token has too little context to tell what its text is about; agreement is counted from here on.
CONTEXT = 32

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass
class SequenceClusters:
    """
    N sequences as the last routed module of a model sees them.

    Fields:
        embeddings (N, d) float32: mean state of each, padding left out.
        distances (N, K) float32: of each to the K centroids.
        clusters (N,) int64: the nearest centroid, as in the clustering itself.
        agreement (N,) float64: share of its tokens from position `CONTEXT` on (of all, where a sequence is shorter)
            that are routed to that cluster.
        centroids (K, d) float32, experts (K,) int64: of the clusters; -1 for a common one, which owns no expert.
    """

    embeddings: np.ndarray
    distances: np.ndarray
    clusters: np.ndarray
    agreement: np.ndarray
    centroids: np.ndarray
    experts: np.ndarray


@torch.no_grad()
def sequence_losses(model: nn.Module, batches: Batches, *, shift: bool) -> tuple[np.ndarray, np.ndarray]:
    """
    Summed negative log likelihood (N,) float64, in nats, and number of predicted tokens (N,) int64 of each sequence.

    Args:
        model: a language model, which is put into evaluation mode.
        batches: dicts of tensors with `labels` (B, T).
        shift: as in `token_losses`.
    """
    model.eval()
    nll, tokens = [], []
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels")
        losses, counts = token_losses(model(**batch).logits, labels, shift=shift)
        nll.append(losses.cpu().numpy().astype(np.float64))
        tokens.append(counts.cpu().numpy())
    return np.concatenate(nll), np.concatenate(tokens)


@torch.no_grad()
def sequence_clusters(model: nn.Module, batches: Batches) -> SequenceClusters:
    """
    The cluster of each sequence in the last routed module, and how well its tokens find it.

    Args:
        model: a CSE head or base model with clusters, which is put into evaluation mode.
        batches: dicts of tensors with `input_ids` (B, T); labels are ignored.

    Raises:
        ValueError: the model has no layer with experts, or its last one no clusters.
    """
    base = routed_base_model(model)
    site, module = list(base.routed_modules().items())[-1]
    count = module.router.num_clusters
    if not count:
        raise ValueError(f"model has no clusters in its last routed module {site}: train it past its warm-up first.")
    model.eval()
    collector = FeatureCollector(base, capacity=1 << 40, tokens_per_sequence=1, training_only=False)
    collector.attach([site])
    collector.enabled = True
    routes, masks = [], []
    for batch in batches:
        inputs = {name: value.to(base.device) for name, value in batch.items() if name != "labels"}
        routes.append(base(**inputs, output_cluster_ids=True).cluster_ids[-1].cpu())
        mask = inputs.get("attention_mask")
        masks.append(torch.ones_like(routes[-1]).bool() if mask is None else mask.bool().cpu())
    collector.detach()
    embeddings = collector.stores[site].as_it_is().embeddings
    centroids = module.router.centroids[:count].cpu()
    distances = torch.cdist(embeddings, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    clusters = distances.argmin(1)
    agreement, start = [], 0
    for ids, mask in zip(routes, masks, strict=True):
        late = mask & (mask.cumsum(1) > CONTEXT)
        counted = torch.where(late.any(1, keepdim=True), late, mask)
        own = clusters[start : start + len(ids)].unsqueeze(1)
        agreement.append(((ids == own) & counted).sum(1).double() / counted.sum(1).clamp_min(1))
        start += len(ids)
    return SequenceClusters(
        embeddings.numpy(),
        distances.numpy(),
        clusters.numpy(),
        torch.cat(agreement).numpy(),
        centroids.numpy(),
        module.router.cluster_expert[:count].cpu().numpy(),
    )
