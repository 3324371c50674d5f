# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of a saved model: nothing is lost in a folder, in another process, in half precision."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    EVERY_HEAD,
    LANGUAGE_HEADS,
    SIZES,
    activate,
    first_tensor,
    labelled,
    model_class,
    routed_module,
    routed_modules,
    tiny_model,
)
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertTokenizer, GPT2Tokenizer
from transformers.models.auto import modeling_auto

from modeling_cse.configuration_cse import BERT_AUTO_MAP, GPT2_AUTO_MAP


AUTO_MAPS = {"gpt2": GPT2_AUTO_MAP, "bert": BERT_AUTO_MAP}
FLOATS = ("centroids", "radii", "discriminant_weight", "discriminant_bias")


def assert_same_logits(got, wanted):
    """Equal weights at another address in memory may round the last bit of a product differently."""
    torch.testing.assert_close(first_tensor(got), first_tensor(wanted), atol=1e-6, rtol=1e-6)


def assert_same_routers(got, wanted):
    for site, ffn in routed_modules(wanted).items():
        ours = dict(routed_modules(got)[site].router.named_buffers())
        for name, buffer in ffn.router.named_buffers():
            assert ours[name].dtype == (torch.float32 if name in FLOATS else torch.int64), name
            assert torch.equal(ours[name], buffer), name


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_every_head_survives_saving(family, head, combine, tmp_path):
    model = activate(tiny_model(family, head, cse_combine=combine))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_routers(loaded, model)
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    batch = labelled(family, head)
    with torch.no_grad():
        assert_same_logits(loaded(**batch), model(**batch))


@pytest.mark.parametrize(("family", "auto"), [(f, a) for f in AUTO_MAPS for a in AUTO_MAPS[f] if a != "AutoConfig"])
def test_auto_classes_know_the_family(family, auto):
    config = AutoConfig.for_model(f"cse_{family}", **SIZES[family])
    wanted = AUTO_MAPS[family][auto].split(".")[1]
    assert type(getattr(modeling_auto, auto).from_config(config)).__name__ == wanted


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_experts_and_clusters_come_along_to_other_heads(family, head, tmp_path):
    model = activate(tiny_model(family, head))
    model.save_pretrained(tmp_path)
    for other in ("Model", "ForSequenceClassification"):
        loaded = model_class(family, other).from_pretrained(tmp_path)
        assert_same_routers(loaded, model)
        for site, ffn in routed_modules(model).items():
            assert torch.equal(routed_modules(loaded)[site].experts.up_proj, ffn.experts.up_proj)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_half_precision_leaves_routers_exact(family, head, dtype, tmp_path):
    model = activate(tiny_model(family, head))
    model.save_pretrained(tmp_path)
    for loader in (type(model), AutoModel):
        loaded = loader.from_pretrained(tmp_path, dtype=dtype)
        assert routed_module(loaded, 2).experts.up_proj.dtype == dtype
        assert_same_routers(loaded, model)
    half = type(model).from_pretrained(tmp_path)
    half = half.to(dtype) if dtype is torch.bfloat16 else half.half()
    assert routed_module(half, 2).experts.up_proj.dtype == dtype
    assert_same_routers(half, model)
    half.save_pretrained(tmp_path / "half")
    assert_same_routers(type(model).from_pretrained(tmp_path / "half"), model)


def test_double_precision_and_back_leaves_routers_exact(family):
    model = activate(tiny_model(family))
    assert_same_routers(activate(tiny_model(family)).double().float(), model)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_shards(family, head, tmp_path):
    model = activate(tiny_model(family, head))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded = type(model).from_pretrained(tmp_path)
    batch = labelled(family, head)
    with torch.no_grad():
        assert_same_logits(loaded(**batch), model(**batch))


@pytest.mark.parametrize("lost", ["all", "one layer", "one buffer"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_experts_without_their_routers_are_refused(family, head, lost, tmp_path):
    model = activate(tiny_model(family, head))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    part = {"all": ".router.", "one layer": ".2.mlp.router.", "one buffer": ".2.mlp.router.cluster_expert"}[lost]
    kept = {name: tensor for name, tensor in load_file(path).items() if part not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the routing state.*mlp\.router\.cluster_expert"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_clusters_without_their_experts_are_refused(family, head, tmp_path):
    """Fresh experts would answer for them."""
    model = activate(tiny_model(family, head))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(path).items() if ".2.mlp.experts." not in name}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has clusters but lacks the experts of \['.*\.2\.mlp'\]"):
        type(model).from_pretrained(tmp_path)


def test_more_expert_layers_can_be_added_to_a_saved_model(family, tmp_path):
    model = activate(tiny_model(family))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, cse_layers=[0, 1, 2])
    assert routed_module(loaded, 0).router.num_clusters == 0
    batch = {"input_ids": labelled(family, "Model")["input_ids"]}
    with torch.no_grad():
        assert_same_logits(loaded(**batch), model(**batch))


def tokenizer(family: str):
    letters = {letter: place for place, letter in enumerate("abcdefgh", start=5)}
    if family == "gpt2":
        return GPT2Tokenizer(vocab={"<|endoftext|>": 0, **letters}, merges=[])
    special = {name: place for place, name in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))}
    return BertTokenizer(vocab={**special, **letters})


def test_auto_tokenizer_finds_the_familys_tokenizer(family, tmp_path):
    """Also in a folder whose tokenizer does not name its class."""
    tiny_model(family).config.save_pretrained(tmp_path)
    made = tokenizer(family)
    made.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = json.loads(path.read_text())
    named.pop("tokenizer_class")
    path.write_text(json.dumps(named))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(made)
    assert loaded("a")["input_ids"] == made("a")["input_ids"]


def test_code_travels_with_every_checkpoint(family, tmp_path):
    """All thirteen files lie flat beside the weights, and no other."""
    tiny_model(family).save_pretrained(tmp_path)
    shared = ("configuration", "dispatch", "evidence", "experts", "inputs", "losses")
    shared += ("outputs", "pretrained", "routing", "scope", "sharding", "threads")
    helpers = {f"{name}_cse.py" for name in shared}
    assert {path.name for path in tmp_path.glob("*.py")} == helpers | {f"modeling_cse_{family}.py"}
