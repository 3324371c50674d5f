# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From routing features to router buffers: the fit of one layer, and the only place that writes there."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import cast

import numpy as np
import torch

from ..dispatch_cse import RoutedModule, Site
from ..routing_cse import ClusterRouter, RoutingContext
from .algorithms import Clustering, check_finite, find_clusters, labelled_clusters
from .copies import first_copies
from .discriminant import Discriminant, agreement
from .features import RoutingFeatures
from .joint import JointFit
from .ownership import Identities, Ownership, assign_experts
from .settings import GIVEN, ClusterSettings


# Every fifth sequence is kept out of the discriminant's fit, to measure it on.
HELD_OUT = 5
# Agreement is told apart by how much context a token has (METHOD section 2 has the same bounds).
POSITIONS = ((0, 8), (8, 32), (32, 128), (128, None))


@dataclass
class LayerFit:
    """What a fit found for one layer, before anything is written."""

    clustering: Clustering
    discriminant: Discriminant | None  # None where routes are read from evidence
    ownership: Ownership
    metrics: dict[str, float] = field(default_factory=dict)

    @cached_property
    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias of the discriminant, solved for once; zeros where there is none."""
        if self.discriminant is None:
            return np.zeros_like(self.clustering.centroids), np.zeros_like(self.clustering.radii)
        return self.discriminant.weights()

    def router_state(self) -> dict[str, torch.Tensor]:
        """The rows of the router's buffers."""
        weight, bias = self.weights
        return {
            "centroids": torch.from_numpy(self.clustering.centroids),
            "radii": torch.from_numpy(self.clustering.radii),
            "cluster_sizes": torch.from_numpy(self.clustering.sizes),
            "discriminant_weight": torch.from_numpy(weight),
            "discriminant_bias": torch.from_numpy(bias),
            "cluster_expert": torch.from_numpy(self.ownership.experts),
        }


def identities_of(router: ClusterRouter) -> Identities:
    """The clusters a router holds, for a fit that has no memory of the one before."""
    count = router.num_clusters
    state = {name: buffer[:count].cpu().numpy().copy() for name, buffer in router.named_buffers()}
    return Identities(state["centroids"], state["radii"], state["cluster_expert"], np.zeros(count, np.int64))


def fit_layer(
    router: ClusterRouter,
    features: RoutingFeatures,
    settings: ClusterSettings,
    identities: Identities,
    num_experts: int,
    drifting: bool = False,
    joint: JointFit | None = None,
) -> LayerFit:
    """
    Finds clusters, matches them to the old ones, gives out experts and fits the discriminant. Writes nothing.

    Args:
        drifting: the features were taken while the model trained, oldest first (`RoutingFeatures.detrended`). Clusters
            are then found twice: those found first tell drift and texts apart.
        joint: clusters and owners that all sites share; nothing is found here then.

    Raises:
        ValueError: see `find_clusters`; or features so large or small that routes of them overflow in fp32.
    """
    settings = settings.resolve(router.routing)
    check_finite(features.embeddings.numpy())
    if joint is not None:
        features = replace(features, labels=torch.from_numpy(joint.labels))
        features = features.detrended(joint.labels) if drifting else features
        clustering = labelled_clusters(features.embeddings.numpy(), joint.labels, router.max_clusters)
        ownership = joint.ownership
    else:
        if drifting:
            first = _clusters(features.without_tokens().detrended(), settings, router.max_clusters)
            features = features.detrended(first.labels)
        clustering = _clusters(features, settings, router.max_clusters)
        ownership = assign_experts(
            identities,
            clustering.centroids,
            clustering.radii,
            clustering.shares,
            common_share=cast(float | str, settings.common_share),
            num_experts=num_experts,
            patience=settings.patience,
        )
    labels = clustering.labels
    held = held_out(len(features)) if joint is None else joint.held
    # a cluster of which every member is held out would have no token to be fitted on
    held = held & np.isin(labels, labels[~held])
    # sequences of no cluster (labels that are given) teach nothing
    fitted, held = ~held & (labels >= 0), held & (labels >= 0)
    tokens = features.tokens.numpy()
    discriminant = None
    if router.routing != "evidence":
        discriminant = Discriminant.fit(*_flat(tokens[fitted], labels[fitted]), clustering.shares)
    fit = LayerFit(clustering, discriminant, ownership)
    _check_range(features, fit.router_state())
    fit.metrics = {
        "clusters": len(clustering),
        "experts": int((ownership.experts >= 0).sum()),
        "clarity": clustering.clarity,
        "unserved": ownership.unserved,
        "absent": len(ownership.absent),
        "released": len(ownership.released),
        "largest_share": float(clustering.shares.max()),
    }
    if settings.density:
        fit.metrics["noise"] = clustering.noise
    if clustering.silhouette is not None:
        fit.metrics["silhouette"] = clustering.silhouette
    if joint is not None:
        fit.metrics.update(joint.metrics)
    if held.any() and discriminant is not None:
        fit.metrics.update(_agreement_metrics(fit.weights, features[torch.from_numpy(held)], labels[held]))
    fit.metrics.update(_routing_metrics(router, fit, features))
    return fit


