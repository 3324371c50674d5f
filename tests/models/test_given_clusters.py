# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of clusters that come with the batch: in which forms, and what is refused."""

import pytest
import torch
from tiny import EVIDENCE, activate, labelled, tiny_model, token_ids

from modeling_cse import fit_experts


def told(family: str = "gpt2", head: str | None = None, **flags):
    return activate(tiny_model(family, head, cse_routing="given", **flags))


@torch.no_grad()
def test_choices_may_be_told_as_the_batch_has_them():
    model = told("bert", "ForMultipleChoice")
    batch = {name: value for name, value in labelled("bert", "ForMultipleChoice").items() if name != "labels"}
    labels = torch.tensor([[1, 2], [2, 4]])  # two rows of two choices of 16 tokens
    wanted = model(**batch, given_clusters=labels.flatten()).logits
    assert torch.equal(model(**batch, given_clusters=labels).logits, wanted)
    assert torch.equal(model(**batch, given_clusters=labels[..., None].expand(2, 2, 16)).logits, wanted)
    rows = model(**batch, given_clusters=torch.tensor([1, 2])).logits
    assert torch.equal(rows, model(**batch, given_clusters=torch.tensor([1, 1, 2, 2])).logits)
    assert not torch.equal(rows, wanted)


@pytest.mark.parametrize(("labels", "ends"), [([0, 1, 2, 16], "0 to 16"), ([-2, 1, 2, 3], "-2 to 3")])
def test_labels_beyond_the_clusters_are_refused(family, labels, ends):
    with pytest.raises(ValueError, match=f"given_clusters from {ends} is not allowed.* - 1 = 15"):
        told(family)(token_ids(), given_clusters=torch.tensor(labels))


@pytest.mark.parametrize("routing", ["given", "evidence"])
def test_routes_without_labels_name_their_routing(routing):
    model = activate(tiny_model("gpt2", cse_routing=routing))
    model.config.cse_routing = "discriminant"  # what reads evidence goes by it, routers are built
    with pytest.raises(ValueError, match=f"given_clusters=None is not allowed with cse_routing='{routing}'"):
        model(token_ids())


def test_clusters_that_are_found_have_no_labels():
    """Their numbers would have nothing to do with those of the batch."""
    batches = [{"input_ids": token_ids(8), "given_clusters": torch.arange(8) % 4}]
    with pytest.raises(ValueError, match="algorithm='kmeans' is not allowed with cse_routing='given'"):
        fit_experts(tiny_model("gpt2", cse_routing="given"), batches, num_clusters=2)
    fit_experts(tiny_model("gpt2", cse_routing="given"), batches, algorithm="given")


@torch.no_grad()
def test_evidence_takes_the_shapes_that_the_stock_model_takes():
    model = activate(tiny_model("gpt2", "Model", **EVIDENCE))
    ids = token_ids().view(2, 2, 16)
    states = model(ids).last_hidden_state
    assert torch.equal(states.flatten(0, 1), model(ids.flatten(0, 1)).last_hidden_state)


def test_a_token_without_evidence_is_refused():
    model = activate(tiny_model("gpt2", **EVIDENCE))
    model.set_input_embeddings(torch.nn.Embedding(120, 32))
    with pytest.raises(ValueError, match=r"input_ids up to 110 .* evidence of 99 tokens.*resize_token_embeddings"):
        model(torch.tensor([[5, 110, 7]]))


@torch.no_grad()
def test_a_decoder_with_whole_sequences_takes_no_cache():
    model = activate(tiny_model("bert", "Model", is_decoder=True, cse_routing="sequence"))
    ids = token_ids()
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values is not empty, which cse_routing='sequence'"):
        model(ids[:, 8:], past_key_values=cache)


def test_without_layers_nothing_is_left_of_evidence(family, tmp_path):
    model = tiny_model(family, **EVIDENCE)
    model.base_model.drop_idle_layers()
    assert model.config.cse_layers == [] and not hasattr(model.base_model, "evidence_router")
    model.save_pretrained(tmp_path)
    _, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_documents_of_a_prompt_are_read_in_chunks_too():
    """By their positions, which each chunk has only a part of."""
    model = activate(tiny_model("gpt2", **EVIDENCE), noise=0.5)
    ids, places = token_ids(2), torch.cat([torch.arange(4), torch.arange(12)]).expand(2, -1)
    seen = []
    model.base_model.evidence_router.register_forward_hook(lambda module, inputs, output: seen.append(output))
    routes = {}
    for chunk in (None, 8):
        seen.clear()
        model.generate(ids, position_ids=places, prefill_chunk_size=chunk, max_new_tokens=1, pad_token_id=0)
        routes[chunk] = seen[-1][:, :16]
    assert torch.equal(routes[None], routes[8])
    assert not torch.equal(routes[8], model.base_model.read_clusters(ids))
