# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Collecting routing features from the forward passes of training itself: no second pass, no host synchronisation.

A compiled forward pass must not depend on what is collected, or it would be compiled anew in every step. There the
hooks become two operators, which the compiler cannot look into and which find their collector by its number.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from ..clustering import FeatureStore, RoutingFeatures, sample_features
from ..dispatch_cse import Site
from ..scope_cse import SequenceScope
from ..sharding_cse import is_sharded
from .gathering import rank, world_size
from .reading import INPUTS


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


def refuse_adapters(model: nn.Module) -> None:
    """
    Clusters are not fitted under PEFT adapters: adapter files hold neither routers nor new experts, so that a fit
    would be lost when they are loaded, and an expert would start as a copy of the base without its adapter.

    Raises:
        ValueError: a module of the model is PEFT's.
    """
    names = sorted({type(part).__name__ for part in model.modules() if type(part).__module__.startswith("peft.")})
    if names:
        raise ValueError(
            f"model with PEFT's {names} is not allowed where clusters are fitted: adapter files hold no clusters, so "
            "that they would be lost. Fit first (ClusterExpertsCallback, fit_experts or from_dense), save the model, "
            "and then train adapters without the callback; or merge_and_unload() the adapters before."
        )


def refuse_parallel_plans(model: nn.Module) -> None:
    """
    Ranks that share a batch, as tensor parallelism has them, would be sampled as if each had a batch of its own; and
    experts that stand on one rank each cannot be started from a base that is spread otherwise.

    Raises:
        ValueError: the model was loaded with a tensor- or expert-parallel plan of transformers.
    """
    sizes = getattr(getattr(model, "config", None), "distributed_config", None)
    for name in ("tp_size", "ep_size"):
        size = getattr(sizes, name, None) or 1
        if size > 1:
            raise ValueError(
                f"{name}={size} is not allowed where clusters are fitted, so it must be 1: ranks that share a batch "
                "would be sampled as if they had different ones, and fits write whole experts. Train with DDP or "
                "FSDP2, save the model, and load it with distributed_config=... then."
            )


# What a forward pass of the base model is told, and the hooks are to know.
READ = ("attention_mask", "position_ids", "given_clusters", "input_ids")
TOKENS = 8
TEXTS = "texts"  # in a checkpoint, beside the names of the sites

_COLLECTORS: "WeakValueDictionary[int, FeatureCollector]" = WeakValueDictionary()
_numbers = count()


# `clock` is never read. To an operator that gives nothing back it is what keeps it in the graph, and in its place.
@torch.library.custom_op("modeling_cse::begin_collecting", mutates_args=("clock",))
def _begin_collecting(
    clock: torch.Tensor,
    collector: int,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    given_clusters: torch.Tensor | None,
    input_ids: torch.Tensor | None,
) -> None:
    if collector in _COLLECTORS:
        _COLLECTORS[collector].begin(attention_mask, position_ids, given_clusters, input_ids)


@torch.library.custom_op("modeling_cse::collect", mutates_args=("clock",))
def _collect(clock: torch.Tensor, collector: int, site: str, states: torch.Tensor) -> None:
    if collector in _COLLECTORS:
        _COLLECTORS[collector].collect(site, states)


