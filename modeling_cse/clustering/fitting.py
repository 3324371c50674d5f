# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From routing features to router buffers: the fit of one layer, and the only place that writes there."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..dispatch_cse import RoutedModule, Site
from ..routing_cse import ClusterRouter
from .algorithms import ALGORITHMS, Clustering, find_clusters
from .discriminant import Discriminant, agreement
from .features import RoutingFeatures
from .ownership import Identities, Ownership, assign_experts


# Every fifth sequence is kept out of the discriminant's fit, to measure it on.
HELD_OUT = 5


@dataclass
class ClusterSettings:
    """
    How clusters are found and kept, checked when made.

    Fields:
        algorithm: one of `clustering.algorithms.ALGORITHMS`.
        num_clusters: how many to look for, at least 1.
        common_share: the largest clusters are common until together they hold this share, 0 to 1.
        patience: fits in a row an owner may be absent or common before it loses its expert, at least 1.
        seed: of clustering and of fresh expert weights.
    """

    algorithm: str = "kmeans"
    num_clusters: int = 6
    common_share: float = 0.7
    patience: int = 3
    seed: int = 0

    def __post_init__(self):
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm={self.algorithm!r} is not allowed: it must be one of {list(ALGORITHMS)}.")
        for name, least in (("num_clusters", 1), ("patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an int >= {least}.")
        if not isinstance(self.common_share, int | float) or not 0 <= self.common_share <= 1:
            raise ValueError(f"common_share={self.common_share!r} is not allowed: it must be from 0 to 1.")


@dataclass
class LayerFit:
    """What a fit found for one layer, before anything is written."""

    clustering: Clustering
    discriminant: Discriminant
    ownership: Ownership
    metrics: dict[str, float] = field(default_factory=dict)

    def router_state(self) -> dict[str, torch.Tensor]:
        """The rows of the router's buffers."""
        weight, bias = self.discriminant.weights()
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
) -> LayerFit:
    """
    Finds clusters, matches them to the old ones, gives out experts and fits the discriminant. Writes nothing.

    Raises:
        ValueError: more clusters than the router can hold, or see `find_clusters`.
    """
    if settings.num_clusters > router.max_clusters:
        raise ValueError(
            f"num_clusters={settings.num_clusters} is more than cse_max_clusters={router.max_clusters}, which this "
            "model's routers can hold."
        )
    embeddings = features.embeddings.numpy()
    clustering = find_clusters(embeddings, settings.algorithm, settings.num_clusters, settings.seed)
    ownership = assign_experts(
        identities,
        clustering.centroids,
        clustering.radii,
        clustering.shares,
        common_share=settings.common_share,
        num_experts=num_experts,
        patience=settings.patience,
    )
    held = np.arange(len(features)) % HELD_OUT == HELD_OUT - 1
    # a cluster of which every member is held out would have no token to be fitted on
    held &= np.isin(clustering.labels, clustering.labels[~held])
    tokens, labels = features.tokens.numpy(), clustering.labels
    discriminant = Discriminant.fit(*_flat(tokens[~held], labels[~held]), clustering.shares)
    fit = LayerFit(clustering, discriminant, ownership)
    fit.metrics = {
        "clusters": len(clustering),
        "experts": int((ownership.experts >= 0).sum()),
        "clarity": clustering.clarity,
        "unserved": ownership.unserved,
    }
    if held.any():
        fit.metrics["agreement"] = agreement(*discriminant.weights(), *_flat(tokens[held], labels[held]))
    fit.metrics.update(_routing_metrics(router, fit, features))
    return fit


def _flat(tokens: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return tokens.reshape(-1, tokens.shape[-1]), labels.repeat(tokens.shape[1])


def _routing_metrics(router: ClusterRouter, fit: LayerFit, features: RoutingFeatures) -> dict[str, float]:
    """Share of the sampled sequences that get an expert, and the share whose expert is another than before."""
    after = sequence_experts(router, features, fit.router_state())
    metrics = {"share_routed": float((after >= 0).float().mean())}
    if router.num_clusters:
        before = sequence_experts(router, features, dict(router.named_buffers()))
        metrics["churn"] = float((before != after).float().mean())
    return metrics


def sequence_experts(router: ClusterRouter, features: RoutingFeatures, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The expert of each sampled sequence (N,) under a routing state, read the way the router reads it: by the
    summed scores of its tokens, or by its embedding."""
    probe = ClusterRouter(router.config)
    probe.write(**{name: rows.cpu() for name, rows in state.items()})
    if router.routing == "sequence":
        return probe(features.embeddings.unsqueeze(1))[2].squeeze(1)
    scores = probe(features.tokens)[0].view(*features.positions.shape, -1).double().sum(1)
    return probe.cluster_expert[scores.argmax(-1)]


def write_fit(module: RoutedModule, fit: LayerFit, settings: ClusterSettings, fit_number: int, site: Site) -> None:
    """Starts the experts that changed hands, then writes the router's buffers. The weights of fresh experts depend on
    seed, fit and site alone, so that every rank and every resumed run draws the same."""
    place = (site.layer,) if site.module == "ffn" else (site.layer, 1)
    generator = torch.Generator().manual_seed(hash_seed(settings.seed, fit_number, *place))
    for slot in fit.ownership.filled:
        module.fill_expert(slot, generator)
    module.router.write(**fit.router_state())


def hash_seed(*parts: int) -> int:
    """One seed out of several numbers, well spread (NumPy's seed sequence)."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
