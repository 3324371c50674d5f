# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of bad input, one by one: what random batches have shown, each with the words that it is refused with."""

import pytest
import torch
from tiny import EVERY_HEAD, VOCAB, activate, first_tensor, labelled, routed_module, tiny_config, tiny_model, token_ids

from modeling_cse import ClusterExpertsCallback, fit_experts
from modeling_cse.clustering import ClusterSettings, RoutingFeatures, fit_layer, identities_of
from modeling_cse.routing_cse import ClusterRouter


IDS = token_ids(2, 9)
REFUSED = [
    ({"input_ids": IDS.clone().fill_(VOCAB)}, f"input_ids from {VOCAB} to {VOCAB} is not allowed.*0 to {VOCAB - 1}"),
    ({"input_ids": IDS - 50}, "input_ids from -"),
    ({"input_ids": IDS.to(torch.int16)}, "input_ids of dtype torch.int16"),
    ({"input_ids": IDS.float()}, "input_ids of dtype torch.float32"),
    ({"input_ids": IDS[:0]}, r"input_ids of shape \(0, 9\).*at least one token"),
    ({"input_ids": IDS[:, :0]}, r"input_ids of shape \(2, 0\).*at least one token"),
    ({"input_ids": token_ids(2, 65)}, r"input_ids of shape \(2, 65\).*at most 64 tokens"),
    ({"inputs_embeds": torch.zeros(2, 65, 32)}, r"inputs_embeds of shape \(2, 65, 32\).*at most 64 tokens"),
    ({"inputs_embeds": torch.zeros(2, 9, 24)}, "inputs_embeds of shape.*hidden size 32"),
    ({"input_ids": IDS, "position_ids": torch.arange(9).unsqueeze(0) + 60}, "position_ids from 60 to 68.*0 to 63"),
    ({"input_ids": IDS, "position_ids": torch.arange(9.0).unsqueeze(0)}, "position_ids of dtype"),
    ({"input_ids": IDS, "position_ids": torch.arange(7).unsqueeze(0)}, "position_ids of shape.*9 tokens a row"),
    ({"input_ids": IDS, "token_type_ids": IDS.clone().fill_(VOCAB)}, "token_type_ids from"),
    ({"input_ids": IDS, "token_type_ids": torch.zeros(2, 12, dtype=torch.long)}, "token_type_ids of shape"),
]


@pytest.mark.parametrize(("inputs", "words"), REFUSED, ids=lambda part: part if isinstance(part, str) else "")
@pytest.mark.parametrize("layers", [[-1], []], ids=["experts", "dense"])
def test_inputs_that_no_embedding_answers_are_refused_by_name(family, layers, inputs, words):
    with pytest.raises(ValueError, match=words):
        tiny_model(family, cse_layers=layers)(**inputs)


def test_a_cache_counts_towards_the_positions():
    model = tiny_model("gpt2")
    cache = model(token_ids(1, 60), use_cache=True).past_key_values
    assert model(token_ids(1, 4), past_key_values=cache).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"\(1, 1\) after 64 cached tokens.*at most 64"):
        model(token_ids(1, 1), past_key_values=cache)


def test_an_embedding_that_a_tool_has_wrapped_answers_for_itself(family):
    """Adapters stand where the embedding stood, and do not say how many rows it has."""
    model = tiny_model(family, "Model")
    wanted = model(IDS).last_hidden_state
    model.set_input_embeddings(torch.nn.Sequential(model.get_input_embeddings()))
    assert torch.equal(model(IDS).last_hidden_state, wanted)
    with pytest.raises(IndexError):
        model(IDS + VOCAB)


@pytest.mark.parametrize(("family", "head"), EVERY_HEAD)
def test_int32_ids_give_what_int64_ids_give(family, head):
    model = activate(tiny_model(family, head))
    batch = labelled(family, head)
    wanted = first_tensor(model(**batch))
    got = first_tensor(model(**{**batch, "input_ids": batch["input_ids"].int()}))
    assert torch.equal(got, wanted)


def test_sequence_routes_take_what_stock_models_broadcast(family):
    """Positions (T,) in GPT-2, in BERT a mask (1, T) of ones."""
    model = activate(tiny_model(family, cse_routing="sequence"))
    wanted = model(IDS).logits
    broadcast = {"gpt2": {"position_ids": torch.arange(9)}, "bert": {"attention_mask": torch.ones(1, 9)}}[family]
    torch.testing.assert_close(model(IDS, **broadcast).logits, wanted, atol=1e-6, rtol=0)


def test_sequence_routes_refuse_a_mask_of_another_length():
    """Upstream's attention cuts it; which of its places are the tokens, an average cannot know."""
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 12\).*\(2, 9\)"):
        activate(tiny_model("bert"))(IDS, attention_mask=torch.ones(2, 12))


@pytest.mark.parametrize(("scale", "spread"), [(1e30, 0.0), (1e30, 1.0), (1e37, 1.0), (1e-44, 1.0)])
def test_features_beyond_fp32_are_refused(scale, spread):
    points = scale * (1 + spread * torch.randn(24, 32, generator=torch.Generator().manual_seed(0)))
    features = RoutingFeatures(points, points.unsqueeze(1), torch.zeros(24, 1, dtype=torch.long))
    assert_too_large(features)


def test_tokens_beyond_fp32_are_refused_also_where_their_means_are_not():
    tokens = 1e30 * torch.randn(24, 4, 32, generator=torch.Generator().manual_seed(0))
    assert_too_large(RoutingFeatures(torch.zeros(24, 32), tokens, torch.zeros(24, 4, dtype=torch.long)))


def assert_too_large(features: RoutingFeatures) -> None:
    router = ClusterRouter(tiny_config("gpt2"))
    with pytest.raises(ValueError, match="routing features of up to .* overflow in fp32"):
        fit_layer(router, features, ClusterSettings(algorithm="dbscan"), identities_of(router), 4)
    assert router.num_clusters == 0


@pytest.mark.parametrize(("name", "others"), [("layer_budget", {}), ("ema_decay", {"update": "ema"})])
def test_truths_are_no_numbers(name, others):
    with pytest.raises(ValueError, match=f"{name}=True is not allowed"):
        ClusterExpertsCallback(**{name: True}, **others)


def test_fit_experts_takes_no_truth_for_a_number():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="sample_size=True is not allowed"):
        fit_experts(model, [{"input_ids": IDS}], sample_size=True, num_clusters=1)
    assert routed_module(model, 2).router.num_clusters == 0
