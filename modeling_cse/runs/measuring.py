# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a comparison measures of one seed: numbers of single sequences (`measured.safetensors`), and what is to be told
of the clusters (`measured.json`)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.numpy import load_file, save_file
from sklearn.metrics import silhouette_samples
from torch.utils.data import DataLoader
from transformers import default_data_collator

from ..analysis import LEAST_SEQUENCES, passage, read_metrics, top_terms, typical_rows
from ..clustering.evidence import separation
from ..evaluation import SequenceClusters, sequence_clusters, sequence_losses
from ..training.memory import replace_whole
from .folder import training_seconds
from .pretraining import RUNS, Pretraining


# Training sequences by which clusters are described; drawn at random.
SAMPLE = 1024


def measure(run: Pretraining, folder: Path) -> None:
    """
    Measures both models of a finished run, and writes `measured.safetensors` and then `measured.json` into its folder.

    The arrays: of the held-out sequences, in the order of the domains' names, `domains`, `tokens`, `dense` and `cse`
    (summed losses in nats), `clusters`, `agreement`; of a sample of the training sequences `sample_domains`,
    `sample_clusters`, `sample_embeddings`; and the `centroids` and `experts` of the clusters.
    """
    models = {name: run.family.model_class.from_pretrained(folder / name).eval() for name in RUNS}
    held_out = concatenate_datasets(list(run.validation.values()))
    domains = [domain for domain, blocks in run.validation.items() for _ in range(len(blocks))]
    losses = {name: sequence_losses(model, _batches(run, held_out), shift=True) for name, model in models.items()}
    own = sequence_clusters(models["cse"], _batches(run, held_out))
    drawn = np.sort(np.random.default_rng(0).permutation(len(run.training))[:SAMPLE])
    sample = run.training.select(drawn)
    found = sequence_clusters(models["cse"], _batches(run, sample))
    known = run.training_domains
    arrays = {
        "tokens": losses["cse"][1],
        **{name: nll for name, (nll, _) in losses.items()},
        "clusters": own.clusters,
        "agreement": own.agreement,
        "sample_clusters": found.clusters,
        "sample_embeddings": found.embeddings,
        "centroids": found.centroids,
        "experts": found.experts,
    }
    facts = {
        "kind": _kind(models["cse"]),
        "domains": domains,
        "sample_domains": ["all"] * len(drawn) if known is None else [known[row] for row in drawn],
        "clusters": _describe(run, sample, found, _clarities(models["cse"], found, own)),
        "posterior_gate": models["cse"].config.gate == "posterior",
        "parameters": {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()},
        "active_parameters": _active(models["cse"]),
        "evidence": _evidence(models["cse"]),
        **_logged(folder),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    replace_whole(folder / "measured.safetensors", lambda path: save_file(arrays, path))
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    replace_whole(folder / "measured.json", lambda path: path.write_text(text, encoding="utf-8", errors="replace"))


def read_measured(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays, among them the names of the domains, and the facts that `measure` has written into a folder."""
    facts = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    names = {name: np.asarray(facts[name]) for name in ("domains", "sample_domains")}
    return {**load_file(folder / "measured.safetensors"), **names}, facts


def _batches(run: Pretraining, blocks: Dataset) -> Iterable[dict[str, torch.Tensor]]:
    return DataLoader(blocks, run.args.per_device_eval_batch_size, collate_fn=default_data_collator)


def _kind(model: torch.nn.Module) -> str:
    """Of the clusters, a key of `CLARITY`."""
    return "evidence" if model.config.cse_routing == "evidence" else "states"


def _clarities(model: torch.nn.Module, sample: SequenceClusters, held_out: SequenceClusters) -> list[float | None]:
    """How clear each cluster is: its separation on held-out sequences, at least `LEAST_SEQUENCES`, or the mean
    silhouette of its members in the sample, -1 to 1. None where it has too few, or none."""
    count = len(sample.experts)
    if _kind(model) == "evidence":
        known = sample.ids, sample.clusters, held_out.ids, held_out.clusters
        found = separation(*known, count, model.config.vocab_size)
        # of few sequences the clearest of several clusters is the luckiest
        found[np.bincount(held_out.clusters, minlength=count) < LEAST_SEQUENCES] = np.nan
    else:
        found = np.full(count, np.nan)
        members = np.unique(sample.clusters)
        if 1 < len(members) < len(sample.clusters):
            silhouettes = silhouette_samples(sample.embeddings, sample.clusters)
            found[members] = [silhouettes[sample.clusters == label].mean() for label in members]
    return [None if np.isnan(value) else float(value) for value in found]


def _describe(
    run: Pretraining, sample: Dataset, found: SequenceClusters, clarities: list[float | None]
) -> list[dict[str, Any]]:
    """Share, expert, clarity, agreement, words and typical sequences of each cluster."""
    texts = [run.tokenizer.decode(ids, skip_special_tokens=True) for ids in sample["input_ids"]]
    count = len(found.experts)
    terms = top_terms(texts, found.clusters, count)
    typical = typical_rows(found.distances, found.clusters)
    described = []
    for label in range(count):
        members = found.clusters == label
        described.append(
            {
                "share": float(members.mean()),
                "expert": int(found.experts[label]),
                "clarity": clarities[label],
                "agreement": float(found.agreement[members].mean()) if members.any() else None,
                "terms": terms[label],
                "typical": [passage(texts[row]) for row in typical[label]],
            }
        )
    return described


def _active(model: torch.nn.Module) -> int:
    """Parameters that work for one routed token: with "replace" the expert in place of the base, with "add" both."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for module in model.base_model.routed_modules().values():
        experts = sum(parameter.numel() for parameter in module.experts.parameters())
        total -= experts
        total += experts // module.num_experts if model.config.cse_combine == "add" else 0
    return total


def _evidence(model: torch.nn.Module) -> list[int] | None:
    """Rows and columns of the table of evidence, which is no parameter; None without one."""
    return list(model.base_model.evidence_router.shape) if _kind(model) == "evidence" else None


def _logged(folder: Path) -> dict[str, Any]:
    """What the runs logged: seconds of training, and the last fit of the last routed module."""
    seconds = {name: training_seconds(folder, name) for name in RUNS}
    entries = read_metrics(folder / "cse" / "metrics.jsonl")
    last = next(entry for entry in reversed(entries) if any(key.endswith("/clusters") for key in entry))
    site = sorted({key.rpartition("/")[0] for key in last if key.endswith("/clusters")}, key=_layer)[-1]
    fit = {key.removeprefix(f"{site}/"): value for key, value in last.items() if key.startswith(f"{site}/")}
    return {"seconds": seconds, "site": site.removeprefix("cse/"), "fit": {"step": last["step"], **fit}}


def _layer(site: str) -> tuple[int, str]:
    """cse/layer_3/ffn: its place in the model."""
    _, layer, module = site.split("/")
    return int(layer.removeprefix("layer_")), module
