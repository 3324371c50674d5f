# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""ONNX files, made by transformers' exporter and run by ONNX Runtime."""

import pytest
import torch
from tiny import EVIDENCE, activate, labelled, tiny_model
from torch.export import Dim


pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")
exporters = pytest.importorskip("transformers.exporters")

DEPTH = {"gpt2": "n_layer", "bert": "num_hidden_layers"}


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("gpt2", {"cse_routing": "discriminant", "cse_modules": ["attention", "ffn"]}),
        ("gpt2", {**EVIDENCE, "cse_modules": ["attention", "ffn"]}),
        ("bert", {"cse_routing": "sequence", "cse_modules": ["attention", "ffn"], "cse_combine": "add"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("active", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["experts", "none yet"])
def test_a_file_gives_the_logits_of_the_model(family, flags, active, tmp_path):
    model = tiny_model(family, cse_layers=[0], **{DEPTH[family]: 1}, **flags)
    if active:
        activate(model)
    example = labelled(family, "Model", rows=3, length=9)
    call = example | ({"use_cache": False} if family == "gpt2" else {})
    shapes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in example}
    config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes)
    exporters.OnnxExporter().export(model, call, config=config).save_pretrained(tmp_path)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for rows, length in ((3, 9), (5, 17), (2, 4)):
        batch = labelled(family, "Model", rows, length, seed=rows)
        with torch.no_grad():
            expected = model(**batch).logits
        (logits,) = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})
        real = batch["attention_mask"].bool()  # what is said of padding may differ
        torch.testing.assert_close(torch.from_numpy(logits)[real], expected[real], atol=1e-4, rtol=1e-4)
