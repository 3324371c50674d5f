# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Models that route by evidence, for tests of either gate (the fixture `gate` of conftest.py)."""

import torch
from tiny import activate, tiny_model


EXACT = {"atol": 0, "rtol": 0}
GATES = {"hard": {"cse_gate": "hard"}, "posterior": {"cse_gate": "posterior", "cse_combine": "add"}}
FLAGS: dict[str, str] = {}


def evidence_model(family: str = "gpt2", seed: int = 0, **flags):
    return activate(tiny_model(family, cse_routing="evidence", seed=seed, **FLAGS, **flags), seed)


@torch.no_grad()
def outputs_of(model, ids, **inputs):
    return model(ids, output_cluster_ids=True, **inputs)
