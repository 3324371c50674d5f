# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One fit of all layers at once: gathered, computed, and only then written."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..clustering import ClusterSettings, RoutingFeatures, fit_layer, identities_of, write_fit
from ..dispatch_cse import Site
from .collecting import FeatureCollector, routed_base_model
from .gathering import gather_features, local_capacity, on_first_rank
from .memory import ClusterMemory


def fit_layers(
    model: nn.Module,
    features: dict[Site, RoutingFeatures | None],
    settings: ClusterSettings,
    memory: ClusterMemory,
) -> tuple[dict[str, float], dict[Site, list[int]]]:
    """
    Fits every site on features that all ranks share, and writes nothing unless all of them succeed.

    Returns:
        Metrics by name, and the expert slots that changed hands, by site.

    Raises:
        ValueError: no sequence was sampled, or see `fit_layer`.
    """
    start = time.perf_counter()
    modules = routed_base_model(model).routed_modules()

    def compute():
        fits = {}
        for site, module in modules.items():
            if features[site] is None:
                raise ValueError(f"no sequence reached the router of {site}: there is nothing to cluster.")
            identities = memory.identities.get(site) or identities_of(module.router)
            fits[site] = fit_layer(module.router, features[site], settings, identities, module.experts.num_experts)
        return fits

    fits = on_first_rank(compute)
    metrics = {}
    for site, fit in fits.items():
        write_fit(modules[site], fit, settings, memory.fits, site)
        memory.identities[site] = fit.ownership.identities
        memory.discriminants[site] = fit.discriminant
        metrics.update({f"cse/{site}/{name}": value for name, value in fit.metrics.items()})
    memory.fits += 1
    metrics["cse/seconds"] = time.perf_counter() - start
    return metrics, {site: fit.ownership.filled for site, fit in fits.items()}


@torch.no_grad()
def fit_experts(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_clusters: int = 6,
    common_share: float = 0.7,
    algorithm: str = "kmeans",
    sample_size: int = 2048,
    patience: int = 3,
    seed: int = 0,
) -> dict[str, float]:
    """
    Does outside the Trainer what `ClusterExpertsCallback` does inside: collects routing features from tokenised
    batches, fits the clusters, writes the router buffers and switches the experts on. No logit changes by it.

    Args:
        model: a CSE model or head; one that loaded a dense checkpoint, for example.
        batches: tokenised batches, dicts of tensors with `input_ids` or `inputs_embeds`, (B, T) each; labels are
            ignored. Read until `sample_size` sequences have passed. Use the text the model is going to see.
        num_clusters, common_share, algorithm, patience, seed: see `ClusterSettings`.
        sample_size: sequences to fit on, at least `num_clusters`.

    Returns:
        The metrics of the fit, by name, as the callback logs them.

    Raises:
        ValueError: no batch, fewer sequences than clusters, features that are not finite, or a wrong setting.
    """
    settings = ClusterSettings(algorithm, num_clusters, common_share, patience, seed)
    if not isinstance(sample_size, int) or sample_size < num_clusters:
        raise ValueError(
            f"sample_size={sample_size!r} is not allowed: it must be an int >= num_clusters={num_clusters}."
        )
    base = routed_base_model(model)
    collector = FeatureCollector(model, local_capacity(sample_size), training_only=False)
    inputs = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"}
    was_training = model.training
    model.eval()
    collector.attach()
    collector.enabled = True
    try:
        for batch in batches:
            base(**{name: value.to(base.device) for name, value in batch.items() if name in inputs})
            if min(store.seen for store in collector.stores.values()) >= sample_size:
                break
    finally:
        collector.detach()
        model.train(was_training)
    metrics, _ = fit_layers(model, gather_features(collector.take()), settings, ClusterMemory())
    return metrics
