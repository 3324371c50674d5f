# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint is to safetensors alone: whole, in shards, with its routing state readable by anybody."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_model
from tiny import EVIDENCE, activate, model_class, routed_modules, tiny_config, tiny_model, token_ids


EVERYWHERE = {"cse_modules": ["attention", "ffn"]}
# Of docs/tools.md: shape in clusters C and hidden size d, and what safetensors calls the type, also of a bf16 model.
ROUTER = {
    "centroids": ("C", "d", "F32"),
    "radii": ("C", "F32"),
    "cluster_sizes": ("C", "I64"),
    "discriminant_weight": ("C", "d", "F32"),
    "discriminant_bias": ("C", "F32"),
    "cluster_expert": ("C", "I64"),
}
READER = {"evidence": ("V", "C", "F32"), "log_shares": ("C", "F32")}

TIED = {"gpt2": {"lm_head.weight"}, "bert": {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}}


def assert_same_state(left, right) -> None:
    other = right.state_dict()
    assert left.state_dict().keys() == other.keys()
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("flags", [{}, EVIDENCE], ids=["own", "evidence"])
def test_the_routing_state_is_read_without_this_package(family, dtype, flags, tmp_path):
    model = activate(tiny_model(family, **EVERYWHERE, **flags)).to(dtype)
    model.save_pretrained(tmp_path)
    sizes = {"C": 16, "d": 32, "V": 99}
    modules = {name: module for name, module in model.named_modules() if name.endswith((".router", "evidence_router"))}
    readers = [name for name in modules if name.endswith("evidence_router")]
    assert len(modules) - len(readers) == len(routed_modules(model)) == 4 and len(readers) == bool(flags)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for place, router in modules.items():
            for name, (*shape, kind) in (READER if place in readers else ROUTER).items():
                part = file.get_slice(f"{place}.{name}")
                assert (part.get_shape(), part.get_dtype()) == ([sizes[size] for size in shape], kind)
                assert torch.equal(file.get_tensor(f"{place}.{name}"), router.get_buffer(name))
        assert sum(".router." in key for key in file.keys()) == len(ROUTER) * 4
        assert sum("evidence_router." in key for key in file.keys()) == len(READER) * len(readers)


def test_shards_hold_every_tensor_once_and_come_back_whole(family, tmp_path):
    model = activate(tiny_model(family, **EVERYWHERE))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {path.name: load_file(path) for path in tmp_path.glob("model-*.safetensors")}
    assert len(shards) > 5 and sorted(index) == sorted(name for shard in shards.values() for name in shard)
    assert all(name in shards[shard] for name, shard in index.items())
    tied = model.state_dict().keys() - index.keys()
    assert tied == TIED[family]
    again = type(model).from_pretrained(tmp_path)
    assert_same_state(model, again)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)


def test_save_model_and_load_model_of_safetensors(family, tmp_path):
    """They know of tied weights by themselves."""
    model = activate(tiny_model(family, **EVERYWHERE))
    save_model(model, tmp_path / "model.safetensors")
    head = "ForCausalLM" if family == "gpt2" else "ForMaskedLM"
    again = model_class(family, head)(tiny_config(family, **EVERYWHERE)).eval()
    missing, unexpected = load_model(again, tmp_path / "model.safetensors")
    assert not missing and not unexpected
    assert_same_state(model, again)
