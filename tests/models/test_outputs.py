# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass gives back, and that every way to compute it gives the same."""

import inspect

import pytest
import torch
from tiny import (
    EVERY_HEAD,
    LANGUAGE_HEADS,
    activate,
    dense_model,
    first_tensor,
    labelled,
    model_class,
    routed_module,
    routed_modules,
    tiny_model,
    token_ids,
)
from transformers.utils.generic import find_labels


KEYS = ("router_logits", "cluster_ids")


def inputs_of(family: str, head: str, **sizes) -> dict:
    """A batch of the head without labels."""
    batch = labelled(family, head, **sizes)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("asked_in", ["call", "config"])
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_routing_is_reported_when_asked_for(family, head, asked_in):
    flags = {f"output_{key}": True for key in KEYS}
    model = activate(tiny_model(family, head, **(flags if asked_in == "config" else {})))
    batch = labelled(family, head)
    outputs = model(**batch, **(flags if asked_in == "call" else {}))
    assert len(outputs.router_logits) == len(outputs.cluster_ids) == 2
    for logits, ids in zip(outputs.router_logits, outputs.cluster_ids, strict=True):
        assert logits.shape == (64, 16) and logits.dtype == torch.float32
        assert ids.shape == (4, 16) and ids.dtype == torch.int64
        assert torch.equal(logits.argmax(-1), ids.flatten()) and 0 <= ids.min() and ids.max() < 5
        assert (logits[:, 5:] == torch.finfo(torch.float32).min).all()
    assert head == "Model" or outputs.loss is not None


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_only_what_was_asked_for_is_reported(family, head, key):
    model = activate(tiny_model(family, head))
    batch = inputs_of(family, head)
    plain, asked = model(**batch), model(**batch, **{f"output_{key}": True})
    other = KEYS[1 - KEYS.index(key)]
    assert plain.get(key) is None and plain.get(other) is None and asked.get(other) is None
    assert len(asked[key]) == 2
    assert torch.equal(first_tensor(plain), first_tensor(asked))
    switched = tiny_model(family, head, **{f"output_{key}": True})
    assert switched(**batch, **{f"output_{key}": False}).get(key) is None


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_tuples_carry_routing_at_their_end(family, head):
    model = activate(tiny_model(family, head))
    batch = labelled(family, head)
    plain = model(**batch, return_dict=False)
    named = model(**batch, output_router_logits=True, output_cluster_ids=True)
    outputs = model(**batch, output_router_logits=True, output_cluster_ids=True, return_dict=False)
    assert isinstance(outputs, tuple) and len(outputs) == len(plain) + 2
    for got, wanted in zip(outputs[-2:], (named.router_logits, named.cluster_ids), strict=True):
        assert len(got) == 2 and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(outputs[0], plain[0])


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_without_clusters_every_id_is_minus_one(family, head):
    outputs = tiny_model(family, head)(**inputs_of(family, head), output_cluster_ids=True)
    assert all((ids == -1).all() for ids in outputs.cluster_ids)


def test_model_without_expert_layers_reports_nothing(family):
    outputs = tiny_model(family, cse_layers=[])(token_ids(), output_cluster_ids=True, output_router_logits=True)
    assert not outputs.cluster_ids and not outputs.router_logits


