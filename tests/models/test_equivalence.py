# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises to those who come from a dense model: same weights and same logits until experts have learned something."""

import pytest
import torch
from tiny import (
    EVERY_HEAD,
    FLAGS,
    LANGUAGE_HEADS,
    activate,
    dense_model,
    first_tensor,
    labelled,
    model_class,
    routed_modules,
    tiny_model,
    token_ids,
)

from modeling_cse import fit_experts


OWN = (".router.", ".experts.")


def is_own(key: str) -> bool:
    return any(part in key for part in OWN)


def with_weights_of(dense, family: str, head: str, **flags):
    """A model with experts that took over the dense model's weights."""
    model = tiny_model(family, head, seed=1, **flags)
    keys = model.load_state_dict(dense.state_dict(), strict=False)
    assert not keys.unexpected_keys and keys.missing_keys and all(map(is_own, keys.missing_keys))
    return model


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_no_expert_layer_is_exactly_the_dense_model(family, head):
    dense, model = dense_model(family, head), tiny_model(family, head, cse_layers=[])
    ours, stock = model.state_dict(), dense.state_dict()
    assert list(ours) == list(stock)
    assert all(torch.equal(ours[key], stock[key]) for key in stock)
    batch = labelled(family, head)
    with torch.no_grad():
        got, wanted = model(**batch), dense(**batch)
    assert torch.equal(first_tensor(got), first_tensor(wanted))
    if head != "Model":
        torch.testing.assert_close(got.loss, wanted.loss)


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_base_weights_are_drawn_as_the_stock_model_draws_them(family, head, modules):
    """The scaled initialisation of GPT-2's residual projections reaches the layers with experts too."""
    model, dense = tiny_model(family, head, cse_modules=modules), dense_model(family, head)
    for key, stock in dense.state_dict().items():
        ours = model.state_dict()[key]
        assert ours.shape == stock.shape
        if stock.numel() >= 1024:
            assert float(ours.std()) == pytest.approx(float(stock.std()), rel=0.2), key


