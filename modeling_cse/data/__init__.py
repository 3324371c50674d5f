# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""From text to blocks of tokens: `load_corpus`, `train_tokenizer`, `pack`, `end_token_id`, `split_by_domain`; and
labels for the controls: `label_at_random`, `label_by_domain`."""

from .controls import CLUSTER_COLUMN, label_at_random, label_by_domain
from .corpus import load_corpus
from .masking import FreshMasks, mask_once
from .packing import DOMAIN_COLUMN, end_token_id, pack, split_by_domain
from .tokenization import train_tokenizer


__all__ = [
    "FreshMasks",
    "DOMAIN_COLUMN",
    "CLUSTER_COLUMN",
    "end_token_id",
    "label_at_random",
    "label_by_domain",
    "load_corpus",
    "mask_once",
    "pack",
    "split_by_domain",
    "train_tokenizer",
]
