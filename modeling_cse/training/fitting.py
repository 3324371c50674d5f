# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""One fit of all layers at once: gathered, computed, and only then written."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..clustering import (
    ClusterSettings,
    Evidence,
    Identities,
    JointFit,
    LayerFit,
    RoutingFeatures,
    evidence_agreement,
    fit_layer,
    fit_texts,
    held_out,
    identities_of,
    nearest_clusters,
    write_fit,
)
from ..dispatch_cse import RoutedModule, Site
from ..routing_cse import ClusterRouter
from .checking import check_algorithm, check_sizes, is_joint
from .collecting import (
    FeatureCollector,
    read_batches_of,
    refuse_adapters,
    refuse_parallel_plans,
    routed_base_model,
)
from .gathering import gather_features, gather_texts, local_capacity, on_first_rank
from .memory import ClusterMemory


logger = logging.get_logger(__name__)

# Below it a fit warns: METHOD section 2 measured 0.94 from position 32 on.
POOR_AGREEMENT = 0.7


def fit_layers(
    model: nn.Module,
    features: dict[Site, RoutingFeatures | None],
    settings: ClusterSettings,
    memory: ClusterMemory,
    layer_budget: int | None = None,
    drifting: bool = False,
    texts: RoutingFeatures | None = None,
) -> tuple[dict[str, float], dict[Site, dict[int, int | None]]]:
    """
    Fits every site on features that all ranks share, and writes nothing unless all of them succeed.

    Args:
        model: a CSE model or head.
        features: of the sites to fit.
        settings: how clusters are found and kept.
        memory: of the fits before; written.
        layer_budget: write only the fits of so many layers, those with the largest cluster clarity. None: of all.
        drifting: see `fit_layer`.
        texts: token ids, where texts are clustered by them: of the sample, which comes last, and of the sequences
            before it that evidence is counted on too.

    Returns:
        Metrics by name, and the expert slots that changed hands, by site: each with the slot that it begins as a copy
        of, None if from the base.

    Raises:
        ValueError: no sequence was sampled, or see `fit_layer`.
    """
    start = time.perf_counter()
    base = routed_base_model(model)
    modules = base.routed_modules()
    settings = settings.resolve(base.config.cse_routing)

    def compute():
        fits = {}
        joint = fit_joint(base, features, settings, memory, texts) if is_joint(base, settings) else None
        for site, sample in features.items():
            if sample is None:
                raise ValueError(f"no sequence reached the router of {site}: there is nothing to cluster.")
            router, slots = modules[site].router, modules[site].num_experts
            identities = memory.identities.get(site) or identities_of(router)
            fits[site] = fit_layer(router, sample, settings, identities, slots, drifting, joint)
        return fits, joint

    fits, joint = on_first_rank(compute)
    metrics = {f"cse/{site}/clarity": fit.metrics["clarity"] for site, fit in fits.items()}
    fits = fits if layer_budget is None else clearest_layers(fits, layer_budget)
    for site, fit in fits.items():
        write_fit(modules[site], fit, settings, memory.fits, site)
        if joint is None:
            memory.identities[site] = fit.ownership.identities
        if fit.discriminant is not None:
            memory.discriminants[site] = fit.discriminant
        metrics.update({f"cse/{site}/{name}": value for name, value in fit.metrics.items()})
        _warn_of_poor_agreement(site, modules[site], fit)
        _tell_of_owners(site, fit, settings)
    if joint is not None:
        memory.texts = joint.ownership.identities
        if base.config.cse_routing == "evidence":
            table, shares = torch.from_numpy(joint.evidence.table), torch.from_numpy(joint.evidence.shares)
            base.evidence_router.write(table, shares)
    memory.fits += 1
    metrics["cse/seconds"] = time.perf_counter() - start
    owners = {site: fit.ownership for site, fit in fits.items()}
    return metrics, {site: {slot: own.parents.get(slot) for slot in own.filled} for site, own in owners.items()}


def fit_joint(
    base: nn.Module,
    features: dict[Site, RoutingFeatures | None],
    settings: ClusterSettings,
    memory: ClusterMemory,
    texts: RoutingFeatures | None,
) -> JointFit:
    """
    The clusters that all sites share (`fit_texts`). Arguments as in `fit_layers`.

    Raises:
        ValueError: no sequence was sampled, or see `fit_texts`.
    """
    site, sample = next(iter(features.items()))
    if sample is None or texts is None:
        raise ValueError("no sequence reached a router: there is nothing to cluster.")
    module = base.routed_modules()[site]
    older, sampled = texts[: len(texts) - len(sample)], texts[len(texts) - len(sample) :]
    separator = base.config.cse_separator_token_id
    if separator is not None and not (sampled.ids == separator).any():
        logger.warning_once(
            f"cse_separator_token_id={separator} is in none of the {len(sample)} sequences of the sample, so that "
            "each row is one text. It must be the token that ends a document in your rows; leave it out where each "
            "row holds one."
        )
    ids = sampled.ids.numpy()
    identities = memory.texts or identities_of_texts(base, module.router, sample.embeddings, ids)
    fit = fit_texts(
        ids,
        sampled.labels.numpy(),
        held_out(len(sample), ids),
        settings,
        identities,
        vocab_size=base.config.vocab_size,
        num_experts=module.num_experts,
        max_clusters=module.router.max_clusters,
        older=older.ids.numpy(),
        older_given=older.labels.numpy(),
    )
    if base.config.cse_routing == "evidence":
        fit.metrics.update(evidence_agreement(fit, ids, base.config.reads_left_to_right))
    return fit


