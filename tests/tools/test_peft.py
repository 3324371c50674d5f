# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises under PEFT: adapters on base and experts reach the tokens that are theirs, merge into what they were, and
come back from their files; clusters stay as they are."""

import pytest
import torch
from tiny import EVIDENCE, activate, expert_ids, first_tensor, routed_modules, tiny_model, token_ids
from tiny_runs import make_trainer, rows, settings
from transformers import AutoModelForCausalLM

from modeling_cse import ClusterExpertsCallback, fit_experts


peft = pytest.importorskip("peft")

FFN_EXPERTS = ["mlp.experts.up_proj", "mlp.experts.down_proj"]
ATTENTION_EXPERTS = ["experts.qkv_proj", "experts.out_proj"]
BASE_FFN = {"gpt2": ["mlp.c_fc", "mlp.c_proj"], "bert": ["intermediate.dense", "output.dense"]}
ATTENTION = {"gpt2": ["c_attn"], "bert": ["query", "value"]}
BOTH = {"cse_modules": ["attention", "ffn"]}
# Name: flags of the model; then what one or more adapters aim at, side by side. PEFT takes Conv1D and
# `target_parameters` in one adapter for a contradiction, so that GPT-2 needs two.
TARGETS = {
    "attention": lambda family: ({}, {"target_modules": ATTENTION[family]}),
    "base FFN": lambda family: ({}, {"target_modules": BASE_FFN[family]}),
    "all-linear": lambda family: ({}, {"target_modules": "all-linear"}),
    "FFN experts": lambda family: ({}, {"target_modules": [], "target_parameters": FFN_EXPERTS}),
    "an expert's bias": lambda family: ({}, {"target_modules": [], "target_parameters": ["experts.up_proj_bias"]}),
    "attention experts": lambda family: (BOTH, {"target_modules": [], "target_parameters": ATTENTION_EXPERTS}),
    "all beside experts of attention": lambda family: (
        BOTH | {"cse_combine": "add"},
        {"target_modules": ATTENTION[family]},
        {"target_modules": [], "target_parameters": [*FFN_EXPERTS, *ATTENTION_EXPERTS]},
    ),
    "FFN experts by evidence": lambda family: (EVIDENCE, {"target_modules": [], "target_parameters": FFN_EXPERTS}),
}


def adapt(model, *options):
    """The model under adapters that do something from the start."""
    torch.manual_seed(3)
    shared = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    configs = {f"adapter{i}": peft.LoraConfig(**shared, **each) for i, each in enumerate(options)}
    model = peft.get_peft_model(model, configs["adapter0"], adapter_name="adapter0")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    model.base_model.set_adapter(list(configs))
    return model


def adapted(family: str, target: str, **more):
    flags, *options = TARGETS[target](family)
    return adapt(activate(tiny_model(family, **{"cse_routing": "discriminant", **flags, **more})), *options)


@torch.no_grad()
def outputs(model, ids=None) -> torch.Tensor:
    return first_tensor(model(token_ids() if ids is None else ids))


@pytest.mark.parametrize("target", TARGETS)
def test_merged_is_unmerged_and_taken_out_is_as_before(family, target):
    flags = {"cse_routing": "discriminant", **TARGETS[target](family)[0]}
    plain = outputs(activate(tiny_model(family, **flags)))
    model = adapted(family, target)
    wanted = outputs(model)
    assert (wanted - plain).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(outputs(model), plain)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), wanted, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), wanted, atol=1e-5, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), plain, atol=1e-5, rtol=0)
    merged = model.merge_and_unload()
    torch.testing.assert_close(outputs(merged), wanted, atol=1e-5, rtol=0)
    assert not any(type(part).__module__.startswith("peft.") for part in merged.modules())


def test_adapters_of_experts_reach_routed_tokens_only(family):
    """And those of the base the others: with one layer of experts, no token of one kind hears of the other's."""
    flags = {"cse_layers": [-1], "cse_routing": "discriminant"}
    model = activate(tiny_model(family, "Model", **flags))
    ids = token_ids()
    with torch.no_grad():
        before = model(ids, output_cluster_ids=True)
    routed = expert_ids(model, before.cluster_ids)[0] >= 0
    assert 0.1 < routed.float().mean() < 0.9
    experts = adapt(model, {"target_modules": [], "target_parameters": FFN_EXPERTS})
    moved = (outputs(experts, ids) - before.last_hidden_state).abs().amax(-1) > 1e-4
    assert torch.equal(moved, routed)
    last = {"gpt2": r"h\.2\.mlp\.c_.*", "bert": r"encoder\.layer\.2\.(intermediate|output)\.dense"}[family]
    base = adapt(activate(tiny_model(family, "Model", **flags)), {"target_modules": last})
    moved = (outputs(base, ids) - before.last_hidden_state).abs().amax(-1) > 1e-4
    assert torch.equal(moved, ~routed)


