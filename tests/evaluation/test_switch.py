# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the learned router that the method is measured against."""

import pytest
import torch
from tiny import SIZES, VOCAB, dense_model, labelled, token_ids
from tiny_runs import make_trainer, rows
from torch.nn import functional as F

from modeling_cse.evaluation.switch import (
    SwitchBertConfig,
    SwitchBertForMaskedLM,
    SwitchExperts,
    SwitchFFN,
    SwitchGPT2Config,
    SwitchGPT2ForCausalLM,
    SwitchRouter,
    count_parameters,
    load_balancing_loss,
)


FAMILIES = {"gpt2": (SwitchGPT2Config, SwitchGPT2ForCausalLM), "bert": (SwitchBertConfig, SwitchBertForMaskedLM)}
NO_NOISE = {"switch_jitter": 0.0}


def switch_model(family: str, seed: int = 0, **flags):
    """Three layers, four experts in each of the last two; routers that decide clearly. In evaluation mode."""
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES[family], **flags})).eval()
    for router in modules(model, SwitchRouter):
        router.classifier.weight.data *= 5
    return model


def modules(model, kind) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


def batch_of(family: str, **sizes) -> dict[str, torch.Tensor]:
    return labelled(family, "ForCausalLM", **sizes)


def pure_loss(family: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits, labels = (logits[:, :-1], labels[:, 1:]) if family == "gpt2" else (logits, labels)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def expert_shares(outputs) -> torch.Tensor:
    """(layers, E) shares of the tokens."""
    return torch.stack([F.one_hot(logits.argmax(-1), 4).float().mean((0, 1)) for logits in outputs.router_logits])


def test_balance_is_that_of_the_paper():
    """Equations 4 to 6, token by token."""
    logits, mask = torch.randn(3, 5, 4), torch.rand(3, 5) > 0.3
    counted = [logits[row, t].softmax(-1) for row in range(3) for t in range(5) if mask[row, t]]
    assert 0 < len(counted) < 15
    wanted = 0.0
    for expert in range(4):
        share = sum(float(p.argmax() == expert) for p in counted) / len(counted)
        wanted += 4 * share * sum(float(p[expert]) for p in counted) / len(counted)
    assert float(load_balancing_loss(logits, mask)) == pytest.approx(wanted, rel=1e-5)


def test_balance_is_one_for_uniform_routing_and_the_number_of_experts_for_a_collapse():
    uniform = 3.0 * torch.eye(4).repeat(2, 2, 1)
    collapsed = torch.zeros(2, 8, 4)
    collapsed[..., 1] = 50.0
    mask = torch.ones(2, 8)
    assert float(load_balancing_loss(uniform, mask)) == pytest.approx(1.0)
    assert float(load_balancing_loss(collapsed, mask)) == pytest.approx(4.0)
    assert float(load_balancing_loss(collapsed, 0 * mask)) == 0.0


def test_balances_are_weighed_and_added_over_layers(family):
    """Two layers with a router that knows one expert: 2 alpha E."""
    model, batch = switch_model(family, switch_alpha=0.03), batch_of(family)
    outputs = model(**batch)
    wanted = sum(0.03 * load_balancing_loss(logits, batch["attention_mask"]) for logits in outputs.router_logits)
    assert len(outputs.router_logits) == 2
    torch.testing.assert_close(outputs.aux_loss, wanted)
    for router in modules(model, SwitchRouter):
        router.classifier.weight.data.zero_()  # a tie: every token goes to the first expert, with probability 1/4
    torch.testing.assert_close(model(**batch).aux_loss, torch.tensor(2 * 0.03))


def test_loss_is_pure_in_evaluation_and_carries_the_balance_in_training(family):
    model, batch = switch_model(family, **NO_NOISE), batch_of(family)
    outputs = model(**batch)
    torch.testing.assert_close(outputs.loss, pure_loss(family, outputs.logits, batch["labels"]))
    trained = model.train()(**batch)
    torch.testing.assert_close(trained.logits, outputs.logits)
    torch.testing.assert_close(trained.loss, outputs.loss + outputs.aux_loss)
    assert 0.02 < outputs.aux_loss.item() < 0.08
    assert model(batch["input_ids"]).aux_loss is None
    loss, logits = model(**batch, return_dict=False)[:2]
    assert loss.shape == () and logits.shape == (4, 16, VOCAB)


def test_grouped_products_are_the_default_also_beside_a_stock_model(family, monkeypatch):
    answer = "_can_set_experts_implementation_cached_value"  # remembered on a class, and found by its subclasses
    for kind in {type(module) for module in switch_model(family).modules()}:
        if answer in vars(kind):
            monkeypatch.delattr(kind, answer)
    dense_model(family)
    assert switch_model(family).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_answer_is_the_best_experts_times_its_probability(family, implementation):
    model = switch_model(family)
    model.set_experts_implementation(implementation)
    ffn, states = modules(model, SwitchFFN)[0], torch.randn(2, 7, 32)
    experts, probabilities = ffn.experts, (states @ ffn.router.classifier.weight.T).softmax(-1)
    assert len(probabilities.argmax(-1).unique()) > 1
    wanted = torch.empty_like(states)
    for row, t in torch.cartesian_prod(torch.arange(2), torch.arange(7)):
        best = probabilities[row, t].argmax()
        inner = experts.act_fn(experts.up_proj[best] @ states[row, t] + experts.up_proj_bias[best])
        answer = experts.down_proj[best] @ inner + experts.down_proj_bias[best]
        wanted[row, t] = probabilities[row, t, best] * answer
    torch.testing.assert_close(ffn(states), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_gradients_reach_the_router_and_the_experts_in_use(family, alpha):
    """Also without the balance, through the probability that scales the answer."""
    model = switch_model(family, switch_alpha=alpha).train()
    batch = batch_of(family, rows=2, length=6)
    outputs = model(**batch)
    outputs.loss.backward()
    predicts = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:] if family == "gpt2" else batch["labels"]
    idle = 0
    for logits, ffn in zip(outputs.router_logits, modules(model, SwitchFFN), strict=True):
        used = logits[predicts != -100].argmax(-1).unique().tolist()
        assert ffn.router.classifier.weight.grad.abs().max() > 0
        for expert in range(4):
            for parameter in ffn.experts.parameters():
                assert bool(parameter.grad[expert].any()) == (expert in used)
        idle += 4 - len(used)
    assert idle > 0


def test_padding_and_other_rows_change_nothing(family):
    model, batch = switch_model(family), batch_of(family, rows=3)
    mask, seen = batch["attention_mask"], model(**batch)
    other = {**batch, "input_ids": batch["input_ids"].where(mask == 1, token_ids(3, seed=7))}
    changed = model(**other)
    assert not torch.equal(changed.router_logits[0], seen.router_logits[0])
    torch.testing.assert_close(changed.aux_loss, seen.aux_loss)
    torch.testing.assert_close(changed.logits[mask == 1], seen.logits[mask == 1], rtol=1e-4, atol=1e-5)
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone.logits[0], seen.logits[row], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="attention_mask of shape"):
        model(**{**batch, "attention_mask": torch.ones(3, 1, 16, 16)})


