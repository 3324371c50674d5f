# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Texts from made-up vocabularies, as arrays of token ids."""

import numpy as np


VOCAB = 99


def texts(shares: tuple[int, ...] = (4, 2, 2), count: int = 64, seed: int = 0, own: float = 0.5):
    """
    Texts of 8 to 20 tokens, -1 behind their end, in which every domain has ten tokens of its own and all share thirty;
    `own` is the probability of the former. Returns ids (N, 20) int32 and domains (N,).
    """
    random = np.random.default_rng(seed)
    domains = np.repeat(np.arange(len(shares)), shares)[np.arange(count) % sum(shares)]
    ids = np.full((count, 20), -1, np.int32)
    for row, domain in enumerate(domains):
        length = random.integers(8, 21)
        mine = 40 + 10 * domain + random.integers(0, 10, length)
        ids[row, :length] = np.where(random.random(length) < own, mine, 5 + random.integers(0, 30, length))
    return ids, domains
