# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a token may see: nothing later, no padding, no other row, no other document of its row."""

import logging

import pytest
import torch
from tiny import LANGUAGE_HEADS, activate, expert_ids, tiny_model, token_ids
from transformers import DynamicCache


LENGTH = 24
# Products over another number of rows round differently; in bf16 a unit in the last place of a logit near 2 is 0.0156.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def active(family: str = "gpt2", dtype: torch.dtype = torch.float32, **flags):
    return activate(tiny_model(family, **flags)).to(dtype)


@torch.no_grad()
def run(model, ids, **inputs):
    """Logits, and the expert of every token by layer."""
    outputs = model(input_ids=ids, output_cluster_ids=True, **inputs)
    return outputs.logits.float(), expert_ids(model, outputs.cluster_ids)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def test_later_tokens_do_change_earlier_logits_with_sequence_routes():
    """The check above can fail: this routing is known to leak, and says so."""
    model = active(cse_routing="sequence")
    ids = token_ids(16, LENGTH)
    changed = torch.cat([ids[:, :8], token_ids(16, LENGTH, seed=1)[:, 8:]], 1)
    assert (run(model, ids)[0] - run(model, changed)[0])[:, :8].abs().max() > 0.1


@pytest.mark.parametrize("method", ["generate", "generate_batch"])
def test_sequence_routes_refuse_to_generate(method):
    with pytest.raises(ValueError, match=rf"{method}\(\).*cse_routing='sequence'.*'discriminant'"):
        getattr(active(cse_routing="sequence"), method)(token_ids(1, 4))


def test_sequence_routes_without_expert_layers_generate():
    model = tiny_model("gpt2", cse_routing="sequence", cse_layers=[])
    assert model.generate(token_ids(1, 4), max_new_tokens=3, min_new_tokens=3).shape == (1, 7)


def test_sequence_routes_refuse_a_filled_cache():
    model, ids = active(cse_routing="sequence"), token_ids(2, 8)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values.*cse_routing='sequence'"):
        model(ids[:, 4:], past_key_values=cache)


def test_sequence_routes_warn_once(caplog):
    logging.Logger.warning_once.cache_clear()
    model = active(cse_routing="sequence")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            model(token_ids(1, 4))
    said = [record.message for record in caplog.records if "later tokens" in record.message]
    assert len(said) == 1 and "cse_routing='discriminant'" in said[0]


def test_causal_routes_and_bert_do_not_warn(caplog):
    logging.Logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        active()(token_ids(1, 4))
        active("bert")(token_ids(1, 4))
    assert "later tokens" not in caplog.text


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_four_dimensional_mask_is_refused_where_sequences_are_averaged(family, head):
    ids = token_ids(2, 6)
    mask = torch.zeros(2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 6, 6\).*2-D"):
        active(family, cse_routing="sequence")(ids, attention_mask=mask)
    assert active(family, cse_routing="discriminant")(ids, attention_mask=mask).logits.shape == (2, 6, 99)


@pytest.mark.parametrize("chunk", [4, 8])
def test_feed_forward_chunks_change_nothing(routing, combine, modules, chunk):
    flags = {"cse_routing": routing, "cse_combine": combine, "cse_modules": modules}
    ids = token_ids(3, 16)
    whole, routes = run(active("bert", **flags), ids)
    parts, chunked_routes = run(active("bert", chunk_size_feed_forward=chunk, **flags), ids)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert torch.equal(chunked_routes, routes)


@pytest.mark.parametrize("cut", [1, 9])
def test_bert_as_a_decoder_is_causal_and_caches(combine, modules, cut):
    flags = {"cse_combine": combine, "cse_modules": modules, "cse_routing": "discriminant"}
    model, ids = active("bert", is_decoder=True, **flags), token_ids(3, 16)
    logits, routes = run(model, ids)
    changed, _ = run(model, torch.cat([ids[:, :cut], token_ids(3, 16, seed=1)[:, cut:]], 1))
    torch.testing.assert_close(changed[:, :cut], logits[:, :cut], atol=1e-5, rtol=0)
    cache = DynamicCache(config=model.config)
    parts = [run(model, part, past_key_values=cache, use_cache=True) for part in (ids[:, :cut], ids[:, cut:])]
    torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), logits, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([part[1] for part in parts], -1), routes)
