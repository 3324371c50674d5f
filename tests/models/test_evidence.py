# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of routes by evidence, of either gate: what a route depends on, how it generates and trains, what is
refused."""

import evidence_models
import pytest
import torch
from evidence_models import EXACT, evidence_model, outputs_of
from tiny import (
    LANGUAGE_HEADS,
    ONE_GRAPH,
    activate,
    dense_model,
    expert_ids,
    labelled,
    routed_module,
    tiny_model,
    token_ids,
)
from transformers import GenerationConfig


pytestmark = pytest.mark.usefixtures("gate")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
NEW = 6


@torch.no_grad()
def by_hand(model, ids: torch.Tensor) -> torch.Tensor:
    """The posterior of one row of tokens, (T, C), in fp64."""
    router = model.base_model.evidence_router
    sums, tokens = router.evidence[ids].double(), torch.arange(1.0, len(ids) + 1).double()
    if router.causal:
        sums = sums.cumsum(0)
    else:
        sums, tokens = sums.sum(0, keepdim=True).expand_as(sums), torch.full((len(ids),), float(len(ids)))
    return (sums / (1 + tokens / 16).sqrt().unsqueeze(-1) + router.log_shares.double()).softmax(-1)


# ---- what a route depends on ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_a_route_is_the_sum_of_evidence(family, head, gate):
    model, ids = evidence_model(family), token_ids(6)
    found, router = outputs_of(model, ids), routed_module(model, 1).router
    posterior = torch.stack([by_hand(model, row) for row in ids])
    likeliest = posterior.argmax(-1)
    if gate == "posterior":
        chance, owner = posterior.masked_fill(router.cluster_expert < 0, 0).max(-1)
        likeliest = torch.where(chance >= 0.1, owner, likeliest)
    for clusters in found.cluster_ids:
        assert torch.equal(clusters, likeliest)
    assert len(found.cluster_ids[0].unique()) >= 3
    experts = expert_ids(model, found.cluster_ids)
    assert (experts >= 0).any() and (experts < 0).any()


def test_a_later_token_changes_no_logit_before_it():
    model, ids = evidence_model(), token_ids(8)
    whole = outputs_of(model, ids)
    for place in range(1, ids.shape[1], 3):
        other = ids.clone()
        other[:, place:] = token_ids(8, seed=7)[:, place:]
        changed = outputs_of(model, other)
        torch.testing.assert_close(changed.logits[:, :place], whole.logits[:, :place], **CLOSE)
        for ours, theirs in zip(changed.cluster_ids, whole.cluster_ids, strict=True):
            assert torch.equal(ours[:, :place], theirs[:, :place])
    assert not torch.equal(changed.cluster_ids[0], whole.cluster_ids[0])


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_depends_neither_on_padding_nor_on_other_rows(family, head, side):
    model, rows = evidence_model(family), [token_ids(1, length, seed=length) for length in (5, 9, 14)]
    before = [14 - row.shape[1] if side == "left" else 0 for row in rows]
    padded = [
        torch.nn.functional.pad(row, (left, 14 - row.shape[1] - left)) for row, left in zip(rows, before, strict=True)
    ]
    ids = torch.cat(padded)
    mask = (ids > 0).long()
    together = outputs_of(
        model, ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)
    )  # both families count from the first token
    without = outputs_of(model, ids, attention_mask=mask)
    for number, (row, left) in enumerate(zip(rows, before, strict=True)):
        alone, inside = outputs_of(model, row), slice(left, left + row.shape[1])
        torch.testing.assert_close(together.logits[number, inside], alone.logits[0], **CLOSE)
        for ours, theirs, same in zip(together.cluster_ids, alone.cluster_ids, without.cluster_ids, strict=True):
            assert torch.equal(ours[number, inside], theirs[0]) and torch.equal(same[number, inside], theirs[0])


@pytest.mark.parametrize(("family", "per_row"), [("gpt2", True), ("gpt2", False), ("bert", True)])
def test_packed_documents_are_texts_of_their_own(family, per_row):
    """GPT-2 takes one row of positions for all."""
    model, documents = evidence_model(family), [token_ids(3, length, seed=length) for length in (7, 4, 9)]
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])
    positions = positions.expand(3, -1) if per_row else positions
    found = outputs_of(model, torch.cat(documents, 1), position_ids=positions).cluster_ids
    alone = torch.cat([outputs_of(model, document).cluster_ids[0] for document in documents], 1)
    assert all(torch.equal(clusters, alone) for clusters in found)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_separator_ends_a_text(family, head, side):
    """Its own text: what is behind it begins anew, also where padding is the same token."""
    model, documents = evidence_model(family, cse_separator_token_id=3), []
    for length in (7, 4, 9):
        documents.append(token_ids(2, length, seed=length))
        documents[-1][:, -1] = 3
    ids = torch.cat(documents, 1)
    padding = (5, 0) if side == "left" else (0, 5)
    mask = torch.nn.functional.pad(torch.ones_like(ids), padding)
    padded = torch.nn.functional.pad(ids, padding, value=3)
    found = outputs_of(model, padded, attention_mask=mask).cluster_ids
    alone = torch.cat([outputs_of(model, document).cluster_ids[0] for document in documents], 1)
    assert all(torch.equal(clusters[mask.bool()].view_as(ids), alone) for clusters in found)
    assert not torch.equal(outputs_of(evidence_model(family), ids).cluster_ids[0], alone)


def test_separators_and_positions_are_read_together():
    model, ids = evidence_model(cse_separator_token_id=3), token_ids(3, 16)
    ids[:, 4] = 3
    positions = torch.cat([torch.arange(10), torch.arange(6)])
    found = outputs_of(model, ids, position_ids=positions).cluster_ids[0]
    texts = ids[:, :5], ids[:, 5:10], ids[:, 10:]
    assert torch.equal(found, torch.cat([outputs_of(model, text).cluster_ids[0] for text in texts], 1))


def test_routes_are_exact_however_long_a_row_is():
    """What would round in fp32: much evidence before the document whose clusters lie a step apart."""
    router = evidence_model().base_model.evidence_router
    table = torch.zeros(99, 2)
    table[5], table[6] = torch.tensor([8.0, 8.0]), torch.tensor([0.0, 2.0**-10])
    router.write(table, torch.tensor([0.5, 0.5]))
    long = torch.full((1, 9000), 5)
    ids = torch.cat([long, torch.tensor([[6, 7]])], 1)
    positions = torch.cat([torch.arange(9000), torch.arange(2)]).unsqueeze(0)
    behind, alone = router(ids, None, positions)[0, -2:], router(ids[:, -2:], None, None)[0]
    assert torch.equal(behind, alone)
    assert (alone if alone.dim() == 1 else alone.argmax(-1)).tolist() == [1, 1]


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_before_the_first_fit_it_is_the_dense_model(family, head, tmp_path):
    dense, batch = dense_model(family), labelled(family, head)
    dense.save_pretrained(tmp_path)
    model = type(evidence_model(family)).from_pretrained(tmp_path, cse_routing="evidence", cse_layers=[1, 2])
    with torch.no_grad():
        ours, theirs = model(**batch, output_cluster_ids=True), dense(**batch)
    torch.testing.assert_close(ours.logits, theirs.logits, **EXACT)
    assert all((clusters == -1).all() for clusters in ours.cluster_ids)


# ---- generation -----------------------------------------------------------------------------------------------------


def prompts(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Three prompts padded on the left, or some of them."""
    chosen = [token_ids(1, length, seed=length) for length in (4, 9, 13)][rows]
    width = max(prompt.shape[1] for prompt in chosen)
    ids = torch.cat([torch.nn.functional.pad(prompt, (width - prompt.shape[1], 0)) for prompt in chosen])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def generating(**flags):
    model = evidence_model(**flags)
    model.generation_config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return model


