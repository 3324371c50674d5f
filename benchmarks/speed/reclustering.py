# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What one fit costs, beside the training steps between two fits."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils.benchmark import timer

from modeling_cse import ClusterExpertsCallback
from modeling_cse.clustering import RoutingFeatures
from modeling_cse.training.fitting import fit_layers
from modeling_cse.training.memory import ClusterMemory

from .contenders import EVIDENCE, Contender
from .interleaving import WARMUP
from .measures import Options, record


DOMAIN_SHARES = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)
RANK = 32
EVERY = 500
TOKENS_PER_SEQUENCE = 8  # the default of `FeatureCollector`


def reservoir(sequences: int, width: int, seed: int = 0) -> RoutingFeatures:
    """
    Features as a run collects them: sequences of six domains that overlap, in 32 directions of the hidden space,
    around a common state; tokens spread about their sequence; and drift from the first to the last.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    domains = torch.multinomial(torch.tensor(DOMAIN_SHARES), sequences, replacement=True, generator=generator)
    directions = normal(RANK, width) / width**0.5
    latent = normal(len(DOMAIN_SHARES), RANK)[domains] + normal(sequences, RANK)
    drift = torch.linspace(-1.0, 1.0, sequences).unsqueeze(1) * normal(width) / width**0.5
    embeddings = latent @ directions + drift + normal(width) + 0.1 * normal(sequences, width) / width**0.5
    spread = normal(sequences, TOKENS_PER_SEQUENCE, RANK) @ directions
    tokens = embeddings.unsqueeze(1) + spread + normal(sequences, TOKENS_PER_SEQUENCE, width) / width**0.5
    positions = torch.arange(TOKENS_PER_SEQUENCE).mul(64).expand(sequences, -1)
    return RoutingFeatures(embeddings, tokens, positions)


def texts(sequences: int, length: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """Tokens (sequences, length) int32 of the six domains, each with frequencies of its own."""
    generator = torch.Generator().manual_seed(seed)
    domains = torch.multinomial(torch.tensor(DOMAIN_SHARES), sequences, replacement=True, generator=generator)
    common = -torch.arange(1, vocab + 1).log()
    frequencies = (common + torch.randn(len(DOMAIN_SHARES), vocab, generator=generator)).exp()
    return torch.multinomial(frequencies[domains], length, replacement=True, generator=generator).int()


def reclustering(
    contenders: list[Contender], options: Options, steps: dict[tuple[str, int], float], sequences: int | None = None
) -> Iterator[dict]:
    """
    Seconds of one fit of all layers as the callback calls it, with its defaults, on a full reservoir; not the first
    one, so that clusters are matched too. Its share of training is that of a fit every 500 steps. Fits always run on
    the CPU.

    Args:
        steps: seconds of a training step by contender and batch; each gives a share of training time.
        sequences: size of the reservoir, default: the callback's.
    """
    callback = ClusterExpertsCallback()
    sequences = sequences or callback.sample_size
    for contender in contenders:
        if not contender.name.startswith("cse_"):
            continue
        base, taken = contender.model.base_model, ClusterMemory()
        features = {
            site: reservoir(sequences, module.router.hidden_size, site.layer)
            for site, module in base.routed_modules().items()
        }
        sampled = None
        if contender.name == EVIDENCE:
            ids = texts(sequences, options.length, contender.model.config.vocab_size)
            features = {site: sample.without_tokens() for site, sample in features.items()}
            sampled = replace(next(iter(features.values())).without_states(), ids=ids)
        seconds = []
        for number in range(-WARMUP, options.rounds):
            start = timer()
            fit_layers(base, features, callback.settings, taken, drifting=True, texts=sampled)
            if number >= 0:
                seconds.append(timer() - start)
        result = record(contender.name, None, seconds, None, sequences=sequences, recluster_every=EVERY)
        result["details"]["share_of_training"] = {
            str(batch): result["seconds"] / (result["seconds"] + EVERY * step)
            for (name, batch), step in steps.items()
            if name == contender.name
        }
        yield result


__all__ = ["reclustering", "reservoir"]