@pytest.mark.parametrize("modules", [["ffn"], ["attention", "ffn"]], ids="+".join)
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_before_clusters_the_model_is_the_dense_model(family, head, combine, modules):
    dense = dense_model(family, head)
    model = with_weights_of(dense, family, head, cse_combine=combine, cse_modules=modules)
    batch = labelled(family, head)
    with torch.no_grad():
        assert torch.equal(first_tensor(model(**batch)), first_tensor(dense(**batch)))


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "bert": {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("routing", ["discriminant", "sequence"])
def test_before_clusters_training_is_the_dense_models(family, head, combine, routing, modules):
    """Loss and gradients of a step with dropout, to the bit; then the weights after the step."""
    dense = dense_model(family, head, **DROPOUT[family])
    flags = {"cse_combine": combine, "cse_routing": routing, "cse_modules": modules}
    model = with_weights_of(dense, family, head, **flags, **DROPOUT[family])
    losses, batch = [], labelled(family, head)
    for each in (dense, model):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(each.train().parameters(), lr=1e-2)
        loss = each(**batch).loss
        loss.backward()
        losses.append(loss)
        optimizer.step()
    assert torch.equal(*losses)
    ours = dict(model.named_parameters())
    for name, stock in dense.named_parameters():
        assert torch.equal(stock.grad, ours[name].grad), name
        assert torch.equal(stock, ours[name]), name
    assert all(ours[name].grad is None for name in ours if is_own(name))


@pytest.mark.parametrize("modules", [["ffn"], ["attention", "ffn"]], ids="+".join)
@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_dense_checkpoint_loads(family, head, combine, modules, tmp_path):
    dense = dense_model(family, head)
    dense.save_pretrained(tmp_path)
    flags = {**FLAGS[family], "cse_combine": combine, "cse_modules": modules}
    model, info = model_class(family, head).from_pretrained(tmp_path, **flags, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert info["missing_keys"] and all(map(is_own, info["missing_keys"]))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for ffn in routed_modules(model).values():
        assert ffn.router.num_clusters == 0
        for name, empty in ffn.router.empty_state().items():
            assert torch.equal(getattr(ffn.router, name), empty), name
    batch = labelled(family, head)
    with torch.no_grad():
        assert torch.equal(first_tensor(model(**batch)), first_tensor(dense(**batch)))


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("routing", ["discriminant", "sequence"])
@pytest.mark.parametrize(
    ("inner", "modules"), [(64, ["ffn"]), (60, ["ffn"]), (64, ["attention"]), (60, ["attention", "ffn"])], ids=str
)
def test_switching_experts_on_changes_no_logit(family, head, combine, routing, inner, modules, tmp_path):
    """The base width need not be one that experts can have."""
    fields = {"n_inner" if family == "gpt2" else "intermediate_size": inner}
    dense = dense_model(family, head, **fields)
    dense.save_pretrained(tmp_path)
    flags = {"cse_combine": combine, "cse_routing": routing, "cse_modules": modules}
    model = model_class(family, head).from_pretrained(tmp_path, **flags).eval()
    batch = {"input_ids": token_ids(32, 16), "attention_mask": torch.ones(32, 16, dtype=torch.long)}
    fit_experts(model, [batch], num_clusters=4, common_share=0.3)
    with torch.no_grad():
        wanted, got = dense(**batch).logits, model(**batch, output_cluster_ids=True)
    for layer, (ffn, ids) in enumerate(zip(routed_modules(model).values(), got.cluster_ids, strict=True)):
        assert (ffn.router.cluster_expert[ids] >= 0).any(), f"nothing is routed in CSE layer {layer}"
    if combine == "add":
        assert torch.equal(got.logits, wanted)
    else:
        torch.testing.assert_close(got.logits, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_experts_that_learned_something_matter(family, head, combine, modules):
    """The other tests mean something only if `activate` makes a difference."""
    flags = {"cse_combine": combine, "cse_modules": modules, "cse_routing": "discriminant"}
    model, ids = tiny_model(family, head, **flags), token_ids()
    with torch.no_grad():
        before, after = model(ids).logits, activate(model)(ids, output_cluster_ids=True)
    assert (before - after.logits).abs().max() > 0.5
    assert all(len(layer.unique()) > 1 for layer in after.cluster_ids)


# Forms of attention that a stock model can have, and whether it reads an encoder.
FORMS = {
    "GPT-2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, False),
    "GPT-2, upcast": ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}, False),
    "GPT-2, unscaled": ("gpt2", {"scale_attn_weights": False}, False),
    "GPT-2, reading an encoder": ("gpt2", {"add_cross_attention": True}, True),
    "BERT, decoder": ("bert", {"is_decoder": True}, False),
    "BERT, decoder reading an encoder": ("bert", {"is_decoder": True, "add_cross_attention": True}, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_attention_keeps_its_logits(form, combine, modules):
    """Experts that were just filled change nothing; those that learned something do, and read the encoder too."""
    family, fields, encoder = FORMS[form]
    dense = dense_model(family, "Model", **fields)
    flags = {"cse_combine": combine, "cse_modules": modules, "cse_routing": "discriminant"}
    model = with_weights_of(dense, family, "Model", **fields, **flags)
    inputs = {"input_ids": token_ids()}
    if encoder:
        inputs["encoder_hidden_states"] = torch.randn(4, 5, 32)
        inputs["encoder_attention_mask"] = torch.tensor([[1] * 5, [1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    with torch.no_grad():
        wanted = dense(**inputs).last_hidden_state
        got = activate(model, noise=0.0)(**inputs, output_cluster_ids=True)
        torch.testing.assert_close(got.last_hidden_state, wanted, atol=1e-5, rtol=0)
        assert all(len(ids.unique()) > 1 for ids in got.cluster_ids)
        learned = activate(model)(**inputs).last_hidden_state
        assert (learned - wanted).abs().max() > 0.1
        if encoder:
            other = {**inputs, "encoder_hidden_states": -inputs["encoder_hidden_states"]}
            assert (model(**other).last_hidden_state - learned).abs().max() > 0.1