@torch.no_grad()
def by_full_forwards(model) -> torch.Tensor:
    found = []
    for row in range(3):
        ids = prompts(slice(row, row + 1))["input_ids"]
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        found.append(ids[0, -NEW:])
    return torch.stack(found)


WAYS = {
    "cached": {},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 4},
    "static cache in chunks": {"cache_implementation": "static", "prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_equals_full_forwards(way):
    model = generating()
    wanted = by_full_forwards(model)
    assert torch.equal(model.generate(**prompts(), **WAYS[way])[:, -NEW:], wanted)
    assert len(wanted.unique()) > 5


@pytest.mark.parametrize("way", WAYS)
def test_a_separator_in_a_prompt_begins_anew(way):
    model, inputs = generating(cse_separator_token_id=3), prompts()
    inputs["input_ids"][:, -2] = 3  # behind it the prompts are a token long, and alike
    inputs["input_ids"][:, -1] = 40
    found = model.generate(**inputs, **WAYS[way])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, NEW), value=1)
    whole = outputs_of(model, found, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert torch.equal(whole.logits[:, -NEW - 1 : -1].argmax(-1), found[:, -NEW:])
    alone = model.base_model.read_clusters(found[:, -NEW - 1 :])
    assert torch.equal(model.base_model.read_clusters(found)[:, -NEW - 1 :], alone)


@pytest.mark.parametrize("routing", ["evidence", "discriminant"])
def test_padding_amid_a_text_changes_no_token(routing):
    """Turns of a dialogue, padded one by one."""
    model = activate(tiny_model("gpt2", cse_routing=routing, **evidence_models.FLAGS))
    ids = token_ids(8, 12)
    hole = torch.tensor([[1] * 6 + [0] * 3 + [1] * 6]).expand(8, -1)
    padded = torch.cat([ids[:, :6], torch.zeros(8, 3, dtype=torch.int64), ids[:, 6:]], 1)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    got = model.generate(padded, attention_mask=hole, **options)[:, padded.shape[1] :]
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :]
    assert torch.equal(got, wanted)
    places = (hole.cumsum(-1) - 1).clamp_min(0)
    routes = [outputs_of(model, padded, attention_mask=hole, position_ids=places), outputs_of(model, ids)]
    torch.testing.assert_close(routes[0].logits[hole.bool()].view(8, 12, -1), routes[1].logits, **CLOSE)
    counted = outputs_of(model, padded, attention_mask=hole, position_ids=torch.arange(15).expand(8, -1))
    assert torch.equal(counted.logits, outputs_of(model, padded, attention_mask=hole).logits), "as in stock models"


