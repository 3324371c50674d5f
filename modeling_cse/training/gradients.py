# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Per-sequence gradients: how well those of a few sequences agree with those of all, and which sequences are rare.

With J the Jacobian of the per-sequence loss, Theta = J J^T, u its principal eigenvector and g(X) = u^T J, the gradient
consistency of a subset X' of the sequences X is GC(X') = cos(g(X), g(X')) (METHOD section 3; Dong et al.).
"""

import math
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import nn

from ..clustering.threads import one_thread


NO_TOKEN = -1


@dataclass
class SequenceGradients:
    """
    Sketched gradients of N sequences, and what they consist of.

    Fields:
        sketches (N, r * r) fp32: inner products of rows approximate those of the per-sequence gradients.
        tokens (N, T) int32: token ids, `NO_TOKEN` at padding and at tokens that are not counted.
        steps (N,) int64: the optimizer step in which each was seen; sequences of one step met the same weights.
    """

    sketches: torch.Tensor
    tokens: torch.Tensor
    steps: torch.Tensor

    def __len__(self) -> int:
        return len(self.sketches)

    @classmethod
    def concatenate(cls, parts: list["SequenceGradients"]) -> "SequenceGradients":
        length = max(part.tokens.shape[1] for part in parts)
        tokens = [nn.functional.pad(part.tokens, (0, length - part.tokens.shape[1]), value=NO_TOKEN) for part in parts]
        return cls(
            torch.cat([part.sketches for part in parts]), torch.cat(tokens), torch.cat([part.steps for part in parts])
        )


def principal_eigenvector(gradients: torch.Tensor) -> torch.Tensor:
    """u of Theta = J J^T, for J (N, k) fp64 on the CPU: (N,) fp64, of length 1 and arbitrary sign."""
    gram = (gradients @ gradients.T).numpy()
    with one_thread():
        _, vectors = eigh(gram, subset_by_index=[len(gram) - 1, len(gram) - 1])
    return torch.from_numpy(vectors[:, 0])


def gradient_consistency(gradients: torch.Tensor, subset: torch.Tensor, steps: torch.Tensor | None = None) -> float:
    """
    GC(X') = cos(g(X), g(X')), -1 to 1.

    The signs of u and u' are arbitrary. They are fixed so that X' and the rest of X agree about the way the sequences
    of one step pull: the sum over steps of (sum of u over the rest) * (sum of u' over X') is >= 0. At one set of
    weights that is the rule "u and u' have sums of one sign". That rule alone would not do while weights move: the
    principal direction of a window is first of all the one along which training swings to and fro, the sequences of
    one step enter u with one sign and those of the next with the other, and the sum over them all is an accident.

    Where the sequences of one step scatter to both sides as well (seen late in training, and in masked models) no rule
    can tell the sign, and only the magnitude means something.

    Args:
        gradients: (N, k) gradients of X, or sketches of them, any float dtype, on the CPU.
        subset: (N,) bool, the sequences of X'.
        steps: (N,) integers, sequences with the same number met the same weights; None: all did, which is also what
            is assumed where no step has sequences of both.

    Returns:
        NaN where it is not defined: X' is empty, or all its gradients are zero.
    """
    if not subset.any():
        return math.nan
    gradients = gradients.double()
    whole, part = principal_eigenvector(gradients), principal_eigenvector(gradients[subset])
    direction, part_direction = whole @ gradients, part @ gradients[subset]
    norms = float(direction.norm() * part_direction.norm())
    if norms == 0:
        return math.nan
    cosine = max(-1.0, min(1.0, float(direction @ part_direction) / norms))
    rest = subset if subset.all() else ~subset
    groups = torch.zeros(len(subset), dtype=torch.int64) if steps is None else steps.unique(return_inverse=True)[1]
    if not torch.isin(groups[rest], groups[subset]).any():
        groups = torch.zeros_like(groups)
    sums = whole.new_zeros(int(groups.max()) + 1)
    agreement = sums.index_add(0, groups[rest], whole[rest]) @ sums.index_add(0, groups[subset], part)
    return cosine if agreement >= 0 else -cosine


def scale_steps(gradients: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """
    Gives the gradients of every step a root mean square length of 1: (N, k), in the dtype they came in.

    What multiplies the loss of a whole step would otherwise weigh its sequences: a mean over the few rows that are
    left at the end of an epoch makes them large enough to be the principal direction on their own (seen: consistency
    0.997 for as long as they were in the window), and so does a change of fp16's loss scale. Within a step sequences
    keep their relative lengths.

    Args:
        gradients: (N, k), any float dtype.
        steps: (N,) integers, the step of each.
    """
    groups = steps.unique(return_inverse=True)[1]
    squares = gradients.double().square().sum(1)
    sums = squares.new_zeros(int(groups.max()) + 1).index_add(0, groups, squares)
    lengths = (sums / groups.bincount()).sqrt()[groups].unsqueeze(1)
    return torch.where(lengths > 0, gradients / lengths, gradients).to(gradients.dtype)


def sentence_frequency_scores(tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    Mean relative frequency of each sequence's tokens (METHOD section 3).

    Args:
        tokens: (N, T) integers, `NO_TOKEN` where there is none.
        counts: (V,) int64, how often each token occurs in the text.

    Returns:
        (N,) fp64 in 0 to 1; NaN for a sequence without a token. Sums are of integers, so no order or padding shows.
    """
    valid = tokens != NO_TOKEN
    sums = torch.where(valid, counts[tokens.clamp_min(0).long()], 0).sum(1)
    return sums.double() / valid.sum(1) / counts.sum()


__all__ = [
    "NO_TOKEN",
    "SequenceGradients",
    "gradient_consistency",
    "principal_eigenvector",
    "scale_steps",
    "sentence_frequency_scores",
]
