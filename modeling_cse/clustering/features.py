# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Routing features: what was sampled of the states that enter a module, and the bounded store that keeps them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from ..scope_cse import SequenceScope, sequence_means


DRIFT_DEGREE = 3


@dataclass
class RoutingFeatures:
    """
    A sample of N sequences, with m tokens of each.

    Fields:
        embeddings (N, d) fp32: mean state of a sequence, padding left out.
        tokens (N, m, d) fp32: states of single tokens, spread over the sequence; m may be 0.
        positions (N, m or 1) int64: where in its sequence each of them stood; -1 where a sequence had no token at all.
        labels (N,) int64: the cluster that came with the batch, -1 where none did.
        passes (N,) int64: the number of the forward pass in which each was seen. Processes count alike.
        ids (N, L) int32: the tokens of each sequence, -1 behind its end; L is 0 where they were not asked for.
    """

    embeddings: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    # None is for `__post_init__`, which puts the default there
    labels: torch.Tensor = None
    passes: torch.Tensor = None
    ids: torch.Tensor = None

    def __post_init__(self):
        if self.ids is None:
            self.ids = self.positions.new_zeros((len(self), 0), dtype=torch.int32)
        if self.labels is None:
            self.labels = self.positions.new_full((len(self),), -1)
        if self.passes is None:
            self.passes = self.positions.new_zeros(len(self))

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows) -> "RoutingFeatures":
        return self._each(lambda tensor: tensor[rows])

    def present(self) -> "RoutingFeatures":
        """Without sequences that had no token."""
        kept = self.positions[:, 0] >= 0
        return self if kept.all() else self[kept]

    def cpu(self) -> "RoutingFeatures":
        return self._each(torch.Tensor.cpu)

    def without_tokens(self) -> "RoutingFeatures":
        """For those who only look at embeddings: ranks have less to send each other. One position stays, for
        `present`."""
        return replace(self, tokens=self.tokens[:, :0], positions=self.positions[:, :1])

    def without_ids(self) -> "RoutingFeatures":
        """For those who only look at states."""
        return replace(self, ids=None)

    def without_states(self) -> "RoutingFeatures":
        """For those who only count tokens: nothing of the size of a state is kept."""
        nothing = self.embeddings.new_zeros((len(self), 0))
        first = self.positions[:, :1].clone()  # for `present`; a view would keep the rest in memory
        return replace(self, embeddings=nothing, tokens=nothing.unsqueeze(1)[:, :0], positions=first)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "RoutingFeatures":
        return RoutingFeatures(**{name: change(tensor) for name, tensor in vars(self).items()})

    def detrended(self, labels: np.ndarray | None = None) -> "RoutingFeatures":
        """
        The same sample as if all of it had been taken at its end.

        States drift while a model trains, early on by more than texts differ, and clusters of a sample taken over many
        steps would be clusters of time. The mean state is followed by a cubic in the order of the sequences (four
        numbers a dimension, far too few to follow the texts), and every state is moved along it to the end of the
        sample. That asks for shuffled data: a corpus sorted by domain drifts because of its domains.

        Args:
            labels: (N,) int64, the cluster of each sequence if known, -1 for none. The cubic is then fitted beside one
                mean a cluster: otherwise the texts that happened to come last count as drift, and small samples are
                shifted by up to a quarter of the distance between domains (benchmarks/cluster_quality.py).
        """
        if len(self) < 2 * DRIFT_DEGREE:
            return self
        time = torch.linspace(-1.0, 1.0, len(self), dtype=torch.float64)
        powers = torch.stack([time**power for power in range(1, DRIFT_DEGREE + 1)], dim=1)
        if labels is None:
            groups = torch.zeros(len(self), dtype=torch.int64)
        else:
            groups = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
        means = F.one_hot(groups).double()
        basis = torch.cat([powers, means], dim=1)
        fitted = torch.linalg.lstsq(basis, self.embeddings.double(), driver="gelsd").solution
        drift = powers @ fitted[:DRIFT_DEGREE]
        shift = (drift[-1] - drift).float()
        return replace(self, embeddings=self.embeddings + shift, tokens=self.tokens + shift.unsqueeze(1))

    @classmethod
    def concatenate(cls, parts: list["RoutingFeatures"]) -> "RoutingFeatures":
        longest = max(part.ids.shape[1] for part in parts)
        parts = [replace(part, ids=F.pad(part.ids, (0, longest - part.ids.shape[1]), value=-1)) for part in parts]
        return cls(**{name: torch.cat([vars(part)[name] for part in parts]) for name in vars(parts[0])})