@pytest.mark.parametrize("wanted", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_stock_outputs_stay(family, head, wanted):
    flags = {wanted: True, "attn_implementation": "eager"}
    outputs = activate(tiny_model(family, head, **flags))(token_ids(), output_cluster_ids=True)
    dense = dense_model(family, head, **flags)(token_ids())
    key = wanted.removeprefix("output_")
    assert [part.shape for part in outputs[key]] == [part.shape for part in dense[key]]
    assert len(outputs.cluster_ids) == 2


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_stock_arguments_stay_visible(family, head):
    """`Trainer` drops the columns that it does not find here, `generate` and pipelines ask for single names."""
    ours = inspect.signature(tiny_model(family, head).forward).parameters
    stock = inspect.signature(dense_model(family, head).forward).parameters
    assert [name for name in stock if name not in ours] == []


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_stock_arguments_keep_their_places(family, head):
    model, dense = tiny_model(family, head), dense_model(family, head)
    model.load_state_dict(dense.state_dict(), strict=False)
    names = [name for name in inspect.signature(dense.forward).parameters][:4]
    batch = inputs_of(family, head)
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
    values = [batch.get(name) for name in names]
    assert torch.equal(first_tensor(model(*values)), first_tensor(dense(*values)))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_implementations_of_experts_agree(family, head, combine, routing, modules, implementation):
    flags = {"cse_combine": combine, "cse_routing": routing, "cse_modules": modules}
    eager = activate(tiny_model(family, head, experts_implementation="eager", **flags))
    other = activate(tiny_model(family, head, experts_implementation=implementation, **flags))
    assert (eager.config._experts_implementation, other.config._experts_implementation) == ("eager", implementation)
    batch = labelled(family, head)
    wanted, got = eager(**batch), other(**batch)
    torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
    wanted.loss.backward()
    got.loss.backward()
    ours = dict(other.named_parameters())
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_grouped_products_are_the_default(family):
    assert tiny_model(family).config._experts_implementation == "grouped_mm"


def test_a_stock_model_built_before_does_not_choose_for_ours(family, monkeypatch):
    """Upstream keeps on each class whether it has experts, where classes derived from it look as well."""
    kept = "_can_set_experts_implementation_cached_value"
    for each in type(tiny_model(family).base_model).__mro__:
        if kept in vars(each):
            monkeypatch.delattr(each, kept)
    dense_model(family, "Model")
    assert tiny_model(family, "Model").config._experts_implementation == "grouped_mm"
    assert tiny_model(family, "Model", experts_implementation="eager").config._experts_implementation == "eager"


@pytest.mark.parametrize(
    ("family", "head", "combine"), [("gpt2", "ForCausalLM", "replace"), ("bert", "ForMaskedLM", "add")]
)
def test_exported_model_gives_the_same(family, head, combine):
    """With experts at work, and for tokens that take other routes than those it was exported with."""
    depth = {"gpt2": "n_layer", "bert": "num_hidden_layers"}[family]
    flags = {"cse_modules": ["attention", "ffn"], "cse_combine": combine, "cse_routing": "discriminant", depth: 1}
    model, ids = activate(tiny_model(family, head, **flags)), token_ids(2, 12, seed=1)
    options = {"use_cache": False} if family == "gpt2" else {}
    with torch.no_grad():
        exported = torch.export.export(model, (token_ids(2, 12),), options, strict=False).module()
        wanted = model(ids, **options, output_cluster_ids=True)
        torch.testing.assert_close(exported(ids, **options).logits, wanted.logits, atol=1e-5, rtol=1e-5)
    assert all(len(layer.unique()) > 1 for layer in wanted.cluster_ids)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_autocast_runs_experts_in_bf16_and_routers_in_fp32(family, head, combine, implementation, monkeypatch):
    flags = {"cse_combine": combine, "experts_implementation": implementation}
    model = activate(tiny_model(family, head, **flags))
    batch, seen = labelled(family, head), set()
    for ffn in routed_modules(model).values():
        act = ffn.experts.act_fn
        monkeypatch.setattr(ffn.experts, "act_fn", _Spy(act, seen))
    exact = model(**batch, output_router_logits=True)
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, output_router_logits=True)
    assert seen == {torch.bfloat16}
    assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, exact.loss, atol=0, rtol=0.05)
    for ffn in routed_modules(model).values():
        assert ffn.experts.up_proj.grad.dtype == torch.float32 and ffn.experts.up_proj.grad.abs().sum() > 0


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_autocast_runs_attention_experts_in_bf16_and_routers_in_fp32(family, head, combine, implementation):
    flags = {"cse_combine": combine, "experts_implementation": implementation, "cse_modules": ["attention"]}
    model = activate(tiny_model(family, head, **flags))
    batch, seen = labelled(family, head), []
    exact = model(**batch)
    for attention in routed_modules(model).values():
        attention.experts.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch, output_router_logits=True)
    assert set(seen) == {torch.bfloat16} and len(seen) == 2 * (2 if family == "gpt2" else 4)
    assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, exact.loss, atol=0, rtol=0.05)
    for attention in routed_modules(model).values():
        for parameter in attention.experts.parameters():
            assert parameter.grad.dtype == torch.float32 and parameter.grad.abs().sum() > 0


class _Spy(torch.nn.Module):
    """An activation that notes in which dtype it works."""

    def __init__(self, inner, seen: set):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, states):
        self.seen.add(states.dtype)
        return self.inner(states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_half_precision_models_run(family, head, combine, routing, modules, dtype):
    model = activate(tiny_model(family, head, cse_combine=combine, cse_routing=routing, cse_modules=modules))
    wanted = model(token_ids()).logits
    got = model.to(dtype)(token_ids()).logits
    assert got.dtype == dtype and torch.isfinite(got).all()
    # a route may flip where two clusters are nearly as good, hence most and not all
    assert ((got.float() - wanted).abs() < 0.15).float().mean() > 0.9


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_training_reaches_routed_experts_and_never_routers(family, head, combine):
    model = activate(tiny_model(family, head, cse_combine=combine, cse_routing="discriminant")).train()
    outputs = model(**labelled(family, head, rows=8), output_cluster_ids=True)
    (outputs.last_hidden_state.square().sum() if head == "Model" else outputs.loss).backward()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not any(".router." in name for name, _ in model.named_parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]) and not buffer.requires_grad, name
    pooled = head in ("ForSequenceClassification", "ForNextSentencePrediction", "ForMultipleChoice")
    for ffn, ids in zip(routed_modules(model).values(), outputs.cluster_ids, strict=True):
        used = set(ffn.router.cluster_expert[ids].flatten().tolist()) - {-1}
        moved = {slot for slot, gradient in enumerate(ffn.experts.up_proj.grad) if gradient.abs().sum() > 0}
        # slot 1 has no owner; where one token stands for the sequence, others have no gradient in the last layer
        assert 1 not in moved and (moved <= used if pooled else moved == used)
    assert routed_module(model, 1).experts.up_proj.grad.abs().sum() > 0


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_language_heads_have_the_fields_also_when_nothing_was_asked_for(family, head):
    """Callers read `outputs.router_logits` without knowing the config, as with every mixture-of-experts model."""
    outputs = activate(tiny_model(family, head))(**labelled(family, head))
    assert outputs.router_logits is None and outputs.cluster_ids is None


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_trainer_finds_the_same_labels_as_in_the_stock_head(family, head):
    """It goes by argument names: one with "label" in it would make every evaluation lose its loss."""
    assert find_labels(model_class(family, head)) == find_labels(type(dense_model(family, head)))
