# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of saved evidence, of either gate: it is the same when it is loaded, or loading says why it cannot be."""

import pytest
import torch
from evidence_models import EXACT, evidence_model, outputs_of
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE_HEADS, activate, routed_module, tiny_model, token_ids

from modeling_cse import CSEGPT2ForSequenceClassification


pytestmark = pytest.mark.usefixtures("gate")


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_to_the_bit(family, head, dtype, tmp_path):
    model, ids = evidence_model(family).to(dtype), token_ids()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "evidence_cse.py").is_file()
    again = type(model).from_pretrained(tmp_path, dtype=dtype).eval()
    buffers = dict(again.base_model.evidence_router.named_buffers())
    assert {buffer.dtype for buffer in buffers.values()} == {torch.float32} and len(buffers) == 2
    for name, buffer in model.base_model.evidence_router.named_buffers():
        torch.testing.assert_close(buffers[name], buffer, **EXACT)
    ours, theirs = outputs_of(again, ids), outputs_of(model, ids)
    torch.testing.assert_close(ours.logits, theirs.logits, **EXACT)
    assert all(torch.equal(*pair) for pair in zip(ours.cluster_ids, theirs.cluster_ids, strict=True))


def edit(folder, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("layers", [[1, 2], [0, 1, 2]])
def test_experts_without_evidence_are_refused(layers, tmp_path):
    """Also where other layers are new."""
    model = activate(tiny_model("gpt2"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks the routing state .*evidence_router\.evidence"):
        type(model).from_pretrained(tmp_path, cse_routing="evidence", cse_layers=layers)


FLAWS = {
    "evidence is not finite": lambda state: state["evidence"].fill_(torch.nan),
    "evidence goes up to 9": lambda state: state["evidence"].fill_(9.0),
    "log_shares is not finite": lambda state: state["log_shares"].fill_(torch.inf),
    "log_shares are .*0 or less": lambda state: state["log_shares"].fill_(1.0),
    "log_shares are .*unused rows last": lambda state: state["log_shares"].copy_(state["log_shares"].flip(0)),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_what_no_fit_has_written_is_refused(flaw, tmp_path):
    model = evidence_model()
    assert model.base_model.routing_flaw() is None
    model.save_pretrained(tmp_path)
    prefix = "transformer.evidence_router."
    edit(tmp_path, lambda tensors: FLAWS[flaw]({n.removeprefix(prefix): t for n, t in tensors.items()}))
    with pytest.raises(ValueError, match=rf"cut or edited: evidence_router\.{flaw}"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("changed", [{"vocab_size": 120}, {"cse_expert_size": 256}, {"cse_max_clusters": 32}], ids=str)
def test_what_is_in_use_is_not_drawn_anew(changed, tmp_path):
    """Whatever head is fine-tuned."""
    evidence_model().save_pretrained(tmp_path)
    load = CSEGPT2ForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"ignore_mismatched_sizes=True is not allowed for \['transformer"):
        load(tmp_path, num_labels=5, ignore_mismatched_sizes=True, **changed)


def test_clusters_without_a_discriminant_are_not_routed_by_one(tmp_path):
    model = evidence_model()
    for site in (1, 2):
        routed_module(model, site).router.discriminant_weight.zero_()  # as a fit for evidence leaves it
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cse_routing='discriminant' is not allowed for the checkpoint"):
        type(model).from_pretrained(tmp_path, cse_routing="discriminant", cse_gate="hard")
    loaded = type(model).from_pretrained(tmp_path, cse_routing="sequence", cse_gate="hard")
    assert len(outputs_of(loaded, token_ids(32)).cluster_ids[0].unique()) > 1


@pytest.mark.parametrize("routing", ["evidence", "sequence", "discriminant"])
def test_a_rounded_routing_state_is_refused_by_name(routing):
    model = activate(tiny_model("gpt2", cse_routing=routing))
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None and value.is_floating_point():
                module._buffers[name] = value.bfloat16()  # as accelerate's load_checkpoint_and_dispatch does
    with pytest.raises(ValueError, match=r"of dtype torch.bfloat16 is not allowed: the routing state must be"):
        model(token_ids())


@pytest.mark.parametrize("size", [80, 120])
def test_a_vocabulary_of_another_size_keeps_its_routes(size, tmp_path):
    model, ids = evidence_model(), token_ids() % 75 + 5
    before = outputs_of(model, ids).cluster_ids
    model.resize_token_embeddings(size)
    assert model.base_model.evidence_router.evidence.shape[0] == size
    if size > 99:
        assert not model.base_model.evidence_router.evidence[99:].any()
    model.save_pretrained(tmp_path)
    for each in (model, type(model).from_pretrained(tmp_path).eval()):
        found = outputs_of(each, ids).cluster_ids
        assert all(torch.equal(*pair) for pair in zip(found, before, strict=True))


def test_the_separator_is_not_cut_off(tmp_path):
    model = evidence_model(cse_separator_token_id=90)
    for size in (80, 90):
        with pytest.raises(ValueError, match=f"new_num_tokens={size} is not allowed with cse_separator_token_id=90"):
            model.resize_token_embeddings(size)
    assert model.config.vocab_size == 99
    model.resize_token_embeddings(91)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).config.cse_separator_token_id == 90
    model.config.cse_separator_token_id = None
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size == 128 and model.resize_token_embeddings(50).num_embeddings == 50


@pytest.mark.parametrize(
    ("evidence", "shares"),
    [
        (torch.zeros(98, 2), torch.ones(2)),
        (torch.zeros(99, 2), torch.ones(3)),
        (torch.zeros(99, 17), torch.ones(17)),
        (torch.zeros(99, 0), torch.ones(0)),
        (torch.full((99, 2), torch.nan), torch.ones(2)),
        (torch.zeros(99, 2), torch.zeros(2)),
    ],
)
def test_evidence_that_does_not_fit_is_not_written(evidence, shares):
    router = evidence_model().base_model.evidence_router
    before = router.evidence.clone()
    with pytest.raises(ValueError, match="evidence"):
        router.write(evidence, shares)
    torch.testing.assert_close(router.evidence, before, **EXACT)
