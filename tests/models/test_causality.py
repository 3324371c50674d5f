# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What a token may see: nothing later, no padding, no other row, no other document of its row."""

import logging

import pytest
import torch
from tiny import LANGUAGE_HEADS, activate, expert_ids, tiny_model, token_ids


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


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_later_tokens_change_no_earlier_logit(combine, attention, dtype):
    model = active(cse_combine=combine, attn_implementation=attention, dtype=dtype)
    ids, other = token_ids(4, LENGTH), token_ids(4, LENGTH, seed=1)
    logits, routes = run(model, ids)
    for cut in (1, 2, 7, 16, LENGTH - 1):
        changed_logits, changed_routes = run(model, torch.cat([ids[:, :cut], other[:, cut:]], 1))
        torch.testing.assert_close(changed_logits[:, :cut], logits[:, :cut], atol=TOLERANCE[dtype], rtol=0)
        assert torch.equal(changed_routes[..., :cut], routes[..., :cut])
        assert (changed_logits[:, cut:] - logits[:, cut:]).abs().max() > 0.5


def test_later_tokens_do_change_earlier_logits_with_sequence_routes():
    """The check above can fail: this routing is known to leak, and says so."""
    model = active(cse_routing="sequence")
    ids = token_ids(16, LENGTH)
    changed = torch.cat([ids[:, :8], token_ids(16, LENGTH, seed=1)[:, 8:]], 1)
    assert (run(model, ids)[0] - run(model, changed)[0])[:, :8].abs().max() > 0.1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_rows_do_not_see_each_other(family, routing, combine):
    model = active(family, cse_routing=routing, cse_combine=combine)
    ids = token_ids(5, LENGTH)
    logits, routes = run(model, ids)
    for row in range(5):
        alone, route = run(model, ids[row : row + 1])
        torch.testing.assert_close(alone[0], logits[row], atol=1e-5, rtol=0)
        assert torch.equal(route[:, 0], routes[:, row])


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family, routing, combine, side):
    model = active(family, cse_routing=routing, cse_combine=combine)
    ids = token_ids(3, LENGTH)
    logits, routes = run(model, ids)
    pad, ones = torch.zeros(3, 9, dtype=torch.long), torch.ones_like(ids)
    order = slice(None, None, -1) if side == "right" else slice(None)
    place = slice(9, None) if side == "left" else slice(0, LENGTH)
    mask = torch.cat([pad, ones][order], 1)
    for filler in (0, 7):
        padded = torch.cat([pad + filler, ids][order], 1)
        got, route = run(model, padded, attention_mask=mask, position_ids=positions(mask))
        torch.testing.assert_close(got[:, place], logits, atol=1e-5, rtol=0)
        assert torch.equal(route[..., place], routes)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(routing, combine, attention):
    """Positions that start again split a row into documents, for attention as for routes."""
    model = active(cse_routing=routing, cse_combine=combine, attn_implementation=attention)
    documents = [token_ids(2, length, seed=length) for length in (7, 12, 5)]
    places = torch.cat([torch.arange(d.shape[1]) for d in documents]).expand(2, -1)
    logits, routes = run(model, torch.cat(documents, 1), position_ids=places, use_cache=False)
    start = 0
    for document in documents:
        stop = start + document.shape[1]
        alone, route = run(model, document)
        torch.testing.assert_close(logits[:, start:stop], alone, atol=1e-5, rtol=0)
        assert torch.equal(routes[..., start:stop], route)
        start = stop


GENERATION = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("kind", GENERATION)
def test_cached_generation_equals_uncached(combine, kind):
    model, ids = active(cse_combine=combine), token_ids(3, 9)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, use_cache=use_cache, **GENERATION[kind]
            )
        )
    assert torch.equal(*results)
    assert results[0].shape[1] > 9 and len(results[0][:, 9:].unique()) > 3


@pytest.mark.parametrize(
    "option", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}, {"assistant": True}], ids=str
)
def test_other_caches_generate_the_same(combine, option):
    model, ids = active(cse_combine=combine), token_ids(1, 10)
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "do_sample": False}
    plain = model.generate(ids, **common)
    if "assistant" in option:
        option = {"assistant_model": activate(tiny_model("gpt2"), noise=0.19)}
    assert torch.equal(model.generate(ids, **common, **option), plain)


def test_left_padded_batch_generates_what_each_prompt_does_alone(combine):
    model, lengths = active(cse_combine=combine), (4, 9, 13)
    prompts = [token_ids(1, length, seed=length) for length in lengths]
    ids, mask = torch.zeros(3, 13, dtype=torch.long), torch.zeros(3, 13, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :] = prompt
        mask[row, -prompt.shape[1] :] = 1
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate(prompts):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[row, -12:], alone[0, -12:])


@pytest.mark.parametrize("cut", [1, 5, LENGTH - 1])
def test_two_forwards_with_a_cache_equal_one(combine, cut):
    model, ids = active(cse_combine=combine), token_ids(3, LENGTH)
    logits, routes = run(model, ids)
    with torch.no_grad():
        first = model(ids[:, :cut], use_cache=True, output_cluster_ids=True)
        second = model(ids[:, cut:], past_key_values=first.past_key_values, output_cluster_ids=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), logits, atol=1e-5, rtol=0)
    both = [expert_ids(model, part.cluster_ids) for part in (first, second)]
    assert torch.equal(torch.cat(both, -1), routes)


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
def test_feed_forward_chunks_change_nothing(routing, combine, chunk):
    flags = {"cse_routing": routing, "cse_combine": combine}
    ids = token_ids(3, 16)
    whole, routes = run(active("bert", **flags), ids)
    parts, chunked_routes = run(active("bert", chunk_size_feed_forward=chunk, **flags), ids)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)
    assert torch.equal(chunked_routes, routes)
