# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Collecting routing features from the forward passes of training itself: no second pass, no host synchronisation."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn

from ..clustering import FeatureStore, RoutingFeatures, sample_features
from ..dispatch_cse import Site
from ..routing_cse import SequenceScope


def routed_base_model(model: nn.Module) -> nn.Module:
    """The CSE base model inside a head, a wrapper, or itself.

    Raises:
        ValueError: the model is not of this family, or has no layer with experts.
    """
    base = next((module for module in model.modules() if hasattr(module, "routed_modules")), None)
    if base is None:
        raise ValueError(f"model={type(model).__name__} is not allowed: it must be a CSE GPT-2 or CSE BERT.")
    if not base.routed_modules():
        raise ValueError(f"{type(base).__name__} has no layer with experts: set cse_layers in its config.")
    return base


class FeatureCollector:
    """
    Forward hooks on the routers of a model, filling one bounded store a site.

    Args:
        model: a CSE model or head.
        capacity: sequences kept a site.
        tokens_per_sequence: tokens sampled of each, for the discriminant.
        training_only: record nothing while the model is in evaluation mode.
    """

    def __init__(self, model: nn.Module, capacity: int, tokens_per_sequence: int = 8, training_only: bool = True):
        self.base = routed_base_model(model)
        self.stores = {site: FeatureStore(capacity) for site in self.base.routed_modules()}
        self.tokens_per_sequence = tokens_per_sequence
        self.training_only = training_only
        self.enabled = False
        self._signature = inspect.signature(self.base.forward)
        self._waiting: set[Site] = set()
        self._sites: set[Site] = set(self.stores)
        self._scope = SequenceScope()
        self._labels: torch.Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, sites: Iterable[Site] | None = None) -> None:
        """Puts the hooks on, at all sites or those given; `detach` takes them off."""
        modules = self.base.routed_modules()
        self._sites = set(modules if sites is None else sites)
        self._hooks.append(self.base.register_forward_pre_hook(self._begin, with_kwargs=True))
        for site in self._sites:
            self._hooks.append(
                modules[site].router.register_forward_hook(
                    lambda router, args, out, site=site: self._record(site, args[0])
                )
            )

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Opens each layer for one record: with activation checkpointing a router runs twice in a step."""
        self._waiting = set()
        if not self.enabled or (self.training_only and not module.training):
            return
        arguments = self._signature.bind(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        self._scope = SequenceScope.of(arguments.get("attention_mask"), arguments.get("position_ids"))
        self._labels = arguments.get("given_clusters")
        self._waiting = set(self._sites)

    def _record(self, site: Site, states: torch.Tensor) -> None:
        if site not in self._waiting:
            return
        self._waiting.remove(site)
        store = self.stores[site]
        store.add(
            sample_features(states.detach(), self._scope, self.tokens_per_sequence, store.seen, self._labels)
        )

    def take(self) -> dict[Site, RoutingFeatures | None]:
        """What was collected, by site; the stores are empty afterwards."""
        taken = {site: store.all() for site, store in self.stores.items()}
        self.clear()
        return taken

    def clear(self) -> None:
        for store in self.stores.values():
            store.clear()
