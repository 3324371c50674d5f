# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Gradient consistency of long-tail sequences, whose peak ends the dense warm-up under `warmup="auto"`: measured on the
backward passes of training itself, with no further pass, and no host synchronisation before it is asked for.
"""

import inspect
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from ..dispatch_cse import RoutedModule
from ..scope_cse import SequenceScope
from .collecting import routed_base_model
from .gathering import gather_objects, local_capacity, on_first_rank
from .gradients import NO_TOKEN, SequenceGradients, gradient_consistency, scale_steps, sentence_frequency_scores


METRICS = ("gradient_consistency", "gradient_consistency_signed", "tail_frequency_score")


def output_projection(module: RoutedModule) -> nn.Module:
    """The base's last linear layer: `c_proj` of GPT-2's FFN and attention, `output.dense` of BERT's."""
    return module.c_proj if hasattr(module, "c_proj") else module.output.dense


@dataclass
class _Batch:
    """One forward pass: its tokens, and how far it has got. With activation checkpointing the layer runs twice."""

    tokens: torch.Tensor
    step: int
    reached: bool = False
    projected: bool = False
    recorded: bool = False


class GradientConsistency:
    """
    Measures the gradient consistency of the long tail from the backward passes of training itself.

    A forward hook takes the input a (B, T, f) of one linear layer and a hook on its output the gradient delta
    (B, T, d) that arrives there anyway. The gradient of the layer's weight by one sequence is sum_t delta_t a_t^T;
    kept is its two-sided Gaussian sketch, sum_t (P delta_t)(Q a_t)^T, r x r numbers whose inner products are those of
    the gradients in expectation. It costs B * T * r * (f + d + r) multiplications a micro-batch. No random number is
    drawn from a global generator, and no gradient is changed.

    The long tail X' is the share of the sequences in the window with the lowest sentence frequency score: the mean
    relative frequency of their tokens among all training tokens so far. Token ids are kept with the window, so that
    all its sequences are scored by the same counts, those at the time of measuring.

    What a number means, and what blurs it:

    - A sequence is a row of the batch. Packed documents count as the one sequence they share.
    - Padded positions carry no loss, so that their delta is 0. Longer sequences, or those with more labels, weigh
      more: gradients are those of the loss that is trained, not of a mean by sequence.
    - Means over a batch, accumulation and loss scaling give all rows of a step one factor; it is taken out
      (`scale_steps`). Rows whose gradient overflowed are left out.
    - Weights move while the window fills, so that the rows of J belong to slightly different models, and the way in
      which training swings to and fro is part of what is measured. `gradient_consistency` keeps the sign clear of it.
      Both need to know which rows met the same weights: set `step` before every step.
    - Dropout is noise in J.
    - Masked language models see [MASK] in place of tokens: name it in `ignored_tokens`.

    Args:
        model: a CSE model or head, dense so far: while tokens go to experts, rows cannot be told apart at the layer.
        window: sequences to measure on, the last ones, over all processes.
        tail_share: share of them that counts as the long tail, above 0 and at most 1.
        sketch_size: r. A cosine of two gradients is off by 0.5 / sqrt(r) to 1 / sqrt(r) (root mean square, measured).
        seed: of P and Q.
        ignored_tokens: ids that are neither counted nor scored, such as the tokenizer's `all_special_ids`.
        layer: the linear layer (..., f) -> (..., d); by default the output projection of the last module
            with experts.

    Raises:
        ValueError: a wrong argument. While training: a batch of `inputs_embeds`, an attention mask of more than two
            dimensions, a layer that is not fed (B, T, f), that no gradient reaches, or that did not run at all.
    """

    def __init__(
        self,
        model: nn.Module,
        window: int = 256,
        tail_share: float = 0.25,
        sketch_size: int = 32,
        seed: int = 0,
        ignored_tokens: Iterable[int] = (),
        layer: nn.Module | None = None,
    ):
        for name, value, least in (("window", window, 2), ("sketch_size", sketch_size, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} is not allowed: it must be an int >= {least}.")
        if not isinstance(tail_share, int | float) or isinstance(tail_share, bool) or not 0 < tail_share <= 1:
            raise ValueError(f"tail_share={tail_share!r} is not allowed: it must be above 0 and at most 1.")
        self.base = routed_base_model(model)
        modules = self.base.routed_modules()
        self.layer = output_projection(modules[max(modules)]) if layer is None else layer
        self.window, self.tail_share, self.sketch_size, self.seed = window, tail_share, sketch_size, seed
        self.ignored_tokens = torch.tensor(sorted(set(ignored_tokens)), dtype=torch.int64)
        self.counts = torch.zeros(self.base.config.vocab_size, dtype=torch.int64)
        self.step = 0
        self._rows: deque[tuple[torch.Tensor, torch.Tensor, int]] = deque(maxlen=local_capacity(window))
        self._projections: tuple[torch.Tensor, torch.Tensor] | None = None
        self._signature = inspect.signature(self.base.forward)
        self._batch: _Batch | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self) -> None:
        """Puts the hooks on; `detach` takes them off, and must before experts are switched on."""
        self._hooks.append(self.base.register_forward_pre_hook(self._begin, with_kwargs=True))
        self._hooks.append(self.layer.register_forward_hook(self._project))

    def detach(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._batch = None

    # ---- during a step -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _count(self, arguments: dict) -> torch.Tensor:
        """Adds a batch to the counts and returns its tokens (B, T) int32; nothing here waits for the device."""
        ids = arguments.get("input_ids")
        if ids is None:
            raise ValueError(
                "input_ids=None is not allowed: rare sequences are told by their tokens, so gradient consistency "
                "cannot be measured on inputs_embeds."
            )
        if self.counts.device != ids.device:
            self.counts, self.ignored_tokens = self.counts.to(ids.device), self.ignored_tokens.to(ids.device)
        mask = SequenceScope.of(arguments.get("attention_mask"), None).mask
        ignored = torch.isin(ids, self.ignored_tokens)
        valid = ~ignored if mask is None else mask & ~ignored
        self.counts.index_add_(0, ids.flatten(), valid.flatten().long())
        return ids.masked_fill(~valid, NO_TOKEN).int()

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._batch is not None and not self._batch.reached:
            raise ValueError(
                "the layer under study was not reached by the last batch, so gradient consistency cannot be measured: "
                "it must take part in every forward pass, and torch.compile must not have taken its hooks away."
            )
        self._batch = None
        if module.training and torch.is_grad_enabled():
            arguments = self._signature.bind(*args, **kwargs).arguments
            self._batch = _Batch(self._count({**arguments, **arguments.get("kwargs", {})}), self.step)

    @torch.compiler.disable
    def _project(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        batch = self._batch
        if batch is None:
            return
        batch.reached = True
        # no gradient: the first of two passes of a reentrant checkpoint; projected: the second of the other kind
        if batch.projected or not torch.is_grad_enabled():
            return
        states = args[0]
        if states.dim() != 3 or states.shape[:2] != batch.tokens.shape:
            raise ValueError(
                f"the layer under study was fed {tuple(states.shape)} for input_ids of {tuple(batch.tokens.shape)}, "
                "so its gradients cannot be told apart by sequence: it must see whole batches (B, T, f). Detach "
                "before experts are switched on, and set chunk_size_feed_forward=0."
            )
        if not output.requires_grad:
            raise ValueError(
                "no gradient reaches the layer under study (it and all below it are frozen), so gradient consistency "
                "cannot be measured: name another layer, or another end of warm-up."
            )
        batch.projected = True
        if self._projections is None:
            self._projections = self._draw(output.shape[-1], states.shape[-1])
        outer, inner = (projection.to(states.device) for projection in self._projections)
        self._projections = outer, inner
        # only r numbers a token wait for the backward pass, not the f of the layer's input
        with torch.no_grad(), maybe_autocast(states.device.type, enabled=False):
            projected = states.detach().float() @ inner
        output.register_hook(lambda gradient: self._record(batch, projected, gradient, outer))

    @torch.no_grad()
    def _record(self, batch: _Batch, projected: torch.Tensor, gradient: torch.Tensor, outer: torch.Tensor) -> None:
        if batch.recorded:
            return
        batch.recorded = True
        with maybe_autocast(gradient.device.type, enabled=False):
            sketches = (gradient.float() @ outer).transpose(1, 2) @ projected
        pairs = zip(sketches.flatten(1), batch.tokens, strict=True)
        self._rows.extend((sketch, tokens, batch.step) for sketch, tokens in pairs)

    def _draw(self, out_features: int, in_features: int) -> tuple[torch.Tensor, torch.Tensor]:
        """P^T (d, r) and Q^T (f, r) fp32, with E[P^T P] and E[Q^T Q] the identity."""
        generator = torch.Generator().manual_seed(self.seed)
        scale = self.sketch_size**-0.5
        return tuple(
            torch.randn(width, self.sketch_size, generator=generator) * scale for width in (out_features, in_features)
        )

    # ---- between steps -------------------------------------------------------------------------------------------

    def sequences(self) -> SequenceGradients:
        """The window of this process, oldest first, on the CPU."""
        if not self._rows:
            none = torch.zeros(0, dtype=torch.int64)
            return SequenceGradients(torch.zeros(0, self.sketch_size**2), none.int().view(0, 0), none)
        parts = [
            SequenceGradients(sketch.unsqueeze(0).cpu(), tokens.unsqueeze(0).cpu(), torch.tensor([step]))
            for sketch, tokens, step in self._rows
        ]
        return SequenceGradients.concatenate(parts)

    def measure(self) -> dict[str, float] | None:
        """
        Consistency over the windows of all processes together. Every process must call it at the same step, and all
        get the same answer.

        Returns:
            None until the window is full; then `gradient_consistency`, the magnitude of GC(X') and what to look for a
            peak of (0 to 1), `gradient_consistency_signed` (-1 to 1), and `tail_frequency_score`, the highest score
            in the tail. NaN if no sequence of the tail has a finite gradient other than zero.
        """
        parts = gather_objects((self.sequences(), self.counts.cpu()))
        parts = [part for part in parts if len(part[0])]
        if sum(len(part) for part, _ in parts) < self.window:
            return None
        return on_first_rank(lambda: self._measure(parts))

    def _measure(self, parts: list[tuple[SequenceGradients, torch.Tensor]]) -> dict[str, float]:
        everyone = SequenceGradients.concatenate([part for part, _ in parts])
        scores = sentence_frequency_scores(everyone.tokens, sum(counts for _, counts in parts))
        usable = everyone.sketches.isfinite().all(1) & scores.isfinite()
        # in the order of one process, which decides between equal scores
        order = usable.nonzero().flatten()[everyone.steps[usable].argsort(stable=True)]
        sketches, scores, steps = everyone.sketches[order], scores[order], everyone.steps[order]
        tail = scores.argsort(stable=True)[: math.ceil(self.tail_share * len(scores))]
        if not len(tail):
            return dict.fromkeys(METRICS, math.nan)
        chosen = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, tail, True)
        signed = gradient_consistency(scale_steps(sketches, steps), chosen, steps)
        return dict(zip(METRICS, (abs(signed), signed, float(scores[tail[-1]])), strict=True))

    # ---- in a checkpoint -----------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """What this process must remember to go on exactly: `sketches`, `tokens` and `steps` of its sequences,
        `counts` and `seed`, on the CPU."""
        return {**vars(self.sequences()), "counts": self.counts.cpu().clone(), "seed": torch.tensor(self.seed)}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """
        Takes up what `state` gave.

        Raises:
            ValueError: a part is missing, or is of another vocabulary, sketch size or seed.
        """
        missing = {"sketches", "tokens", "steps", "counts", "seed"} - state.keys()
        if missing:
            raise ValueError(f"state has {sorted(state)}: {sorted(missing)} must be there too.")
        if state["counts"].shape != self.counts.shape:
            raise ValueError(
                f"counts of {tuple(state['counts'].shape)} is not allowed: the vocabulary has {len(self.counts)} "
                "tokens."
            )
        if state["sketches"].shape[1:] != (self.sketch_size**2,):
            raise ValueError(
                f"sketches of {tuple(state['sketches'].shape)} is not allowed: sketch_size={self.sketch_size} makes "
                f"{self.sketch_size**2} numbers a sequence."
            )
        if int(state["seed"]) != self.seed:
            raise ValueError(
                f"seed={self.seed} is not allowed: the sketches were made with seed={int(state['seed'])}, and only "
                "sketches of one seed can be compared."
            )
        self.counts = state["counts"].clone()
        self._rows.clear()
        rows = (state["sketches"].clone(), state["tokens"].clone(), state["steps"].tolist())
        self._rows.extend(zip(*rows, strict=True))


__all__ = ["GradientConsistency", "output_projection"]