class FeatureCollector:
    """
    Forward hooks on the routers of a model, filling one bounded store a site, and one of the texts, which are the same
    at every site.

    Args:
        model: a CSE model or head.
        capacity: sequences kept a site.
        tokens_per_sequence: tokens sampled of each, for the discriminant. Default: 8, or none with
            `cse_routing="evidence"`, which has no discriminant.
        training_only: record nothing while the model is in evaluation mode.
        with_ids: keep the token ids of the sequences too.
        separated: documents of a row that `cse_separator_token_id` parts are sequences of their own.
        texts: sequences whose ids are kept, `capacity` (the default) or more.
    """

    def __init__(
        self,
        model: nn.Module,
        capacity: int,
        tokens_per_sequence: int | None = None,
        training_only: bool = True,
        with_ids: bool = False,
        separated: bool = True,
        texts: int | None = None,
    ):
        self.base = routed_base_model(model)
        self.stores = {site: FeatureStore(capacity) for site in self.base.routed_modules()}
        self.texts = FeatureStore(capacity if texts is None else texts)
        if tokens_per_sequence is None:
            tokens_per_sequence = 0 if self.base.config.cse_routing == "evidence" else TOKENS
        self.tokens_per_sequence = tokens_per_sequence
        self.training_only = training_only
        self.with_ids = with_ids
        self.separated = separated
        self.enabled = False
        self._signature = inspect.signature(self.base.forward)
        self._sites: set[Site] = set()
        self._waiting: set[str] = set()
        self._scope = SequenceScope()
        self._labels: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._number = next(_numbers)
        _COLLECTORS[self._number] = self

    def attach(self, sites: Iterable[Site] | None = None) -> None:
        """Puts the hooks on if they are not yet, and records from all sites or those given; `detach` ends it."""
        modules = self.base.routed_modules()
        self._sites = set(modules if sites is None else sites)
        if self._hooks:
            return
        self._clock = torch.zeros((), device=next(self.base.parameters()).device)
        self._hooks.append(self.base.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for site, module in modules.items():
            self._hooks.append(module.router.register_forward_hook(self._after_routing(str(site))))

    def detach(self) -> None:
        self._sites = set()  # what was compiled keeps its hooks
        while self._hooks:
            self._hooks.pop().remove()

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = self._signature.bind(*args, **kwargs).arguments
        arguments = {**arguments, **arguments.get("kwargs", {})}
        known = [arguments.get(name) for name in READ]
        if torch.compiler.is_compiling():
            _begin_collecting(self._clock, self._number, *known)
        else:
            self.begin(*known)

    def _after_routing(self, site: str) -> Callable:
        def hook(router, args, outputs):
            if torch.compiler.is_compiling():
                _collect(self._clock, self._number, site, args[0].detach())
            else:
                self.collect(site, args[0].detach())

        return hook

    def begin(self, attention_mask, position_ids, given_clusters, input_ids) -> None:
        """A forward pass of the base model begins. Each site is open for one record: with activation checkpointing a
        router runs twice in a step."""
        self._waiting = set()
        if not self.enabled or (self.training_only and not self.base.training):
            return
        separator = self.base.config.cse_separator_token_id if self.separated else None
        self._scope = SequenceScope.of(attention_mask, position_ids, input_ids, separator)
        soft = given_clusters is not None and given_clusters.is_floating_point()
        self._labels = given_clusters.argmax(-1) if soft else given_clusters
        if self.with_ids and input_ids is None:
            raise ValueError("inputs_embeds is not allowed where texts are clustered by their tokens: pass input_ids.")
        self._ids = input_ids if self.with_ids else None
        self._waiting = {str(site) for site in self._sites}

    def collect(self, site: str, states: torch.Tensor) -> None:
        """A router has seen states (B, T, d)."""
        if site not in self._waiting:
            return
        self._waiting.remove(site)
        store = self.stores[Site.parse(site)]
        # the number that these sequences would have in one process
        offset = store.seen * world_size() + rank() * len(states)
        known = self._scope, self.tokens_per_sequence, offset, self._labels, self._ids
        features = sample_features(states, *known)
        if self._ids is not None:
            self.texts.add(features.without_states())
            self._ids = None  # the first site of a forward pass speaks for all
        store.add(features.without_ids())

    def named_stores(self) -> dict[str, FeatureStore]:
        """All stores: those of the sites by their names, and that of the texts where ids are kept."""
        named = {str(site): store for site, store in self.stores.items()}
        return {**named, TEXTS: self.texts} if self.with_ids else named

    def take(self) -> dict[Site, RoutingFeatures | None]:
        """The states that were collected, by site; the stores are empty afterwards."""
        taken = {site: store.all() for site, store in self.stores.items()}
        self.clear()
        return taken

    def clear(self) -> None:
        for store in (*self.stores.values(), self.texts):
            store.clear()


@torch.no_grad()
def read_batches_of(
    collector: FeatureCollector, model: nn.Module, batches: Iterable[Mapping[str, Any]], sample_size: int | None
) -> None:
    """
    Fills a collector by forward passes in evaluation mode, until each of its stores has seen `sample_size` sequences.

    Args:
        collector: of the model, attached or not; it stays as it is.
        model: a CSE model or head; its mode is kept.
        batches: of this process, dicts of tensors. What a base model does not take is left out.
        sample_size: sequences; None reads all batches.
    """
    # FSDP gathers what lies outside of the blocks when the whole model is called
    spread = any(is_sharded(parameter) for parameter in model.parameters())
    asked, device, was_training = model if spread else collector.base, collector.base.device, model.training
    before = collector.enabled, collector.training_only
    model.eval()
    collector.enabled, collector.training_only = True, False
    try:
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name in INPUTS}
            # choices of a question, which the head makes rows of
            choices = "input_ids" in inputs and inputs["input_ids"].dim() > 2
            (model if choices else asked)(**inputs)
            if sample_size is not None and min(store.seen for store in collector.stores.values()) >= sample_size:
                break
    finally:
        collector.enabled, collector.training_only = before
        model.train(was_training)
