# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What clustering remembers from one fit to the next, and how it lies in a checkpoint: safetensors, no pickle."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..clustering import Discriminant, FeatureStore, Identities, RoutingFeatures
from ..dispatch_cse import Site
from .gathering import world_size


def file_name(rank: int) -> str:
    """Name of a rank's file inside a checkpoint folder."""
    return f"cluster_state_rank{rank}.safetensors"


@dataclass
class ClusterMemory:
    """
    Fields:
        fits: fits so far.
        identities: by site, which clusters own which expert.
        discriminants: by site; kept where centroids move between fits.
        warmup: of an automatic warm-up (`AutomaticWarmup.state`).
    """

    fits: int = 0
    identities: dict[Site, Identities] = field(default_factory=dict)
    discriminants: dict[Site, Discriminant] = field(default_factory=dict)
    warmup: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything but the number of fits, as named tensors."""
        named = {f"warmup.{name}": tensor.contiguous() for name, tensor in self.warmup.items()}
        for kind, members in (("identities", self.identities), ("discriminants", self.discriminants)):
            for site, member in members.items():
                for name, array in vars(member).items():
                    named[f"{kind}.{site}.{name}"] = torch.from_numpy(array).contiguous()
        return named

    def load(self, named: dict[str, torch.Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.warmup = {name.removeprefix("warmup."): t for name, t in named.items() if name.startswith("warmup.")}
        for kind, member_class, members in (
            ("identities", Identities, self.identities),
            ("discriminants", Discriminant, self.discriminants),
        ):
            members.clear()
            for site in sorted({Site.parse(name.split(".")[1]) for name in named if name.startswith(kind)}):
                prefix = f"{kind}.{site}."
                fields = {n.removeprefix(prefix): t.numpy() for n, t in named.items() if n.startswith(prefix)}
                members[site] = member_class(**fields)


def save_state(folder: Path, rank: int, step: int, memory: ClusterMemory, stores: dict[Site, FeatureStore]) -> None:
    """Writes memory and collected features into a checkpoint folder, whole or not at all."""
    named = memory.tensors()
    seen = {}
    for site, store in stores.items():
        seen[str(site)] = store.seen
        features = store.as_it_is()
        if features is not None:
            named.update({f"features.{site}.{name}": tensor for name, tensor in vars(features).items()})
    metadata = {"step": str(step), "fits": str(memory.fits), "seen": json.dumps(seen), "processes": str(world_size())}
    target = folder / file_name(rank)
    partial = target.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in named.items()}, partial, metadata=metadata)
    os.replace(partial, target)


def load_state(folder: Path, rank: int, step: int, memory: ClusterMemory, stores: dict[Site, FeatureStore]) -> None:
    """
    Reads what `save_state` wrote.

    Raises:
        ValueError: the file is cut short, or belongs to another step or number of processes.
    """
    path = folder / file_name(rank)
    try:
        with safe_open(path, framework="pt") as file:
            metadata, named = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has no error class of its own for a broken file
        raise ValueError(f"{path} cannot be read, so the run cannot go on exactly from there: {error}") from error
    sites = set(json.loads((metadata or {}).get("seen", "{}")))
    if sites != {str(site) for site in stores}:
        raise ValueError(f"{path} is not the clustering state of this model: its experts are at {sorted(sites)}.")
    if int(metadata["step"]) != step:
        raise ValueError(f"{path} was written at step {metadata['step']}, but the checkpoint is of step {step}.")
    processes = int(metadata.get("processes", world_size()))
    if processes != world_size():
        raise ValueError(
            f"{path} was written by a run of {processes} processes, and each holds a part of the sample for the next "
            f"fit: a run of {world_size()} cannot go on exactly from there. Resume with {processes}, or start a new "
            "run from the checkpoint's model (from_pretrained, warmup=0)."
        )
    memory.fits = int(metadata["fits"])
    memory.load(named)
    seen = json.loads(metadata["seen"])
    for site, store in stores.items():
        prefix = f"features.{site}."
        fields = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
        store.restore(RoutingFeatures(**fields) if fields else None, seen[str(site)])
