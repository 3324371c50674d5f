# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What clustering remembers from one fit to the next, and how it lies in a checkpoint: safetensors, no pickle."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..clustering import Discriminant, FeatureStore, Identities, RoutingFeatures
from ..dispatch_cse import Site
from .collecting import TEXTS
from .gathering import world_size


# Of the file's form; others cannot be read, but for that of release 0.1.0.
VERSION = 2
FIRST_RELEASE = 1


def file_name(rank: int) -> str:
    """Name of a rank's file inside a checkpoint folder."""
    return f"cluster_state_rank{rank}.safetensors"


@dataclass
class ClusterMemory:
    """
    Fields:
        fits: fits so far.
        at_once: whether training began with clusters.
        made_up: the step at which a run that was resumed without clusters makes up for its first fit (`FitPlan`).
        identities: by site, which clusters own which expert.
        discriminants: by site; kept where centroids move between fits.
        texts: which clusters of texts own which expert, where all sites share them (`fit_texts`).
        warmup: of an automatic warm-up (`AutomaticWarmup.state`).
    """

    fits: int = 0
    at_once: bool = False
    made_up: int | None = None
    identities: dict[Site, Identities] = field(default_factory=dict)
    discriminants: dict[Site, Discriminant] = field(default_factory=dict)
    texts: Identities | None = None
    warmup: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that is not a single number, as named tensors."""
        named = {f"warmup.{name}": tensor.contiguous() for name, tensor in self.warmup.items()}
        for kind, members in (("identities", self.identities), ("discriminants", self.discriminants)):
            for site, member in members.items():
                for name, array in vars(member).items():
                    named[f"{kind}.{site}.{name}"] = torch.from_numpy(array).contiguous()
        if self.texts is not None:
            for name, array in vars(self.texts).items():
                named[f"texts.{name}"] = torch.from_numpy(array).contiguous()
        return named

    def load(self, named: dict[str, torch.Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.warmup = {name.removeprefix("warmup."): t for name, t in named.items() if name.startswith("warmup.")}
        texts = {name.removeprefix("texts."): t.numpy() for name, t in named.items() if name.startswith("texts.")}
        self.texts = Identities(**texts) if texts else None
        kinds: list[tuple[str, type, dict[Site, Any]]] = [
            ("identities", Identities, self.identities),
            ("discriminants", Discriminant, self.discriminants),
        ]
        for kind, member_class, members in kinds:
            members.clear()
            for site in sorted({Site.parse(name.split(".")[1]) for name in named if name.startswith(kind)}):
                prefix = f"{kind}.{site}."
                fields = {n.removeprefix(prefix): t.numpy() for n, t in named.items() if n.startswith(prefix)}
                members[site] = member_class(**fields)


def save_state(
    folder: Path, rank: int, step: int, memory: ClusterMemory, stores: dict[str, FeatureStore], base: nn.Module
) -> None:
    """Writes memory and collected features (`FeatureCollector.named_stores`) into a checkpoint folder, whole or not at
    all, with a checksum, and one of the routing state that the model's own file holds."""
    named = memory.tensors()
    for store_name, store in stores.items():
        features = store.as_it_is()
        if features is not None:
            named.update({f"features.{store_name}.{name}": tensor for name, tensor in vars(features).items()})
    named = {name: tensor.contiguous() for name, tensor in named.items()}
    metadata = {
        "version": str(VERSION),
        "step": str(step),
        "ranks": str(world_size()),
        "fits": str(memory.fits),
        "at_once": json.dumps(memory.at_once),
        "made_up": json.dumps(memory.made_up),
        "seen": json.dumps({name: store.seen for name, store in stores.items()}),
        "passes": json.dumps({name: store.passes for name, store in stores.items()}),
        "shapes": json.dumps(_shapes(base)),
        "routers": _digest(_routing_state(base), {}),
    }
    metadata["sha256"] = _digest(named, metadata)
    replace_whole(folder / file_name(rank), lambda path: save_file(named, path, metadata=metadata))