@pytest.mark.parametrize("search", [{"do_sample": True, "top_k": 0}, {"num_beams": 3}], ids=str)
def test_searches_with_a_cache_equal_those_without(search):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        found.append(generating().generate(**prompts(), use_cache=use_cache, **search))
    assert torch.equal(*found) and len(found[0].unique()) > 3


@pytest.mark.parametrize("draft_reads", ["evidence", "discriminant"])
def test_a_draft_model_changes_no_token(draft_reads):
    model = generating()
    draft = activate(tiny_model("gpt2", cse_routing=draft_reads), noise=0.11)
    draft.generation_config = GenerationConfig(pad_token_id=0)
    rows = [prompts(slice(row, row + 1)) for row in range(3)]
    found = torch.stack([model.generate(**row, assistant_model=draft)[0, -NEW:] for row in rows])
    assert torch.equal(found, by_full_forwards(model))


@pytest.mark.parametrize("chunk", [None, 2])
def test_generation_goes_on_from_a_cache_that_it_gave(chunk):
    model, inputs = generating(), prompts()
    wanted = model.generate(**inputs)
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    options = {"past_key_values": first.past_key_values, "prefill_chunk_size": chunk, "max_new_tokens": NEW - 2}
    assert torch.equal(model.generate(first.sequences, attention_mask=mask, **options), wanted)


