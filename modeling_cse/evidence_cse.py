# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Routes by evidence: what the tokens read so far say about the cluster of their text.

Every token of the vocabulary carries a log-likelihood ratio for each cluster (naive Bayes over unigrams). They are
added up over the tokens of a text up to and including each one, discounted by their number, and the log share of the
cluster is added: the log-posterior of the text's cluster. It depends on the text alone: not on how far the model is
trained, nor on the layer. Shapes are named in routing_cse.py; V is the size of the vocabulary.
"""

import torch
import torch.nn.functional as F

from .routing_cse import RoutingState, known_ends
from .scope_cse import SequenceScope


# Evidence is a multiple of this many nats and within these bounds. It is added up in whole steps, int32 has room for
# 262,143 tokens of a row, so that a route depends neither on padding nor on what else is packed into its row, nor on
# how a device sums.
STEP = 2.0**-10
LARGEST = 8.0
# So many tokens count as independent witnesses. Of more, all that were read count as if by the root of their number:
# a text repeats itself, and a plain sum would claim too much of long ones (docs/evidence/longtail-trials.md).
INDEPENDENT = 16


class EvidenceRouter(RoutingState):
    """
    One a model, for all of its sites. Nothing here is learned by gradient: clustering writes the buffers.

    Buffers (persistent, fp32):
        evidence (V, C): log p(token | cluster) - log p(token), in steps of 2 ** -10 nats.
        log_shares (C,): log share of each cluster, the lowest float for rows not in use.
    """

    evidence: torch.Tensor
    log_shares: torch.Tensor

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.causal = config.reads_left_to_right
        self.gate = config.gate
        self.shape = (config.vocab_size, config.max_clusters)
        self.register_state()

    def empty_state(self) -> dict[str, torch.Tensor]:
        """The buffers of a router that holds no cluster."""
        tokens, clusters = self.shape
        lowest = torch.finfo(torch.float32).min
        return {
            "evidence": torch.zeros(tokens, clusters, dtype=torch.float32),
            "log_shares": torch.full((clusters,), lowest, dtype=torch.float32),
        }

    @torch.no_grad()
    def flaw(self) -> str | None:
        """As `ClusterRouter.flaw`."""
        state = {name: value.cpu() for name, value in self.named_buffers() if not value.is_meta}
        if state.keys() != self._buffers.keys():
            return None
        broken = [name for name, value in state.items() if not value.isfinite().all()]
        if broken:
            return f"{broken[0]} is not finite"
        if state["evidence"].abs().max() > LARGEST:
            return f"evidence goes up to {float(state['evidence'].abs().max()):.3g}, above {LARGEST}"
        shares = state["log_shares"]
        unused = shares == torch.finfo(torch.float32).min
        if (shares > 0).any() or (unused[:-1] & ~unused[1:]).any():
            return f"log_shares are {shares.tolist()}: they must be 0 or less, unused rows last"
        return None

    @torch.no_grad()
    def write(self, evidence: torch.Tensor, shares: torch.Tensor) -> None:
        """
        Replaces the routing state.

        Args:
            evidence: (V, k) fp32 log-likelihood ratios in nats, k <= C; rounded and bounded here.
            shares: (k,) share of each cluster, above 0.

        Raises:
            ValueError: another vocabulary, more clusters than there is room for, or what is not finite.
        """
        tokens, room = self.evidence.shape
        if evidence.shape[0] != tokens or not 1 <= evidence.shape[1] <= room or shares.shape != evidence.shape[1:]:
            raise ValueError(
                f"evidence of shape {tuple(evidence.shape)} with shares of shape {tuple(shares.shape)} is not "
                f"allowed: it must be ({tokens}, k) and (k,), with 1 <= k <= cse_max_clusters={room}."
            )
        if not evidence.isfinite().all() or not (shares > 0).all():
            raise ValueError("evidence must be finite, and each of the shares above 0.")
        state = self.empty_state()
        bounded = evidence.float().clamp(-LARGEST, LARGEST)
        state["evidence"][:, : evidence.shape[1]] = (bounded / STEP).round() * STEP
        state["log_shares"][: len(shares)] = (shares.double().log() / STEP).round().float() * STEP
        for name, value in state.items():
            getattr(self, name).copy_(value)

    @torch.no_grad()
    def resize(self, tokens: int) -> None:
        """Follows a vocabulary of another size; new tokens carry no evidence."""
        rows = self.evidence[:tokens]
        self.evidence = F.pad(rows, (0, 0, 0, tokens - len(rows)))
        self.shape = tuple(self.evidence.shape)

    @torch.no_grad()
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None
    ) -> torch.Tensor:
        """
        Args:
            input_ids, attention_mask, position_ids: as in `scores`.

        Returns:
            By the tokens up to each one in a causal model, by all of its text otherwise, what `given_clusters` takes:
            the likeliest cluster (B, T) int64, -1 while there are none (`cse_gate="hard"`); or the probability of
            each cluster (B, T, C) fp32, all 0 while there are none (`"posterior"`).

        Raises:
            ValueError: the mask is of another shape.
        """
        scores = self.scores(input_ids, attention_mask, position_ids)
        in_use = self.log_shares > torch.finfo(torch.float32).min
        if self.gate == "posterior":
            return scores.softmax(-1) * in_use
        clusters = scores.argmax(-1)
        return torch.where(in_use[clusters], clusters, -1)

    @torch.no_grad()
    def scores(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        separated: bool = True,
    ) -> torch.Tensor:
        """
        Log posterior of each cluster up to a constant of the token, whatever the gate makes of it: (B, T, C) fp32, the
        lowest float for rows not in use. Padding adds nothing, so that the last column is that of a row's whole text,
        of the last one where a row has several.

        Args:
            input_ids: (B, T) whole texts, from their first token on.
            attention_mask: (B, T), 0 at padding, which says nothing.
            position_ids: (B, T) or (T,); where they start again, another text begins, as it does behind a
                `cse_separator_token_id`.
            separated: False reads a row as one text whatever separators it holds.

        Raises:
            ValueError: the mask is of another shape, or a token has no row of evidence.
        """
        self.check_precision()
        separator = self.config.cse_separator_token_id if separated else None
        scope = SequenceScope.of(attention_mask, position_ids, input_ids, separator)
        batch, length = input_ids.shape
        ends = known_ends(input_ids)
        if ends is not None and ends[1] >= len(self.evidence):
            raise ValueError(
                f"input_ids up to {ends[1]} are not allowed with evidence of {len(self.evidence)} tokens: give the "
                "model more by resize_token_embeddings(...)."
            )
        if scope.mask is not None and scope.mask.shape not in ((batch, length), (1, length)):
            raise ValueError(
                f"attention_mask of shape {tuple(scope.mask.shape)} is not allowed where texts are read from their "
                f"beginning: it must be ({batch}, {length}), as input_ids are."
            )
        steps = (F.embedding(input_ids, self.evidence) / STEP).int()
        steps = F.pad(steps, (0, 1), value=1)  # the last column counts tokens
        if scope.mask is not None:
            steps = steps * scope.mask.unsqueeze(-1)
        sums = self._sums_so_far(steps, scope) if self.causal else self._sums_of_texts(steps, scope)
        sums, tokens = sums[..., :-1].float() * STEP, sums[..., -1:].float()
        scores = sums / (1.0 + tokens / INDEPENDENT).sqrt() + self.log_shares
        lowest = torch.finfo(torch.float32).min
        return scores.masked_fill(self.log_shares == lowest, lowest)

    @staticmethod
    def _sums_so_far(steps: torch.Tensor, scope: SequenceScope) -> torch.Tensor:
        sums = steps.cumsum(1, dtype=torch.int32)
        if scope.segments is None:
            return sums
        segments = scope.segments.expand(steps.shape[:2])
        places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
        begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
        first = torch.where(begins, places, 0).cummax(1).values
        before = F.pad(sums, (0, 0, 1, 0)).gather(1, first.unsqueeze(-1).expand_as(sums))
        return sums - before

    @staticmethod
    def _sums_of_texts(steps: torch.Tensor, scope: SequenceScope) -> torch.Tensor:
        if scope.segments is None:
            return steps.sum(1, keepdim=True, dtype=torch.int32).expand_as(steps)
        batch, length, _ = steps.shape
        rows = torch.arange(batch, device=steps.device).unsqueeze(1)
        index = (rows * length + scope.segments.expand(batch, length)).flatten()
        sums = torch.zeros_like(steps).flatten(0, 1).index_add(0, index, steps.flatten(0, 1))
        return sums[index].view_as(steps)


__all__ = ["EvidenceRouter"]