def held_out(sequences: int, ids: np.ndarray | None = None) -> np.ndarray:
    """Which sequences of a sample are measured on and not fitted on, (N,) bool. Where their ids (N, L) are told, what
    a sample has twice (from two epochs, or read ahead and then by training) lies on one side (`first_copies`)."""
    held = np.arange(sequences) % HELD_OUT == HELD_OUT - 1
    return held if ids is None else held[first_copies(ids)]


def _check_range(features: RoutingFeatures, state: dict[str, torch.Tensor]) -> None:
    """Whether a router can use this state: it takes squares and scores in fp32, which ends at 3e38."""
    sampled = [states for states in (features.embeddings, features.tokens) if states.numel()]
    largest = max(float(states.abs().max()) for states in sampled)
    room = torch.finfo(torch.float32).max / features.embeddings.shape[1]
    endless = sorted(name for name, rows in state.items() if not rows.isfinite().all())
    if endless or 4 * largest**2 > room:
        raise ValueError(
            f"routing features of up to {largest:.1e} are not allowed: {endless or 'distances'} overflow in fp32. "
            f"They must be within {0.5 * room**0.5:.1e}, and not all of them next to 0: look at the activations."
        )


def _clusters(features: RoutingFeatures, settings: ClusterSettings, max_clusters: int) -> Clustering:
    embeddings = features.embeddings.numpy()
    if settings.algorithm == GIVEN:
        return labelled_clusters(embeddings, features.labels.numpy(), max_clusters)
    return find_clusters(
        embeddings,
        cast(str, settings.algorithm),
        settings.num_clusters,
        settings.seed,
        projection=settings.projection,
        min_cluster_share=settings.min_cluster_share,
        max_clusters=max_clusters,
    )


def _agreement_metrics(
    weights: tuple[np.ndarray, np.ndarray], held: RoutingFeatures, labels: np.ndarray
) -> dict[str, float]:
    """How often a token's own state tells the cluster of its sequence, over all tokens of held-out sequences and by
    their position."""
    tokens, each = _flat(held.tokens.numpy(), labels)
    positions = held.positions.numpy().ravel()
    metrics = {"agreement": agreement(*weights, tokens, each)}
    for first, last in POSITIONS:
        inside = (positions >= first) & (positions < (np.inf if last is None else last))
        if inside.any():
            name = f"agreement_from_{first}" if last is None else f"agreement_{first}_{last}"
            metrics[name] = agreement(*weights, tokens[inside], each[inside])
    return metrics


