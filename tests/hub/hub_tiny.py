# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Texts of three domains with words of their own, for the tests of cards."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


DOMAINS = ("general", "law", "medicine")
# Each domain has thirty words of its own, ids 5 to 97; names are spelled with letters only.
LETTERS = "abcdefghij"


def spell(number: int) -> str:
    return "w" + "".join(LETTERS[int(digit)] for digit in f"{number:02d}")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, **{spell(number): number for number in range(1, 99)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def texts(count: int = 96, length: int = 12, seed: int = 3) -> list[dict]:
    """Rows as in `tiny_runs.rows`, with the domain's name."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        domain = (0, 0, 0, 0, 1, 1, 2, 2)[number % 8]
        ids = torch.randint(0, 30, (length,), generator=generator) + 5 + 31 * domain
        made.append({"input_ids": ids, "domain": DOMAINS[domain]})
    return made
