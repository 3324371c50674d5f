# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The sizes that are measured, and what all contenders of a size share."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """A GPT-2 of so many layers, hidden width, heads and tokens in the vocabulary."""

    layers: int
    width: int
    heads: int
    vocab: int

    @property
    def fields(self) -> dict[str, int | float]:
        """Fields of a GPT-2 configuration. No dropout: it would be one more random thing between two contenders."""
        return {
            "n_layer": self.layers,
            "n_embd": self.width,
            "n_head": self.heads,
            "vocab_size": self.vocab,
            "n_positions": 1024,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @property
    def sparse_layers(self) -> list[int]:
        """The layers whose FFN differs between contenders: the last two, the default of `cse_layers`."""
        return list(range(max(self.layers - 2, 0), self.layers))

    def token_ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random tokens (rows, length) int64: neighbours have nothing in common, so that routes are scattered, which
        is the dearest case of gathering."""
        return torch.randint(self.vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


SHAPES = {
    "tiny": Shape(layers=4, width=128, heads=4, vocab=4096),
    "124m": Shape(layers=12, width=768, heads=12, vocab=50257),
    "355m": Shape(layers=24, width=1024, heads=16, vocab=50257),
}