def test_micro_batches_add_up_to_the_step(family):
    """Micro-batches with the same tokens but unequally many labels: their balances are alike, so that loss and
    gradients are exactly those of the step."""
    batch = batch_of(family, rows=8)
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name][:2].repeat(4, 1)
    batch["labels"] = batch["input_ids"].masked_fill(torch.rand(8, 16) < torch.arange(8).unsqueeze(1) / 10, -100)
    predicted = (batch["labels"][:, 1:] if family == "gpt2" else batch["labels"]) != -100
    found = []
    for cuts in (1, 4):
        model = switch_model(family, switch_alpha=1.0, **NO_NOISE).train()
        parts = zip(*(value.chunk(cuts) for value in batch.values()), strict=True)
        losses = [
            model(**dict(zip(batch, part, strict=True)), num_items_in_batch=predicted.sum()).loss for part in parts
        ]
        sum(losses).backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        found.append((sum(losses).item(), norm.item()))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_accumulation_in_the_trainer(family, alpha, tmp_path):
    """The same step in one piece and in four. With alpha 0 all is equal; otherwise the balance is the weighted mean
    of the micro-batches', and nothing else differs."""
    batch = batch_of(family, rows=8)
    data = [{name: value[row] for name, value in batch.items()} for row in range(8)]
    count = [int((row["labels"][1:] if family == "gpt2" else row["labels"]).ne(-100).sum()) for row in data]
    found, wanted = [], []
    for size in (8, 2):
        model = switch_model(family, switch_alpha=alpha, **NO_NOISE)
        balance = 0.0
        for start in range(0, 8, size):
            part = model(**{name: value[start : start + size] for name, value in batch.items()})
            balance += part.aux_loss.item() * sum(count[start : start + size]) / sum(count)
        wanted.append(pure_loss(family, model(**batch).logits, batch["labels"]).item() + balance)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 1}
        options |= {"train_sampling_strategy": "sequential", "per_device_eval_batch_size": 16}
        trainer = make_trainer(tmp_path, model=model, data=data, **options)
        trainer.train()
        logged = trainer.state.log_history[0]
        found.append((logged["loss"], logged["grad_norm"]))
        assert logged["loss"] == pytest.approx(wanted[-1], rel=1e-5)
    assert found[1] == pytest.approx(found[0], rel=1e-4 if alpha == 0 else 1e-3)
    evaluation = trainer.predict(rows(16, seed=9))
    labels = torch.stack([row["labels"] for row in rows(16, seed=9)])
    assert evaluation.predictions.shape == (16, 12, VOCAB)
    pure = pure_loss(family, torch.from_numpy(evaluation.predictions), labels)
    assert evaluation.metrics["test_loss"] == pytest.approx(float(pure), rel=1e-5)