@torch.no_grad()
def sample_features(
    states: torch.Tensor,
    scope: SequenceScope,
    tokens_per_sequence: int,
    offset: int,
    labels: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
) -> RoutingFeatures:
    """
    Features of one batch. Nothing is read on the host, unless rows hold several documents, which must be counted.

    Args:
        states: (B, T, d) states that enter a module, any float dtype.
        scope: padding and documents of the batch.
        tokens_per_sequence: m. Each of m equal parts of a sequence gives one token; 0: means alone are kept.
        offset: sequences sampled before. It shifts the place within the part from sequence to sequence, evenly and
            without a random number, so that all positions are met.
        labels: (B,) or (B, T) clusters that came with the batch; a sequence has that of its first token.
        input_ids: (B, T) the tokens, where they are to be kept too.
    """
    means, counts, index = sequence_means(states, scope)
    if scope.segments is None:
        kept = torch.arange(len(means), device=states.device)
    else:
        kept = (counts > 0).nonzero().squeeze(-1)
    # tokens in the order of their sequences, padding behind all of them
    order = torch.arange(index.numel(), device=states.device)
    if scope.mask is not None:
        order = torch.where(scope.mask, index, len(counts)).flatten().argsort(stable=True)
    starts = (counts.cumsum(0) - counts)[kept].long()
    golden = 0.6180339887498949
    shift = ((torch.arange(len(kept), device=states.device, dtype=torch.float64) + offset) * golden) % 1.0
    looked_at = max(tokens_per_sequence, 1)  # one position stays, for `present`
    parts = torch.arange(looked_at, device=states.device, dtype=torch.float64)
    places = (parts + shift.unsqueeze(1)) / looked_at
    positions = (places * counts[kept].unsqueeze(1)).long()
    tokens = states.flatten(0, 1)[order[starts.unsqueeze(1) + positions[:, :tokens_per_sequence]]]
    positions = positions.masked_fill(counts[kept].unsqueeze(1) == 0, -1)
    if labels is None:
        given = positions.new_full((len(kept),), -1)
    else:
        given = labels.view(len(states), -1).expand(index.shape).flatten()[order[starts]].long()
    ids = None
    if input_ids is not None:
        places = torch.arange(states.shape[1], device=states.device)
        inside = places < counts[kept].unsqueeze(1)
        found = input_ids.flatten()[order[(starts.unsqueeze(1) + places).clamp(max=len(order) - 1)]]
        ids = torch.where(inside, found, -1).int()
    return RoutingFeatures(means[kept], tokens.float(), positions, given, ids=ids)


class FeatureStore:
    """Keeps the last `capacity` sequences that were added: memory does not grow with the corpus."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.parts: deque[RoutingFeatures] = deque()
        self.seen = 0
        self._held = 0  # in batches of one row thousands of parts would be counted in every step
        self._taken = 0
        self.passes = 0

    def __len__(self) -> int:
        return self._held

    def add(self, features: RoutingFeatures) -> None:
        """Takes what one forward pass gave."""
        self.seen += len(features)
        self._held += len(features)
        self.parts.append(replace(features, passes=torch.full_like(features.passes, self.passes)))
        self.passes += 1
        while self._held > self.capacity:
            oldest, surplus = self.parts.popleft(), self._held - self.capacity
            if surplus < len(oldest):
                self.parts.appendleft(oldest[surplus:])
            self._held -= min(surplus, len(oldest))

    def all(self) -> RoutingFeatures | None:
        """Everything kept that had a token, on the CPU, oldest first; None when empty."""
        kept = self.as_it_is()
        return None if kept is None else kept.present()

    def as_it_is(self) -> RoutingFeatures | None:
        """Everything kept, also what `present` leaves out: for a checkpoint, from which `restore` goes on the same."""
        return RoutingFeatures.concatenate([part.cpu() for part in self.parts]) if self.parts else None

    def newest(self) -> RoutingFeatures | None:
        """What was added since the last call, as far as it is still kept, on the CPU; None if nothing was."""
        fresh, self._taken = min(self.seen - self._taken, len(self)), self.seen
        parts: list[RoutingFeatures] = []
        while fresh > 0:
            part = self.parts[-1 - len(parts)]
            parts.append(part[-fresh:].cpu())
            fresh -= len(part)
        return RoutingFeatures.concatenate(parts[::-1]).present() if parts else None

    def clear(self) -> None:
        self.parts.clear()
        self._held, self._taken = 0, self.seen

    def restore(self, features: RoutingFeatures | None, seen: int, passes: int) -> None:
        """Takes up what a checkpoint holds: `as_it_is`."""
        self.parts = deque() if features is None else deque([features])
        self._held = 0 if features is None else len(features)
        self.seen = self._taken = seen
        self.passes = passes
