# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Device maps and offloading (accelerate): weights that come only when their module is called."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, infer_auto_device_map
from tiny import EVIDENCE, activate, routed_modules, tiny_model, token_ids

from modeling_cse import fit_experts


PREFIX = {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}
OTHERS = {
    "gpt2": ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"],
    "bert": ["bert.embeddings", "cls"],
}


def on_disk(family: str) -> dict[str, str]:
    """The layers with experts on disk, and what reads texts; all else in memory."""
    blocks = {f"{PREFIX[family]}.{index}": "cpu" if index == 0 else "disk" for index in range(3)}
    reader = f"{PREFIX[family].split('.')[0]}.evidence_router"
    return blocks | dict.fromkeys(OTHERS[family], "cpu") | {reader: "disk"}


def loaded(family: str, how: str, model, folder):
    model.save_pretrained(folder / "saved")
    options = {
        "cpu": {"device_map": {"": "cpu"}},
        "auto": {"device_map": "auto"},
        "auto, short of memory": {
            "device_map": "auto",
            "max_memory": {"cpu": int(0.8 * model.get_memory_footprint())},
            "offload_folder": folder / "offload",
        },
        "disk": {"device_map": on_disk(family), "offload_folder": folder / "offload"},
    }
    other = type(model).from_pretrained(folder / "saved", **options.get(how, {}))
    if how == "cpu_offload":
        cpu_offload(other, execution_device="cpu", offload_buffers=True)
    elif how == "disk_offload":
        disk_offload(other, folder / "offload", execution_device="cpu", offload_buffers=True)
    return other


HOW = ["cpu", "auto", "auto, short of memory", "disk", "cpu_offload", "disk_offload"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("flags", [{"cse_routing": "discriminant"}, EVIDENCE], ids=["discriminant", "evidence"])
def test_logits_and_texts_are_those_of_the_model_in_memory(family, how, flags, tmp_path):
    model, ids = activate(tiny_model(family, cse_modules=["attention", "ffn"], **flags)), token_ids()
    other = loaded(family, how, model, tmp_path)
    offloaded = {name for name, parameter in other.named_parameters() if parameter.is_meta}
    assert any(".experts." in name for name in offloaded) == (how not in ("cpu", "auto"))
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, atol=0, rtol=0)
    if family == "gpt2":  # one token at a time
        one = ids[:1, :5]
        texts = [each.generate(one, max_new_tokens=6, do_sample=False) for each in (model, other)]
        assert torch.equal(*texts)


@pytest.mark.parametrize("how", ["disk", "cpu_offload"])
def test_under_autocast_experts_compute_as_ever(family, how, tmp_path):
    model = activate(tiny_model(family, cse_modules=["attention", "ffn"], cse_routing="given"))
    other = loaded(family, how, model, tmp_path)
    batch = {"input_ids": token_ids(), "given_clusters": torch.tensor([0, 1, 2, 4])}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(other(**batch).logits, model(**batch).logits, atol=0, rtol=0)


@pytest.mark.parametrize("how", ["disk", "cpu_offload"])
@pytest.mark.parametrize("flags", [{}, EVIDENCE], ids=["own", "evidence"])
def test_a_fit_refuses_what_is_offloaded(family, how, flags, tmp_path):
    other = loaded(family, how, activate(tiny_model(family, **flags)), tmp_path)
    with pytest.raises(ValueError, match="meta device.*offload"):
        fit_experts(other, [{"input_ids": token_ids()}], sample_size=4, num_clusters=2)
    for module in routed_modules(other).values():
        with pytest.raises(ValueError, match="meta device.*offload"):
            module.fill_expert(0, torch.Generator())


def test_a_device_map_keeps_blocks_whole(family):
    model = tiny_model(family, cse_modules=["attention", "ffn"])
    sizes = [sum(p.numel() * 4 for p in block.parameters()) for block in model.base_model.blocks]
    rest = model.get_memory_footprint() - sum(sizes)
    room = rest + sizes[0] + int(1.5 * sizes[1])  # enough for half of the last block
    places = infer_auto_device_map(
        model, max_memory={"cpu": room, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    inside = [name for name in places if name.startswith(PREFIX[family] + ".")]
    assert set(places.values()) == {"cpu", "disk"}
    assert inside and all(name.removeprefix(PREFIX[family] + ".").isdigit() for name in inside)