def test_saving_and_loading_change_nothing(family, tmp_path):
    model, batch = switch_model(family, switch_layers=[1], switch_num_experts=3), batch_of(family)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not loaded.training
    assert loaded.config.switch_layer_indices == [1] and loaded.config.switch_num_experts == 3
    ours, theirs = model(**batch), loaded(**batch)
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.aux_loss, theirs.aux_loss)
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="switch_jitter=3"):
        type(model).from_pretrained(tmp_path, switch_jitter=3)


def test_cached_logits_and_generation_are_those_of_the_full_forward():
    model, ids = switch_model("gpt2"), token_ids(2, 10)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    cache, steps = None, []
    for part in ids.split([4, 1, 3, 1, 1], dim=1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)
    cache.crop(-2)
    outputs = model(ids[:, 8:], past_key_values=cache, attention_mask=torch.ones_like(ids), labels=ids[:, 8:])
    wanted = sum(0.01 * load_balancing_loss(logits, torch.ones(2, 2)) for logits in outputs.router_logits)
    torch.testing.assert_close(outputs.aux_loss, wanted)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
    cached, uncached = (model.generate(ids, use_cache=use, **options) for use in (True, False))
    assert cached.shape == (2, 18) and torch.equal(cached, uncached)
    padded = F.pad(ids, (3, 0))
    options["attention_mask"] = (F.pad(torch.ones_like(ids), (3, 0))).long()
    assert torch.equal(model.generate(padded, **options)[:, 3:], cached)


def test_weights_are_drawn_as_the_base_model_draws_its_own(family, tmp_path):
    """The same base weights to the bit; experts and routers alike, also where a checkpoint lacks them."""
    dense, config = dense_model(family), FAMILIES[family][0](**SIZES[family])
    torch.manual_seed(0)
    drawn, stock = FAMILIES[family][1](config), dense.base_model.state_dict()
    own = {key: value for key, value in drawn.base_model.state_dict().items() if key in stock}
    assert len(stock) - len(own) == 2 * 4
    assert all(torch.equal(value, stock[key]) for key, value in own.items())
    dense.save_pretrained(tmp_path)
    for model in (drawn, FAMILIES[family][1].from_pretrained(tmp_path, config=config)):
        for ffn in modules(model, SwitchFFN):
            std = {name: float(parameter.detach().std()) for name, parameter in ffn.named_parameters()}
            down = 0.1 / 6**0.5 if family == "gpt2" else 0.1
            assert std["router.classifier.weight"] == pytest.approx(0.1, rel=0.3)
            assert std["experts.up_proj"] == pytest.approx(0.1, rel=0.1)
            assert std["experts.down_proj"] == pytest.approx(down, rel=0.1)
            assert std["experts.up_proj_bias"] == std["experts.down_proj_bias"] == 0.0
            assert not torch.equal(ffn.experts.up_proj[0], ffn.experts.up_proj[1])


