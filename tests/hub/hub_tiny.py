# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Texts of three domains with words of their own, for the tests of cards."""

from itertools import cycle

from tiny_runs import DOMAINS, rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


NAMES = ("general", "law", "medicine")
# Each domain has thirty words of its own, ids 5 to 97; names are spelled with letters only.
LETTERS = "abcdefghij"


def spell(number: int) -> str:
    return "w" + "".join(LETTERS[int(digit)] for digit in f"{number:02d}")


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"[UNK]": 0, **{spell(number): number for number in range(1, 99)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def texts(count: int = 96, seed: int = 3) -> list[dict]:
    """Rows as in `tiny_runs.rows`, with the domain's name."""
    return [
        {"input_ids": row["input_ids"], "domain": NAMES[domain]}
        for row, domain in zip(rows(count, seed=seed), cycle(DOMAINS), strict=False)
    ]
