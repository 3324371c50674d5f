# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a trained model makes of held-out blocks: the loss of every token, and where it went."""

from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import default_data_collator


@dataclass
class Losses:
    """
    Fields:
        domains: (N,) str, of the blocks.
        nll: (N, T - 1) float32, nats of each predicted token (GPT-2), or (N, T) with 0 where nothing is predicted.
        predicted: like `nll`, bool.
        experts: site to (N, T) int16, -1 for the base; empty for models without routers.
        clusters: likewise, the clusters.
    """

    domains: np.ndarray
    nll: np.ndarray
    predicted: np.ndarray
    experts: dict[str, np.ndarray]
    clusters: dict[str, np.ndarray]

    def perplexity(self, domain: str) -> float:
        """exp of the token-mean loss of a domain."""
        rows = self.domains == domain
        return float(np.exp(self.nll[rows].sum(dtype=np.float64) / self.predicted[rows].sum()))


@torch.no_grad()
def measure(model: nn.Module, blocks: Dataset, causal: bool, bf16: bool = False, batch_size: int = 16) -> Losses:
    """Losses and routes of every token of `blocks` (columns `input_ids`, `domain`, others that the model takes; with
    `labels` for a masked model); `bf16`: under autocast."""
    model.eval()
    routed = hasattr(model.base_model, "routed_modules") and model.base_model.routed_modules()
    nll, predicted, clusters = [], [], []
    columns = [name for name in blocks.column_names if name != "domain"]
    for batch in DataLoader(blocks.select_columns(columns), batch_size, collate_fn=default_data_collator):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        labels = batch.pop("labels", batch["input_ids"]).long()
        extra = {"output_cluster_ids": True} if routed else {}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            output = model(**batch, **extra)
        logits = output.logits
        if causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        nll.append(torch.stack([_losses(*row) for row in zip(logits, labels, strict=True)]).cpu().numpy())
        predicted.append((labels != -100).cpu().numpy())
        if routed:
            clusters.append([ids.cpu().numpy().astype(np.int16) for ids in output.cluster_ids])
    clusters_by_site, experts = {}, {}
    for place, (site, module) in enumerate(routed.items() if routed else ()):
        ids = np.concatenate([batch[place] for batch in clusters])
        owners = np.append(module.router.cluster_expert.cpu().numpy(), -1)  # cluster -1 is the base's
        clusters_by_site[str(site)], experts[str(site)] = ids, owners[ids].astype(np.int16)
    domains = np.asarray(blocks["domain"])
    return Losses(domains, np.concatenate(nll), np.concatenate(predicted), experts, clusters_by_site)


def _losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(T,) nats. Of one block at a time: logits of all would leave the cache of a CPU, at nine times the cost."""
    return functional.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="none")


def summary(losses: Losses) -> dict:
    """Perplexity, share of tokens with an expert and the most frequent expert's share, by domain."""
    domains = sorted(set(losses.domains.tolist()))
    routed = {
        site: {
            domain: {
                "routed": float((experts[losses.domains == domain] >= 0).mean()),
                "by_expert": {
                    int(expert): round(float((experts[losses.domains == domain] == expert).mean()), 4)
                    for expert in np.unique(experts)
                },
            }
            for domain in domains
        }
        for site, experts in losses.experts.items()
    }
    return {"perplexity": {domain: losses.perplexity(domain) for domain in domains}, "routing": routed}
