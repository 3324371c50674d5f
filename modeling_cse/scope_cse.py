# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Which tokens of a batch make up a text. Shapes are named in routing_cse.py."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class SequenceScope(NamedTuple):
    """Which tokens of a batch make up a sequence. Routes that look at more of it than one token need it."""

    mask: torch.Tensor | None = None  # (B, T) bool, False at padding; None: no padding
    segments: torch.Tensor | None = None  # (B, T) int64, number of the document in its row; None: one a row

    @classmethod
    def of(
        cls,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        input_ids: torch.Tensor | None = None,
        separator: int | None = None,
    ) -> "SequenceScope":
        """Reads the padding from a 2-D `attention_mask`, and packed documents from `position_ids` that start again
        and from the `separator` among `input_ids` that ends each one (`cse_separator_token_id`; None: nothing does).
        Padding neither starts nor ends a document, wherever in its row it stands.

        Raises:
            ValueError: `attention_mask` has more than two dimensions, which hides where the padding is; or there is
                a separator to look for and there are no `input_ids`.
        """
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask of shape {tuple(attention_mask.shape)} is not allowed where routes look at more of a "
                "text than one token: pass the 2-D mask of shape (batch, sequence). A model that was trained with "
                "cse_routing='discriminant' takes any mask."
            )
        mask = None if attention_mask is None else attention_mask.bool()
        begins = None
        if position_ids is not None and position_ids.shape[-1] > 1:
            begins = _begins_again(position_ids, mask)
        if separator is not None:
            if input_ids is None:
                raise ValueError(
                    f"inputs_embeds is not allowed with cse_separator_token_id={separator}, which is looked for among "
                    "tokens: pass input_ids."
                )
            # one before another ends no document of its own: rows may have two between documents, or end in many
            behind = (input_ids[:, :-1] == separator) & (input_ids[:, 1:] != separator)
            if mask is not None and _fits(mask, input_ids):
                behind = behind & mask[:, :-1]  # what fills up a row may be the same token
            begins = behind if begins is None else begins | behind
        return cls(mask, None if begins is None else F.pad(begins.long().cumsum(-1), (1, 0)))


def _begins_again(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Whether a token's position is another one than the next after that of the token before it. Behind padding amid a
    row, where a turn of a dialogue ended early, positions may leave it out, as `generate` does, or count it, as stock
    models do by default.

    Args:
        position_ids: (T,), which stock models take too, or (B, T).
        mask: (B, T) or (1, T); one of another shape is refused by whoever reads it.

    Returns:
        (T - 1,) or (B, T - 1) bool, of all tokens but the first.
    """
    if mask is None or not _fits(mask, position_ids):
        return position_ids[..., 1:] != position_ids[..., :-1] + 1
    position_ids, mask = torch.broadcast_tensors(position_ids, mask)
    places = torch.arange(mask.shape[-1], device=mask.device)
    before = torch.where(mask, places, -1).cummax(-1).values[..., :-1]  # the last token of the text up to each
    onward = position_ids[..., 1:] - position_ids.gather(-1, before.clamp_min(0))
    follows = (onward == 1) | (onward == places[1:] - before)
    return mask[..., 1:] & (before >= 0) & ~follows


def _fits(mask: torch.Tensor, indices: torch.Tensor) -> bool:
    """Whether a mask (B, T) can stand beside indices (T,) or (B, T); either may have one row for all."""
    rows = len(indices) if indices.dim() > 1 else 1
    return mask.shape[-1] == indices.shape[-1] and (rows == len(mask) or 1 in (rows, len(mask)))


def sequence_means(states: torch.Tensor, scope: SequenceScope) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The mean state of each sequence, padding left out (METHOD: "clusters are always found on sequences").

    Args:
        states: (B, T, d), any float dtype.
        scope: padding and documents of the batch.

    Returns:
        Means (S, d) fp32, the number of tokens behind each (S,) fp32, and the row of the means that each token
        belongs to (B, T) int64. With documents S is B * T, most of them empty: shapes must not depend on data.

    Raises:
        ValueError: the mask is of another shape. Upstream's attention cuts one that is too long.
    """
    batch, length, width = states.shape
    if scope.mask is not None and scope.mask.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"attention_mask of shape {tuple(scope.mask.shape)} is not allowed where whole sequences are averaged: it "
            f"must be ({batch}, {length}), as the states are."
        )
    rows = torch.arange(batch, device=states.device).unsqueeze(1)
    weights = states.new_ones(batch, length, dtype=torch.float32)
    weights = weights if scope.mask is None else scope.mask.float().expand(batch, -1)
    weighted = states.float() if scope.mask is None else states.float() * weights.unsqueeze(-1)
    if scope.segments is None:
        counts, sums, index = weights.sum(1), weighted.sum(1), rows.expand(batch, length)
    else:
        index = rows * length + scope.segments.expand(batch, length)
        counts = weights.new_zeros(batch * length).index_add(0, index.flatten(), weights.flatten())
        sums = weighted.new_zeros(batch * length, width).index_add(0, index.flatten(), weighted.flatten(0, 1))
    return sums / counts.clamp_min(1.0).unsqueeze(-1), counts, index


__all__ = ["SequenceScope", "sequence_means"]
