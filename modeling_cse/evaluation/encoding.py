# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Texts, pairs of texts and questions with choices as token ids that a model has positions for."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase


# What stands in the text of a multiple-choice question where the choice belongs.
GAP = "<HOLDING>"


@dataclass(frozen=True)
class TextEncoder:
    """
    Token ids of what tasks ask about.

    A tokenizer of BERT's form puts [CLS] and [SEP] around texts and [SEP] between two, one of GPT-2's puts nothing
    around them and gets the end-of-text token between two, as between documents in training. All tokens are of
    segment 0, the only one that models see when they are trained on single texts.

    Args:
        tokenizer: of the model.
        max_length: tokens that the model has positions for, special ones included.

    Raises:
        ValueError: a `max_length` below 16, a tokenizer of another form.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __post_init__(self):
        if self.max_length < 16:
            raise ValueError(f"max_length={self.max_length} is not allowed: it must be at least 16.")
        added, between = self.tokenizer.num_special_tokens_to_add(), self._between()
        if added not in (0, 2) or None in (*between, *self._frame([])):
            raise ValueError(
                f"tokenizer={type(self.tokenizer).__name__} is not allowed: it must add two special tokens (CLS and "
                f"SEP) to a text, or none and know an end-of-text token; it adds {added}."
            )

    def text(self, text: str) -> list[int]:
        """One text; the end of a long one falls away."""
        return self._frame(self._ids(text)[: self._room()])

    def pair(self, first: str, second: str) -> list[int]:
        """Two texts; of long ones the end of the longer one falls away, until both fit."""
        ids, others, between = self._ids(first), self._ids(second), self._between()
        room = self._room() - len(between)
        keep = min(len(ids), max(room - len(others), room - room // 2))
        return self._frame(ids[:keep] + between + others[: room - keep])

    def around_gap(self, text: str, choice: str, max_length: int | None = None) -> list[int]:
        """
        A text with a choice in the place of its gap. A choice has at most half of the tokens. Of a long text the
        tokens next to the gap are kept: a quarter of its room behind the gap if there are as many, the rest before it.
        Where there is no gap, the choice stands behind the text.

        Args:
            max_length: fewer tokens than this encoder's.
        """
        room = min(self._room(), (max_length or self.max_length) - len(self._frame([])))
        before, _, behind = text.partition(GAP)
        before, middle, behind = self._ids(before), self._ids(choice)[: room // 2], self._ids(behind)
        room -= len(middle)
        behind = behind[: max(room // 4, room - len(before))]
        return self._frame(before[max(len(before) + len(behind) - room, 0) :] + middle + behind)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _room(self) -> int:
        return self.max_length - len(self._frame([]))

    def _frame(self, ids: list[int]) -> list[int]:
        framed = self.tokenizer.num_special_tokens_to_add() > 0
        return [self.tokenizer.cls_token_id, *ids, self.tokenizer.sep_token_id] if framed else ids

    def _between(self) -> list[int]:
        framed = self.tokenizer.num_special_tokens_to_add() > 0
        return [self.tokenizer.sep_token_id if framed else self.tokenizer.eos_token_id]


__all__ = ["GAP", "TextEncoder"]