def _flat(tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens.reshape(-1, tokens.shape[-1]), labels.repeat(tokens.shape[1])


def _routing_metrics(router: ClusterRouter, fit: LayerFit, features: RoutingFeatures) -> dict[str, float]:
    """Share of the sampled sequences that get an expert, and the share whose expert is another than before."""
    after = sequence_experts(router, features, fit.router_state())
    metrics = {"share_routed": float((after >= 0).float().mean())}
    if router.num_clusters and router.routing != "evidence":  # there `fit_texts` tells
        before = sequence_experts(router, features, dict(router.named_buffers()))
        metrics["churn"] = float((before != after).float().mean())
    return metrics


def evidence_agreement(joint: JointFit, ids: np.ndarray, causal: bool = True) -> dict[str, float]:
    """How often the tokens read so far tell the cluster of their text, over held-out texts and by position; all of its
    tokens where a model is not `causal`."""
    held, labels = joint.held & (joint.labels >= 0), joint.labels
    if not held.any():
        return {}
    found = joint.evidence.clusters(ids[held]) if causal else joint.evidence.of_texts(ids[held])[:, None]
    right = np.broadcast_to(found == labels[held][:, None], ids[held].shape)
    inside = ids[held] >= 0
    metrics = {"agreement": float(right[inside].mean())}
    for first, last in POSITIONS:
        part = inside.copy()
        part[:, :first] = False
        if last is not None:
            part[:, last:] = False
        if part.any():
            name = f"agreement_from_{first}" if last is None else f"agreement_{first}_{last}"
            metrics[name] = float(right[part].mean())
    return metrics


def sequence_experts(router: ClusterRouter, features: RoutingFeatures, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The expert of each sampled sequence (N,) under a routing state, read the way the router reads it: by the
    scores of its tokens together, by its embedding, or by its label."""
    probe = ClusterRouter(router.config)
    probe.write(**{name: rows.cpu() for name, rows in state.items()})
    if router.routing == "sequence":
        return probe(features.embeddings.unsqueeze(1))[2].squeeze(1)
    if router.routing in ("given", "evidence"):
        return probe(features.embeddings.unsqueeze(1), RoutingContext(given_clusters=features.labels))[2].squeeze(1)
    scores = probe(features.tokens)[0].view(*features.positions.shape, -1).double().sum(1)
    # the score of every token holds the prior of the cluster, which counts once for the sequence
    priors = (probe.cluster_sizes / probe.cluster_sizes.sum().clamp_min(1)).double().clamp_min(1e-12).log()
    scores = scores - (features.positions.shape[1] - 1) * priors
    return probe.cluster_expert[scores.argmax(-1)]


def nearest_clusters(router: ClusterRouter, embeddings: torch.Tensor) -> np.ndarray:
    """The cluster in use whose centroid is next to each sequence embedding (N, d), (N,) int64."""
    probe = ClusterRouter(router.config)
    probe.write(**{name: rows.cpu() for name, rows in router.named_buffers()})
    return probe.nearness(embeddings)[:, : router.num_clusters].argmax(1).numpy()


def write_fit(module: RoutedModule, fit: LayerFit, settings: ClusterSettings, fit_number: int, site: Site) -> None:
    """Starts the experts that changed hands, as copies of their parents or from the base, then writes the router's
    buffers. The weights of fresh experts depend on seed, fit and site alone, so that every rank and every resumed run
    draws the same."""
    place = (site.layer,) if site.module == "ffn" else (site.layer, 1)
    generator = torch.Generator().manual_seed(hash_seed(settings.seed, fit_number, *place))
    ownership = fit.ownership
    # all are read before one is written: a parent's slot may change hands too
    inherited = {slot: module.experts.read(parent) for slot, parent in ownership.parents.items()}
    for slot in ownership.filled:
        if slot in inherited:
            module.experts.write(slot, inherited[slot])
        else:
            module.fill_expert(slot, generator)
    module.router.write(**fit.router_state())


def hash_seed(*parts: int) -> int:
    """One seed out of several numbers, well spread (NumPy's seed sequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