@pytest.mark.parametrize(
    "target", ["FFN experts", "FFN experts by evidence", "attention experts", "all beside experts of attention"]
)
def test_cached_generation_is_the_full_forward(target):
    model = adapted("gpt2", target).eval()
    ids = token_ids(1, 6)
    options = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
    grown = model.generate(input_ids=ids, **options)
    for length in range(6, 18):
        assert outputs(model, grown[:, :length])[0, -1, 3:].argmax() + 3 == grown[0, length] or grown[0, length] < 3
    model.merge_adapter()
    assert torch.equal(model.generate(input_ids=ids, **options), grown)


@pytest.mark.parametrize("target", ["FFN experts", "FFN experts by evidence", "attention experts"])
def test_autocast_computes_experts_with_their_adapter(target):
    model = adapted("gpt2", target)
    exact = outputs(model)
    seen = []
    experts = next(iter(routed_modules(model.base_model.model).values())).experts
    experts.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough = outputs(model)
    assert seen
    assert 1e-5 < (rough - exact).abs().mean() < 0.05


@pytest.mark.parametrize("target", TARGETS)
def test_trains_under_the_trainer_and_touches_nothing_else(tmp_path, target):
    model = adapted("gpt2", target).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(tmp_path, model=model, max_steps=2)
    trainer.train()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".lora_" in name for name in moved)
    assert {name for name in before if ".router." in name} and not any(".router." in name for name in moved)


@pytest.mark.parametrize("target", TARGETS)
def test_adapter_files_come_back(tmp_path, target):
    flags = TARGETS[target]("gpt2")[0]
    activate(tiny_model("gpt2", **flags)).save_pretrained(tmp_path / "base")
    model = adapted("gpt2", target)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter" / "adapter0", adapter_name="adapter0").eval()
    for name in list(model.peft_config)[1:]:
        loaded.load_adapter(tmp_path / "adapter" / name, name)
    loaded.base_model.set_adapter(list(model.peft_config))
    torch.testing.assert_close(outputs(loaded), outputs(model), atol=1e-6, rtol=0)


def test_an_adapter_finds_its_base_by_itself(tmp_path):
    """With a `task_type`; without one PEFT notes the class, and asks leave to import it (`import_allowlist`)."""
    activate(tiny_model("gpt2")).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapt(base, {"task_type": "CAUSAL_LM", "target_modules": [], "target_parameters": FFN_EXPERTS})
    wanted = outputs(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    for loader in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        loaded = loader.from_pretrained(tmp_path / "adapter" / "adapter0").eval()
        torch.testing.assert_close(outputs(loaded), wanted, atol=1e-6, rtol=0)


def test_default_targets_must_be_named():
    """PEFT knows targets by model type, and ours is not among them: it says so."""
    with pytest.raises(ValueError, match="specify `target_modules`"):
        peft.get_peft_model(tiny_model("gpt2"), peft.LoraConfig())


@pytest.mark.parametrize(
    ("targets", "name"), [(["c_attn"], "c_attn"), (["attn.c_proj"], "c_proj"), ("all-linear", "c_attn")]
)
def test_adapters_that_a_merge_would_change_are_refused(targets, name):
    model = adapt(activate(tiny_model("gpt2", **BOTH)), {"target_modules": targets})
    with pytest.raises(ValueError, match=f"{name}=Linear is not allowed.*target_parameters"):
        outputs(model)


def test_what_is_refused_has_a_way_out():
    model = activate(tiny_model("gpt2", **BOTH))
    out = r".*\.[12]\.attn\.c_(attn|proj)"
    model = adapt(
        model,
        {"target_modules": "all-linear", "exclude_modules": out},
        {"target_modules": [], "target_parameters": ATTENTION_EXPERTS},
    )
    wanted = outputs(model)
    torch.testing.assert_close(outputs(model.merge_and_unload()), wanted, atol=1e-5, rtol=0)


def test_a_projection_that_knows_no_experts_is_refused():
    model = activate(tiny_model("bert", **BOTH))
    inner = model.bert.encoder.layer[1].attention.self
    inner.query = torch.nn.Linear(32, 32)
    with pytest.raises(ValueError, match="query=Linear is not allowed.*pass them over"):
        outputs(model)


def test_clusters_are_not_fitted_under_adapters(tmp_path):
    """Adapter files hold no clusters."""
    model = adapted("gpt2", "FFN experts")
    trainer = make_trainer(tmp_path, ClusterExpertsCallback(**settings()), model=model)
    with pytest.raises(ValueError, match="PEFT.*merge_and_unload"):
        trainer.train()
    batches = [{"input_ids": torch.stack([row["input_ids"] for row in rows(32)])}]
    with pytest.raises(ValueError, match="PEFT.*merge_and_unload"):
        fit_experts(model, batches, num_clusters=3)
    assert "cse/seconds" in fit_experts(model.merge_and_unload(), batches, num_clusters=3)
