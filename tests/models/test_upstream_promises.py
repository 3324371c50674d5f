# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What transformers promises of every model, for every head with experts at work: what its own tests taught, in our
words. Routes are compared wherever states are, so that a model that fell back to its base would show."""

import copy
import inspect

import pytest
import torch
from tiny import (
    EVERY_HEAD,
    LANGUAGE_HEADS,
    VOCAB,
    activate,
    dense_model,
    first_tensor,
    labelled,
    model_class,
    routed_modules,
    tiny_model,
)
from transformers import AutoConfig


BOTH = {"cse_modules": ["attention", "ffn"]}
EMBEDDINGS = {"gpt2": "transformer.wte.weight", "bert": "bert.embeddings.word_embeddings.weight"}


def heads(*left_out: str):
    return pytest.mark.parametrize(("family", "head"), [each for each in EVERY_HEAD if each[1] not in left_out])


def active(family: str, head: str, **flags):
    return activate(tiny_model(family, head, **{**BOTH, **flags}))


def inputs_of(family: str, head: str) -> dict[str, torch.Tensor]:
    """A batch with padding, without labels."""
    batch = labelled(family, head)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def run(model, batch):
    return model(**batch, output_cluster_ids=True)


def assert_same(got, wanted, tolerance: float = 1e-5) -> None:
    assert all(map(torch.equal, got.cluster_ids, wanted.cluster_ids)) and len(got.cluster_ids[0].unique()) > 1
    torch.testing.assert_close(first_tensor(got), first_tensor(wanted), atol=tolerance, rtol=tolerance)


@heads()
def test_a_deep_copy_is_a_model_of_its_own(family, head):
    model, batch = active(family, head), inputs_of(family, head)
    wanted, copied = run(model, batch), copy.deepcopy(model)
    assert_same(run(copied, batch), wanted, tolerance=0)
    with torch.no_grad():
        for module in routed_modules(copied).values():
            module.router.cluster_expert.fill_(-1)
        for parameter in copied.parameters():
            parameter.zero_()
    assert_same(run(model, batch), wanted, tolerance=0)


@heads()
def test_two_forwards_are_one(family, head):
    model, batch = active(family, head), inputs_of(family, head)
    assert_same(run(model, batch), run(model, batch), tolerance=0)


@heads()
def test_embeddings_given_instead_of_ids_change_nothing(family, head):
    """Multiple choice takes (B, choices, T, d) there."""
    model, batch = active(family, head), inputs_of(family, head)
    given = {name: tensor for name, tensor in batch.items() if name != "input_ids"}
    given["inputs_embeds"] = model.get_input_embeddings()(batch["input_ids"])
    if head == "ForSequenceClassification" and family == "gpt2":  # without ids it takes the last place, padded or not
        batch = {"input_ids": batch["input_ids"][:1]}
        given = {"inputs_embeds": given["inputs_embeds"][:1]}
    assert_same(run(model, given), run(model, batch))


@heads()
def test_ids_and_embeddings_together_are_refused_and_neither_as_well(family, head):
    model, batch = active(family, head), inputs_of(family, head)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    # the stock head of multiple choice asks neither for its shape, and stumbles
    for wrong in ({**batch, "inputs_embeds": embeddings}, *([] if head == "ForMultipleChoice" else [{}])):
        with pytest.raises(ValueError, match="input_ids|inputs_embeds"):
            model(**wrong)


@heads()
def test_sdpa_attention_gives_what_eager_gives(family, head):
    batch = inputs_of(family, head)
    eager, sdpa = (active(family, head, attn_implementation=name) for name in ("eager", "sdpa"))
    assert_same(run(sdpa, batch), run(eager, batch))
    sdpa.set_attn_implementation("eager")
    assert sdpa.config._attn_implementation == "eager"
    assert_same(run(sdpa, batch), run(eager, batch), tolerance=0)


@heads()
def test_states_and_attentions_have_gradients_that_are_kept(family, head):
    model, batch = active(family, head, attn_implementation="eager"), labelled(family, head)
    outputs = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == 4 and len(outputs.attentions) == 3
    kept = [*outputs.hidden_states, *outputs.attentions]
    for tensor in kept:
        tensor.retain_grad()
    (outputs.last_hidden_state.square().sum() if head == "Model" else outputs.loss).backward()
    assert all(tensor.grad is not None and torch.isfinite(tensor.grad).all() for tensor in kept)
    assert outputs.hidden_states[1].grad.abs().sum() > 0 and outputs.attentions[1].grad.abs().sum() > 0


@heads()
def test_no_parameter_is_left_without_gradient(family, head):
    """The fused experts among them; a pooler that the loss does not see apart, and common clusters never."""
    model, batch = active(family, head, cse_routing="discriminant").train(), labelled(family, head, rows=8)
    outputs = model(**batch)
    seen = [outputs.last_hidden_state, outputs.get("pooler_output")] if head == "Model" else [outputs.loss]
    sum(tensor.square().sum() for tensor in seen if tensor is not None).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@heads()
def test_embeddings_grow_and_shrink_and_keep_their_rows(family, head):
    model, batch = active(family, head), inputs_of(family, head)
    wanted = run(model, batch)
    before = model.get_input_embeddings().weight.detach().clone()
    for size in (VOCAB + 13, VOCAB):
        model.resize_token_embeddings(size)
        assert model.config.vocab_size == size and model.get_input_embeddings().num_embeddings == size
        assert torch.equal(model.get_input_embeddings().weight[:VOCAB], before)
        got = run(model, batch)
        if first_tensor(got).shape[-1] == size:
            got[next(name for name in ("logits", "prediction_logits") if name in got)] = first_tensor(got)[..., :VOCAB]
        assert_same(got, wanted)
    if model.get_output_embeddings() is not None:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("family", "head"), [*LANGUAGE_HEADS, ("bert", "ForPreTraining")])
def test_untied_embeddings_stay_two_and_survive_saving(family, head, tmp_path):
    model, batch = active(family, head, tie_word_embeddings=False), inputs_of(family, head)
    wanted = run(model, batch)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded, info = model_class(family, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert_same(run(loaded, batch), wanted)


@heads()
def test_loading_misses_nothing_and_finds_nothing_too_much(family, head, tmp_path):
    model, batch = active(family, head), inputs_of(family, head)
    model.save_pretrained(tmp_path)
    loaded, info = model_class(family, head).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(run(loaded, batch), run(model, batch))


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_shapes_that_do_not_fit_are_refused_or_drawn_anew_by_name(family, tmp_path):
    """Experts and clusters stay what they were."""
    model = active(family, "ForSequenceClassification")
    model.save_pretrained(tmp_path)
    load, changed = type(model).from_pretrained, {"num_labels": 7, "vocab_size": VOCAB + 1}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, **changed)
    loaded, info = load(tmp_path, **changed, ignore_mismatched_sizes=True, output_loading_info=True)
    named = {entry[0] for entry in info["mismatched_keys"]}
    assert EMBEDDINGS[family] in named and len(named) <= 3 and not any("expert" in name for name in named)
    for site, module in routed_modules(model).items():
        for name, tensor in [*module.experts.named_parameters(), *module.router.named_buffers()]:
            ours = routed_modules(loaded)[site]
            assert torch.equal(dict([*ours.experts.named_parameters(), *ours.router.named_buffers()])[name], tensor)


@heads()
def test_weights_that_nobody_loaded_are_all_drawn(family, head):
    """Built on the meta device and moved, as loaders do it: no parameter and no buffer keeps what memory held."""
    config = active(family, head).config
    with torch.device("meta"):
        model = model_class(family, head)(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(77)
    model.init_weights()
    fresh = tiny_model(family, head, **BOTH)
    state = model.state_dict()
    assert [name for name, tensor in state.items() if (tensor == 77).any()] == []
    for name, buffer in fresh.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer), name
    for name, tensor in fresh.state_dict().items():
        spread = (state[name].float().std(correction=0), tensor.float().std(correction=0))
        torch.testing.assert_close(*spread, rtol=0.5, atol=0.05, msg=name)


@heads()
def test_rows_stand_for_themselves_in_every_head(family, head):
    model, batch = active(family, head), inputs_of(family, head)
    wanted = run(model, batch)
    for row in range(len(batch["input_ids"])):
        alone = run(model, {name: tensor[row : row + 1] for name, tensor in batch.items()})
        torch.testing.assert_close(first_tensor(alone)[0], first_tensor(wanted)[row], atol=1e-5, rtol=1e-5)


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_text_grows_alike_from_ids_embeddings_a_cache_and_looked_up_words(combine):
    model = active("gpt2", "ForCausalLM", cse_combine=combine)
    ids = torch.tensor([[5, 9, 17, 5, 9, 17, 5, 9]])
    greedy = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    wanted = model.generate(ids, **greedy)[:, 8:]
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **greedy), wanted)
    assert torch.equal(model.generate(ids, **greedy, prompt_lookup_num_tokens=3)[:, 8:], wanted)
    half = model.generate(ids, **greedy | {"max_new_tokens": 4, "min_new_tokens": 4}, return_dict_in_generate=True)
    rest = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": torch.ones(1, 12, dtype=torch.long)}
    later = model.generate(half.sequences, **greedy | rest, past_key_values=half.past_key_values)
    assert torch.equal(later[:, 8:], wanted)


def test_generation_returns_what_it_was_asked_for():
    model, ids = active("gpt2", "ForCausalLM", attn_implementation="eager"), torch.tensor([[5, 9, 17], [7, 8, 6]])
    asked = {f"output_{name}": True for name in ("scores", "logits", "attentions", "hidden_states")}
    found = model.generate(ids, **GREEDY, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **asked)
    assert [len(found[name]) for name in ("scores", "logits", "attentions", "hidden_states")] == [8] * 4
    with torch.no_grad():
        whole = model(found.sequences[:, :-1], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(found.logits, 1), whole.logits[:, 2:], atol=1e-5, rtol=1e-5)
    last = torch.stack([step[-1][:, -1] for step in found.hidden_states], 1)
    torch.testing.assert_close(last, whole.hidden_states[-1][:, 2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("problem", "labels"), [("regression", 1), ("multi_label_classification", 3)])
@pytest.mark.parametrize("family", EMBEDDINGS)
def test_every_kind_of_classification_trains(family, problem, labels):
    model = active(family, "ForSequenceClassification", num_labels=labels, problem_type=problem).train()
    batch = labelled(family, "ForSequenceClassification")
    batch["labels"] = torch.rand(4, labels) if labels > 1 else torch.rand(4)
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and routed_modules(model).popitem()[1].experts.up_proj.grad is not None


@heads()
def test_signatures_say_which_outputs_can_be_asked_for(family, head):
    """By the type of the keyword arguments; upstream's tests and tools look there."""
    ours, stock = (inspect.signature(build(family, head).forward) for build in (tiny_model, dense_model))
    assert ours.parameters["kwargs"].annotation == stock.parameters["kwargs"].annotation


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_a_model_is_built_by_its_config_alone(family, head, tmp_path):
    """Flags of a saved model come back through the Auto classes, and build the same modules."""
    model = active(family, head, cse_combine="add")
    model.config.save_pretrained(tmp_path)
    again = type(model)(AutoConfig.from_pretrained(tmp_path))
    assert {n: p.shape for n, p in again.state_dict().items()} == {n: p.shape for n, p in model.state_dict().items()}
