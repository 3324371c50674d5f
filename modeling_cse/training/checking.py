# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Whether clusters that are found so suit a model: said at the start, where it would fail at the first fit."""

from torch import nn
from transformers import TrainingArguments

from ..clustering import ClusterSettings
from ..clustering.settings import GIVEN, TEXT, is_count
from .schedule import FitSchedule, as_step


def check_sizes(sample_size: int, evidence_size: int | None, least: int) -> None:
    """
    Whether so many sequences can be fitted on, and counted.

    Raises:
        ValueError: fewer in the sample than `least`, the clusters, or fewer counted than it has.
    """
    if not is_count(sample_size, least):
        raise ValueError(f"sample_size={sample_size!r} is not allowed: it must be an int >= num_clusters={least}.")
    if evidence_size is not None and not is_count(evidence_size, sample_size):
        raise ValueError(f"evidence_size={evidence_size!r} is not allowed: it must be an int >= {sample_size=}.")


def is_joint(base: nn.Module, settings: ClusterSettings) -> bool:
    """Whether all sites share one clustering of the texts."""
    return settings.algorithm == TEXT or base.config.cse_routing == "evidence"


def check_algorithm(base: nn.Module, settings: ClusterSettings) -> None:
    """
    Whether routes can be read from clusters that are found so.

    Raises:
        ValueError: evidence, of clusters that each site finds for itself; or labels that come with the batch, of
            clusters that are found.
    """
    if base.config.cse_routing == "given" and settings.algorithm != GIVEN:
        raise ValueError(
            f"algorithm={settings.algorithm!r} is not allowed with cse_routing='given': clusters come with the batch, "
            "so it must be 'given'."
        )
    if base.config.cse_routing == "evidence" and settings.algorithm not in (TEXT, GIVEN):
        raise ValueError(
            f"algorithm={settings.algorithm!r} is not allowed with cse_routing='evidence', shared by all sites: "
            "it must be 'text' or 'given'."
        )


def check_warmup(schedule: FitSchedule, first: int, max_steps: int, begins: bool, averages: bool) -> None:
    """
    Whether a warm-up of known length ends where it may.

    Args:
        schedule: of the fits, resolved.
        first: the step of the first fit.
        max_steps: of training.
        begins: whether clusters are there, or can be found, before the first step.
        averages: whether there are averages of clusters, from a fit in this run.

    Raises:
        ValueError: it ends behind training or the last fit, or there is none where one is needed.
    """
    warmup = schedule.warmup
    if first >= max_steps:
        raise ValueError(
            f"warmup={warmup!r} is not allowed: it ends at step {first}, but training has only {max_steps} steps, so "
            "no expert would ever be switched on."
        )
    check_until(schedule, first, max_steps)
    if first == 0 and not begins:
        raise ValueError(
            "warmup=0 is not allowed for a model without clusters, except with cse_routing='evidence' or 'given', "
            "training data with a length, and no layer_budget: fit them first (fit_experts), or let the model train "
            "densely for a while."
        )
    if first == 0 and schedule.update == "ema" and not averages:
        raise ValueError("warmup=0 is not allowed with update='ema': averages start from a fit in this run.")


def check_until(schedule: FitSchedule, first: int, max_steps: int) -> None:
    """
    Whether the last fit may lie where it was asked for.

    Args:
        first: the step of the first fit, with `warmup="auto"` the latest that it may have.

    Raises:
        ValueError: it lies before the first.
    """
    until = schedule.recluster_until
    if until is not None and as_step(until, max_steps) < first:
        raise ValueError(
            f"recluster_until={until!r} is not allowed with warmup={schedule.warmup!r}: it is step "
            f"{as_step(until, max_steps)}, and must not lie before the first fit at step {first}"
            f"{', the latest' if schedule.warmup == 'auto' else ''}."
        )


def check_late(step: int, max_steps: int) -> None:
    """
    Whether a run that is resumed without clusters, behind its first fit, can make up for it.

    Raises:
        ValueError: nothing is left to train what a fit would change.
    """
    if step >= max_steps - 1:
        raise ValueError(
            f"max_steps={max_steps} is not allowed with a checkpoint of step {step} that has no clusters: no expert "
            "would ever be switched on, so it must be larger."
        )


def refuse_replicas(args: TrainingArguments) -> None:
    """
    Raises:
        ValueError: one process drives several GPUs. Replicas share the hooks of the model, so that the features of one
            of them would be all that a fit sees.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu={args.n_gpu} is not allowed: nn.DataParallel hides what all GPUs but one read from the fits, so "
            "it must be 1. Start a process for each GPU with torchrun or accelerate launch, or set "
            "CUDA_VISIBLE_DEVICES."
        )


def check_layer_budget(base: nn.Module, layer_budget: int | None) -> None:
    """
    Raises:
        ValueError: more layers are to get experts than have room for some.
    """
    layers = {site.layer for site in base.routed_modules()}
    if layer_budget is not None and layer_budget > len(layers):
        raise ValueError(
            f"layer_budget={layer_budget} is not allowed for a model with cse_layers={sorted(layers)}: it must be at "
            f"most {len(layers)}, or None for all."
        )


def check_model(
    base: nn.Module,
    settings: ClusterSettings,
    schedule: FitSchedule,
    sample_size: int,
    evidence_size: int | None = None,
) -> None:
    """
    Whether a training may keep the clusters of a model so.

    Args:
        base: a CSE base model.
        settings: resolved for its routing.
        schedule: of the fits.
        sample_size: sequences of a fit.
        evidence_size: sequences whose tokens are counted, if it was said.

    Raises:
        ValueError: a quantised base, more clusters than the routers or a sample hold, a projection to more dimensions
            than states have, or what does not go with the routing.
    """
    modules = list(base.routed_modules().values())
    for module in modules:
        module.check_base()
    most = min(module.router.max_clusters for module in modules)
    asked, routing = settings.cluster_range, base.config.cse_routing
    if asked is not None and asked[1] > most:
        raise ValueError(
            f"num_clusters={settings.num_clusters} is not allowed: the routers of this model hold at most "
            f"cse_max_clusters={most}."
        )
    check_sizes(sample_size, evidence_size, 1 if asked is None else asked[0])
    check_algorithm(base, settings)
    settings.projected_width(base.config.hidden_size)
    if schedule.moves and is_joint(base, settings):
        raise ValueError(
            f"update={schedule.update!r} is not allowed with algorithm={settings.algorithm!r} and "
            f"cse_routing={routing!r}: clusters of texts do not drift, so it must be 'recluster' or 'frozen'."
        )
    if evidence_size is not None and routing != "evidence":
        raise ValueError(
            f"evidence_size={evidence_size} is not allowed with cse_routing={routing!r}: only 'evidence' counts "
            "tokens, so it must be None."
        )
    if routing == "given" and schedule.update != "frozen":
        raise ValueError(
            f"update={schedule.update!r} is not allowed with cse_routing='given': labels stay, so it must be 'frozen'."
        )
