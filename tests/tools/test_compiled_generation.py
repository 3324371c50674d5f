# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""`generate` of a compiled model with a static cache."""

import pytest
import torch
from tiny import EVIDENCE, activate, tiny_model, token_ids
from torch._dynamo.utils import counters


@pytest.mark.parametrize("routing", ["discriminant", "evidence", pytest.param("given", marks=pytest.mark.slow)])
def test_a_compiled_model_writes_the_same_text(routing):
    """Two graphs, prompt and token, whatever is generated and however often the clusters change."""
    flags = {"cse_modules": ["attention", "ffn"], "cse_routing": routing}
    flags |= EVIDENCE if routing == "evidence" else {}
    model = activate(tiny_model("gpt2", n_layer=1, cse_layers=[0], **flags))
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    options |= {"given_clusters": torch.tensor([1, 4])} if routing == "given" else {}
    eager = model.forward
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    texts = []
    for seed in (0, 1):
        activate(model, seed=seed)
        for model.forward in (eager, compiled):
            texts.append(model.generate(ids, **options))
    assert texts[0].shape == (2, 14)
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[2], texts[3])
    assert not torch.equal(texts[0], texts[2])
    assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"]