def test_jitter_is_small_seeded_and_only_in_training():
    router, states = modules(switch_model("gpt2", switch_jitter=0.1), SwitchRouter)[0], torch.ones(1, 1000, 32)
    router.classifier.weight.data = F.one_hot(torch.arange(4), 32).float()
    assert torch.equal(router(states)[0], torch.ones(1, 1000, 4))
    torch.manual_seed(1)
    noisy = router.train()(states)[0].detach()
    assert 0.9 <= float(noisy.min()) < 0.905 and 1.095 < float(noisy.max()) <= 1.1 and torch.all(states == 1)
    torch.manual_seed(1)
    assert torch.equal(router(states)[0], noisy) and not torch.equal(router(states)[0], noisy)


def test_chunked_feed_forward_changes_nothing():
    whole, chunked = (switch_model("bert", chunk_size_feed_forward=size)(**batch_of("bert")) for size in (0, 4))
    torch.testing.assert_close(chunked.logits, whole.logits)
    torch.testing.assert_close(chunked.router_logits, whole.router_logits)


def test_checkpointed_gradients_are_the_same(family):
    """The noise too is drawn again alike when a block is computed again."""
    found = []
    for checkpointed in (False, True):
        model = switch_model(family, switch_alpha=1.0, switch_jitter=0.2).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(3)
        model(**batch_of(family)).loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_autocast_runs_experts_in_bf16_and_routers_in_fp32(family):
    model, batch = switch_model(family, **NO_NOISE).train(), batch_of(family)
    exact, seen = model(**batch), []
    modules(model, SwitchExperts)[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch)
    outputs.loss.backward()
    assert seen == [torch.bfloat16] and outputs.aux_loss.dtype == torch.float32
    assert {logits.dtype for logits in outputs.router_logits} == {torch.float32}
    torch.testing.assert_close(outputs.loss, exact.loss, rtol=0.02, atol=0.0)
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.to(torch.bfloat16)(**batch).logits.dtype == torch.bfloat16


def test_training_learns_and_keeps_experts_in_use(family):
    model = switch_model(family).train()
    data = rows(16)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        outputs = model(**batch)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert expert_shares(outputs).min() > 0.05


def test_balance_alone_brings_a_collapsed_router_back(family):
    model, batch = switch_model(family, **NO_NOISE).train(), batch_of(family)
    routers = modules(model, SwitchRouter)
    for number, router in enumerate(routers, start=1):  # a feature that all tokens share speaks for the first expert
        layer = model.base_model.h[number] if family == "gpt2" else model.base_model.encoder.layer[number]
        norm = layer.ln_2 if family == "gpt2" else layer.attention.output.LayerNorm
        norm.bias.data[0] = 4.0
        router.classifier.weight.data *= 0.05
        router.classifier.weight.data[0, 0] = 0.5
    optimizer = torch.optim.Adam([router.classifier.weight for router in routers], lr=5e-3)
    shares = []
    for _ in range(100):
        outputs = model(**batch)
        shares.append(expert_shares(outputs))
        optimizer.zero_grad()
        outputs.aux_loss.backward()
        optimizer.step()
    assert shares[0][:, 0].min() == 1.0
    last = torch.stack(shares[-10:]).mean(0)
    assert last.max() < 0.4 and last.min() > 0.1


def test_parameters_are_counted():
    """E experts are stored, one is used; the router is always used."""
    model, dense = switch_model("gpt2"), dense_model("gpt2")
    expert = 32 * 128 + 128 + 128 * 32 + 32
    counts, base = count_parameters(model), count_parameters(dense)
    assert base == {"total": dense.num_parameters(), "active": dense.num_parameters()}
    assert counts["active"] == base["total"] + 2 * 4 * 32
    assert counts["total"] == counts["active"] + 2 * 3 * expert == model.num_parameters()


@pytest.mark.parametrize(
    "flags",
    [
        {"switch_layers": []},
        {"switch_layers": [3]},
        {"switch_layers": [0, -3]},
        {"switch_layers": "last"},
        {"switch_num_experts": 0},
        {"switch_num_experts": 2.0},
        {"switch_alpha": -0.1},
        {"switch_alpha": float("nan")},
        {"switch_jitter": 1.5},
        {"hidden_size": 36},
    ],
    ids=str,
)
def test_wrong_flags_are_refused_by_name(family, flags):
    ((flag, value),) = flags.items()
    name = {"hidden_size": "n_embd"}.get(flag, flag) if family == "gpt2" else flag
    with pytest.raises(ValueError, match=rf"^{flag}={value!r} is not allowed".replace("[", r"\[")):
        FAMILIES[family][0](**{**SIZES[family], name: value})