def identities_of_texts(
    base: nn.Module, router: ClusterRouter, embeddings: torch.Tensor, ids: np.ndarray
) -> Identities:
    """The clusters that a model holds, known by their evidence, for a fit that has no memory of the one before. A
    model without evidence of its own gets that of the sampled texts (N, L) whose states (N, d) lie next to each
    centroid."""
    count, vocab_size = router.num_clusters, base.config.vocab_size
    if not count:
        return Identities.none(vocab_size)
    if base.config.cse_routing == "evidence":
        table, shares = base.evidence_router.evidence[:, :count], base.evidence_router.log_shares[:count].exp()
        table, shares = table.cpu().numpy(), shares.cpu().numpy()
    else:
        nearest = nearest_clusters(router, embeddings)
        # a cluster that none of the texts is next to has a share nevertheless, and evidence of nothing
        shares = (np.bincount(nearest, minlength=count) + 1.0) / (len(ids) + count)
        table = Evidence.fit(ids, nearest, shares, vocab_size, np.zeros(len(ids), bool)).table
    experts = router.cluster_expert[:count].cpu().numpy().copy()
    return Identities(table.T.copy(), shares.astype(np.float32), experts, np.zeros(count, np.int64))


def clearest_layers(fits: dict[Site, LayerFit], budget: int) -> dict[Site, LayerFit]:
    """The fits of the `budget` layers whose clusters are clearest, over the mean of a layer's modules (the paper
    chooses layers by the distances between clusters); the deeper of equals."""
    by_layer: dict[int, list[float]] = {}
    for site, fit in fits.items():
        by_layer.setdefault(site.layer, []).append(fit.metrics["clarity"])
    order = sorted(by_layer, key=lambda layer: (sum(by_layer[layer]) / len(by_layer[layer]), layer), reverse=True)
    return {site: fit for site, fit in fits.items() if site.layer in order[:budget]}


def _warn_of_poor_agreement(site: Site, module: RoutedModule, fit: LayerFit) -> None:
    metrics = fit.metrics
    share = metrics.get("agreement_32_128", metrics.get("agreement"))
    if module.router.routing == "discriminant" and share is not None and share < POOR_AGREEMENT:
        logger.warning(
            f"{site}: the discriminant gives only {share:.0%} of held-out tokens (of positions 32 to 128, if there "
            "are any) the cluster of their sequence, so many tokens miss their expert. Fewer clusters (num_clusters), "
            "a larger sample (sample_size), or a later first fit (warmup) may help."
        )


def _tell_of_owners(site: Site, fit: LayerFit, settings: ClusterSettings) -> None:
    """Says what became of clusters that own an expert, where something did."""
    ownership = fit.ownership
    if len(fit.clustering) == 1:
        logger.warning(
            f"{site}: all {fit.clustering.sizes.sum()} sampled sequences are in one cluster, so there is nothing to "
            "tell apart: the base serves all of them, unless that cluster owns an expert already."
        )
    if ownership.released:
        again = sorted({*ownership.released} & {*ownership.filled})
        logger.warning(
            f"{site}: the clusters of experts {ownership.released} were absent or common in {settings.patience} fits "
            "in a row (patience) and lost them"
            + (f"; {again} start anew for other clusters." if again else "; no other cluster waits for one.")
        )
    if ownership.absent:
        logger.info(f"{site}: the clusters of experts {ownership.absent} were not found; their experts are kept.")


@torch.no_grad()
def fit_experts(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, sample_size: int = 2048, **settings: Any
) -> dict[str, float]:
    """
    Does outside the Trainer what `ClusterExpertsCallback` does inside: collects routing features from tokenised
    batches, fits the clusters, writes the router buffers and switches the experts on. No logit changes by it.

    Args:
        model: a CSE model or head; one that loaded a dense checkpoint, for example.
        batches: tokenised batches, dicts of tensors with `input_ids` or `inputs_embeds`, (B, T) each; labels are
            ignored. Read until `sample_size` sequences have passed. Use the text the model is going to see.
        sample_size: sequences to fit on, at least the number of clusters.
        **settings: fields of `ClusterSettings`: algorithm, num_clusters, common_share, patience, seed, projection,
            min_cluster_share, common_by.

    Returns:
        The metrics of the fit, by name, as the callback logs them.

    Raises:
        ValueError: no batch, fewer sequences than clusters, features that are not finite, a wrong setting, a quantised
            base, a model under PEFT adapters, or one with a tensor- or expert-parallel plan.
    """
    unknown = sorted(set(settings) - {field.name for field in fields(ClusterSettings)})
    if unknown:
        raise ValueError(f"{unknown} is not allowed: fit_experts knows the fields of ClusterSettings and sample_size.")
    base = routed_base_model(model)
    settings = ClusterSettings(**settings).resolve(base.config.cse_routing)
    least = (settings.cluster_range or (1,))[0]
    check_sizes(sample_size, None, least)
    refuse_adapters(model)
    refuse_parallel_plans(model)
    for module in base.routed_modules().values():
        module.check_base()
    check_algorithm(base, settings)
    collector = FeatureCollector(model, local_capacity(sample_size), with_ids=is_joint(base, settings))
    collector.attach()
    try:
        read_batches_of(collector, model, batches, sample_size)
    finally:
        collector.detach()
    texts = gather_texts(collector.texts.all())
    metrics, _ = fit_layers(model, gather_features(collector.take()), settings, ClusterMemory(), texts=texts)
    return metrics