def load_state(
    folder: Path, rank: int, step: int, memory: ClusterMemory, stores: dict[str, FeatureStore], base: nn.Module
) -> None:
    """
    Reads what `save_state` wrote. Nothing is taken up unless all of it is right.

    Raises:
        ValueError: the file is cut short or was edited, belongs to another step, model or number of processes; it has
            no texts where they are to be clustered; or the model's routing state is not the one that was saved with
            it. The message names the file.
    """
    path = folder / file_name(rank)
    metadata = read_metadata(path)
    if json.loads(metadata["shapes"]) != _shapes(base):
        raise ValueError(
            f"{path} is not the clustering state of this model: its experts are {metadata['shapes']} (hidden size, "
            f"clusters, experts by layer and module), those of the model {json.dumps(_shapes(base))}."
        )
    if int(metadata["step"]) != step:
        raise ValueError(f"{path} was written at step {metadata['step']}, but the checkpoint is of step {step}.")
    if int(metadata["ranks"]) != world_size():
        raise ValueError(
            f"{path} was written by a run of {metadata['ranks']} processes, and each holds a part of the sample for "
            f"the next fit: a run of {world_size()} cannot go on exactly from there. Resume with {metadata['ranks']}, "
            "or start a new run from the checkpoint's model (from_pretrained, warmup=0)."
        )
    if metadata["routers"] != _digest(_routing_state(base), {}):
        raise ValueError(
            f"the routing state in the weights of {str(folder)!r} is not the one that was saved with {path.name}: "
            "the file of the weights was cut or edited, or comes from elsewhere."
        )
    named = load_file(path)
    seen, passes = json.loads(metadata["seen"]), json.loads(metadata["passes"])
    kept = {name: _features_of(named, f"features.{name}.") for name in seen}
    if metadata["version"] == str(FIRST_RELEASE):
        spoke = _texts_apart(kept, named, base.config.cse_routing == "evidence")
        if spoke is not None:
            seen[TEXTS], passes[TEXTS] = seen[spoke], passes[spoke]
    if TEXTS in stores and TEXTS not in seen:
        raise ValueError(
            f"{path} is of a run that clustered hidden states, and holds no texts: algorithm='text' cannot go on from "
            "there. Resume with the algorithm of that run, or start a new one from the checkpoint's model "
            "(from_pretrained, warmup=0)."
        )
    memory.fits = int(metadata["fits"])
    memory.at_once = json.loads(metadata.get("at_once", "false"))  # the first release did not say
    memory.made_up = json.loads(metadata.get("made_up", "null"))  # nor this
    memory.load(named)
    for name, store in stores.items():
        store.restore(kept[name], seen[name], passes[name])


def _features_of(named: dict[str, torch.Tensor], prefix: str) -> RoutingFeatures | None:
    fields = {name.removeprefix(prefix): tensor for name, tensor in named.items() if name.startswith(prefix)}
    return RoutingFeatures(**fields) if fields else None


def _texts_apart(
    kept: dict[str, RoutingFeatures | None], named: dict[str, torch.Tensor], by_evidence: bool
) -> str | None:
    """
    Brings what a file of the first release holds into today's form, in place: there each site had the texts, those
    before the sample too, and states of single tokens whatever read the routes.

    Returns:
        The site whose texts were taken; None where ids were not kept.
    """
    spoke = next((name for name, features in kept.items() if features is not None and features.ids.shape[1]), None)
    if spoke is not None:
        texts = [_features_of(named, f"older.{spoke}."), cast(RoutingFeatures, kept[spoke]).without_states()]
        kept[TEXTS] = RoutingFeatures.concatenate([part for part in texts if part is not None])
    for name, features in kept.items():
        if features is not None and name != TEXTS:
            kept[name] = (features.without_tokens() if by_evidence else features).without_ids()
    return spoke


def read_metadata(path: Path) -> dict[str, str]:
    """
    What a file of `save_state` says of itself, once all of it is known to be as it was written.

    Raises:
        ValueError: it cannot be read, is of another version, or its contents do not have its checksum.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata, named = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # safetensors has no error class of its own for a broken file
        raise ValueError(f"{path} cannot be read, so the run cannot go on exactly from there: {error}") from error
    if metadata.get("version") not in (str(FIRST_RELEASE), str(VERSION)):
        raise ValueError(
            f"{path} is clustering state of version {metadata.get('version')!r}; this release of modeling_cse reads "
            f"versions {str(FIRST_RELEASE)!r} and {str(VERSION)!r}."
        )
    if metadata.pop("sha256", None) != _digest(named, metadata):
        raise ValueError(f"{path} was changed after it was written: its contents do not have its checksum.")
    return metadata


def replace_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Puts a file in its place whole or not at all, also through a kill or a loss of power: `write` is given another
    name, which is renamed when all of it is on the disk."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # elsewhere folders cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(named: dict[str, torch.Tensor], metadata: dict[str, str]) -> str:
    """SHA-256 of tensors and what is said beside them."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def _shapes(base: nn.Module) -> dict[str, list[int]]:
    """Hidden size, clusters and experts of each site."""
    return {
        str(site): [module.router.hidden_size, module.router.max_clusters, module.num_experts]
        for site, module in base.routed_modules().items()
    }


def _routing_state(base: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of all routers, by name."""
    routers = {str(site): module.router for site, module in base.routed_modules().items()}
    if hasattr(base, "evidence_router"):
        routers["evidence_router"] = base.evidence_router
    return {f"{place}.{name}": value for place, router in routers.items() for name, value in router.named_buffers()}