def test_generation_without_the_beginning_of_a_text_is_refused():
    model, inputs = generating(), prompts()
    first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    with pytest.raises(ValueError, match="input_ids of 1 tokens are not allowed with past_key_values of 14"):
        model.generate(first.sequences[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)


def test_given_clusters_take_the_place_of_evidence():
    """One a prompt, in every step."""
    model = generating()
    other = model.generate(**prompts(), given_clusters=torch.tensor([1, 0, 4]))
    told = activate(tiny_model("gpt2", cse_routing="given", **evidence_models.FLAGS))
    told.load_state_dict(model.state_dict(), strict=False)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(other, told.generate(**prompts(), given_clusters=torch.tensor([1, 0, 4]), **options))
    assert not torch.equal(other, model.generate(**prompts()))


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="generate_batch.*cse_routing='evidence'"):
        generating().generate_batch([[5, 6, 7]])


# ---- one forward pass after another ---------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_wants_the_clusters_of_the_whole_text():
    model, ids = evidence_model(), token_ids()
    cache = model(ids[:, :10], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values without given_clusters"):
        model(ids[:, 10:], past_key_values=cache)
    told = model.base_model.read_clusters(ids)[:, 10:]
    rest = outputs_of(model, ids[:, 10:], past_key_values=cache, given_clusters=told)
    whole = outputs_of(model, ids)
    torch.testing.assert_close(rest.logits, whole.logits[:, 10:], **CLOSE)
    assert torch.equal(rest.cluster_ids[0], whole.cluster_ids[0][:, 10:])


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_embeddings_alone_are_refused(family, head):
    model, ids = evidence_model(family), token_ids()
    states = model.get_input_embeddings()(ids).detach()
    with pytest.raises(ValueError, match="inputs_embeds without given_clusters"):
        model(inputs_embeds=states)
    told = outputs_of(model, None, inputs_embeds=states, given_clusters=model.base_model.read_clusters(ids))
    torch.testing.assert_close(told.logits, outputs_of(model, ids).logits, **CLOSE)


@pytest.mark.parametrize("shape", [(4, 20), (3, 16)])
def test_a_mask_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask of shape .* it must be \(4, 16\)"):
        evidence_model().base_model.read_clusters(token_ids(), torch.ones(shape, dtype=torch.long))
    places = torch.arange(16).expand(4, -1)
    with pytest.raises(ValueError, match=r"attention_mask of shape .* it must be \(4, 16\)"):
        model = evidence_model(cse_separator_token_id=3)
        model.base_model.read_clusters(token_ids(), torch.ones(shape, dtype=torch.long), places)


def test_only_evidence_reads_clusters():
    with pytest.raises(ValueError, match="cse_routing='discriminant'.*must be 'evidence'"):
        tiny_model("gpt2").base_model.read_clusters(token_ids())


# ---- training and compiling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_checkpointed_activations_give_the_same_loss_and_gradients(family, head):
    gradients, losses = [], []
    for checkpointed in (False, True):
        model = evidence_model(family).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(**labelled(family, head)).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(routed_module(model, 2).experts.up_proj.grad)
    torch.testing.assert_close(*losses, **EXACT)
    torch.testing.assert_close(*gradients, **CLOSE)
    assert gradients[0].abs().sum() > 0


@ONE_GRAPH
@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("separated", [False, True])
def test_one_graph_equals_eager_also_when_evidence_changes(family, head, separated):
    torch._dynamo.reset()
    batch = labelled(family, head)
    model = evidence_model(family, cse_separator_token_id=int(batch["input_ids"][0, 4]) if separated else None)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in (0, 1):
        activate(model, seed)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, atol=1e-4, rtol=1e-4)
