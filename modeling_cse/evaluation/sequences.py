# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a model makes of single sequences: the loss of each, and the cluster each belongs to."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import logsumexp, softmax
from torch import nn

from ..clustering import RoutingFeatures
from ..clustering.texts import embed_texts
from ..training import FeatureCollector, routed_base_model
from .perplexity import token_losses


# Before it a token has too little context to tell what its text is about; agreement is counted from here on.
CONTEXT = 32

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass
class SequenceClusters:
    """
    N sequences as the routes of a model see them: by evidence (`cse_routing="evidence"`), or by the states of its last
    routed module.

    Fields:
        embeddings (N, d) float32: by evidence the place of each in the space of its words (`embed_texts` of these
            sequences alone); by states their mean, padding left out.
        distances (N, K): by evidence minus the log posterior of each cluster, float64; by states the distance to its
            centroid, float32.
        clusters (N,) int64: the likeliest cluster by all tokens; or the nearest centroid, as in the clustering itself.
        agreement (N,) float64: share of its tokens from position `CONTEXT` on (of all, where a sequence is shorter)
            that find that cluster: it is the likeliest by what is read up to them; or they are routed to it.
        centroids (K, d) float32: by evidence the mean of `embeddings`, each weighted by its posterior; or the
            router's.
        experts (K,) int64: of the clusters; -1 for a common one, which owns no expert.
        ids (N, L) int64: the tokens, -1 at padding.
    """

    embeddings: np.ndarray
    distances: np.ndarray
    clusters: np.ndarray
    agreement: np.ndarray
    centroids: np.ndarray
    experts: np.ndarray
    ids: np.ndarray


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
    The cluster of each sequence, and how well its tokens find it: by the evidence of its tokens where the model routes
    by it, in the last routed module otherwise.

    Args:
        model: a CSE head or base model with clusters, which is put into evaluation mode.
        batches: dicts of tensors with `input_ids` (B, T); labels are ignored. A row is one sequence, whatever
            separators it holds.

    Raises:
        ValueError: the model has no layer with experts, or its last one no clusters.
    """
    base = routed_base_model(model)
    site, module = list(base.routed_modules().items())[-1]
    count = module.router.num_clusters
    if not count:
        raise ValueError(f"model has no clusters in its last routed module {site}: train it past its warm-up first.")
    model.eval()
    read = _by_evidence if base.config.cse_routing == "evidence" else _by_states
    ids, agreement, (embeddings, distances, clusters, centroids) = read(base, batches)
    owners = module.router.cluster_expert[:count].cpu().numpy()
    return SequenceClusters(embeddings, distances, clusters, agreement, centroids, owners, _rows(ids))


def _by_evidence(base: nn.Module, batches: Batches):
    router = base.evidence_router
    count = int((router.log_shares > torch.finfo(torch.float32).min).sum())
    ids, agreement, whole = [], [], []
    for inputs, mask in _inputs(base, batches):
        scores = router.scores(inputs["input_ids"], inputs.get("attention_mask"), separated=False)[..., :count].cpu()
        ids.append(inputs["input_ids"].cpu().masked_fill(~mask, -1))
        whole.append(scores[:, -1].double())
        agreement.append(_agreement(scores.argmax(-1), whole[-1].argmax(-1), mask))
    scores = torch.cat(whole).numpy()
    # over the other clusters: the log of a posterior near 1 would be the same 0 for all that are sure
    others = np.where(np.eye(count, dtype=bool), -np.inf, scores[:, None, :])
    distances = np.logaddexp(0.0, logsumexp(others, axis=-1) - scores)
    embeddings = embed_texts(_rows(ids), base.config.vocab_size, seed=0)
    centroids = softmax(-distances, axis=0).T @ embeddings
    found = embeddings, distances, scores.argmax(1), centroids.astype(np.float32)
    return ids, torch.cat(agreement).numpy(), found


def _by_states(base: nn.Module, batches: Batches):
    site, module = list(base.routed_modules().items())[-1]
    collector = FeatureCollector(base, 1 << 40, tokens_per_sequence=0, training_only=False, separated=False)
    collector.attach([site])
    collector.enabled = True
    ids, routes, masks = [], [], []
    for inputs, mask in _inputs(base, batches):
        routes.append(base(**inputs, output_cluster_ids=True).cluster_ids[-1].cpu())
        masks.append(mask)
        ids.append(inputs["input_ids"].cpu().masked_fill(~mask, -1))
    collector.detach()
    embeddings = cast(RoutingFeatures, collector.stores[site].as_it_is()).embeddings  # of one batch at least
    centroids = module.router.centroids[: module.router.num_clusters].cpu()
    distances = torch.cdist(embeddings, centroids, compute_mode="donot_use_mm_for_euclid_dist")
    clusters = distances.argmin(1)
    own = clusters.split([len(rows) for rows in ids])
    agreement = torch.cat([_agreement(*each) for each in zip(routes, own, masks, strict=True)])
    return ids, agreement.numpy(), (embeddings.numpy(), distances.numpy(), clusters.numpy(), centroids.numpy())


def _inputs(base: nn.Module, batches: Batches) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """What the base model is fed, and which tokens (B, T) bool are no padding, on the CPU."""
    for batch in batches:
        inputs = {name: value.to(base.device) for name, value in batch.items() if name != "labels"}
        mask = inputs.get("attention_mask")
        yield inputs, (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().cpu()


def _agreement(routes: torch.Tensor, clusters: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Share of the tokens (B, T) that are routed to the cluster (B,) of their sequence, (B,) fp64."""
    late = mask & (mask.cumsum(1) > CONTEXT)
    counted = torch.where(late.any(1, keepdim=True), late, mask)
    return ((routes == clusters.unsqueeze(1)) & counted).sum(1).double() / counted.sum(1).clamp_min(1)


def _rows(ids: list[torch.Tensor]) -> np.ndarray:
    """Batches (B, T) of several lengths as one array (N, L), -1 where there is nothing."""
    longest = max(rows.shape[1] for rows in ids)
    return torch.cat([F.pad(rows, (0, longest - rows.shape[1]), value=-1) for rows in ids]).numpy()
