# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Training a compiled model: collecting and re-clustering leave its one graph alone."""

import pytest
import torch
from tiny import ONE_GRAPH, activate, labelled, tiny_model
from tiny_runs import fit_steps, history, settings, train
from torch._dynamo.utils import counters

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training import FeatureCollector


pytestmark = ONE_GRAPH

@pytest.mark.parametrize(("family", "head"), [("gpt2", "ForCausalLM"), ("bert", "ForMaskedLM")])
def test_a_collector_sees_what_it_sees_without_compiling(family, head):
    model, batch = activate(tiny_model(family, head, cse_layers=[-1])).train(), labelled(family, head)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    taken = []
    for each in (model, compiled):
        collector = FeatureCollector(model, capacity=6)
        collector.attach()
        for step in range(4):
            collector.enabled = step % 2 == 1
            with torch.compiler.set_stance("fail_on_recompile" if step > 0 and each is compiled else "default"):
                each(**batch)
        collector.detach()
        each(**batch)
        taken.append(collector.take())
    for plain, opaque in zip(*(features.values() for features in taken), strict=True):
        assert len(plain) == 6
        for name, tensor in vars(plain).items():
            torch.testing.assert_close(tensor, vars(opaque)[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("update", ["recluster", "ema"])
def test_trainer_compiles_once_however_often_clusters_change(tmp_path, update):
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        callback = ClusterExpertsCallback(**settings(update=update))
        runs.append(train(tmp_path / str(compiled), callback, model=tiny_model("gpt2"), **options))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert fit_steps(runs[0]) == fit_steps(runs[1]) == ([4, 6, 8] if update == "recluster" else [4])
    for plain, opaque in zip(*map(history, runs), strict=True):
        assert plain == pytest.approx(opaque, rel=1e-3, abs=1e-3)
