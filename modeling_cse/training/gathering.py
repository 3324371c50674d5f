# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""More than one process: features of all ranks go to every rank, one rank fits, and all get its result."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ..clustering import RoutingFeatures
from ..dispatch_cse import Site


T = TypeVar("T")


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_objects(own: T) -> list[T]:
    """One object of each rank, in the order of ranks, on every rank."""
    if not is_distributed():
        return [own]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def gather_features(
    features: dict[Site, RoutingFeatures | None], newest: int | None = None
) -> dict[Site, RoutingFeatures | None]:
    """
    Joins the features of all ranks, in the order in which one process with the same global batch would have taken
    them: by forward pass, and within one by rank. What is fitted must not depend on how many processes there are.

    Args:
        features: of this rank, oldest first. A rank may have none.
        newest: keep so many of the last, over all ranks. None: all.

    Returns:
        Those of them that had a token; None where there is none.
    """
    everyone = gather_objects(features)
    return {site: _joined([own[site] for own in everyone], newest) for site in features}


def gather_texts(texts: RoutingFeatures | None, newest: int | None = None) -> RoutingFeatures | None:
    """As `gather_features`, of what is kept once for all sites."""
    return _joined(gather_objects(texts), newest)


def _joined(parts: list[RoutingFeatures | None], newest: int | None) -> RoutingFeatures | None:
    found = [part for part in parts if part is not None and len(part)]
    if not found:
        return None
    whole = RoutingFeatures.concatenate(found)
    # the capacity of a store counts sequences without a token too
    kept = whole[whole.passes.argsort(stable=True)[-(newest or 0) :]].present()
    return kept if len(kept) else None


def on_first_rank(compute: Callable[[], T]) -> T:
    """Runs `compute` on rank 0 and gives its result to every rank; an error there is raised on every rank, so that
    none waits for the others."""
    if not is_distributed():
        return compute()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = compute()
        except Exception as error:  # noqa: BLE001 - passed on, not hidden
            outcome[1] = error
    # not accelerate's: it does nothing before an Accelerator or a Trainer exists
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def local_capacity(sample_size: int, batch_size: int = 1) -> int:
    """Sequences that each rank keeps, so that the last `sample_size` of all ranks are among them where every rank
    adds `batch_size` at a time."""
    return -(-sample_size // dist.get_world_size()) + batch_size - 1 if is_distributed() else sample_size


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


__all__ = [
    "gather_features",
    "gather_objects",
    "gather_texts",
    "is_distributed",
    "local_capacity",
    "on_first_rank",
    "rank",
    "world_size",
]
