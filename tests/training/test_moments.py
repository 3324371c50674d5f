# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises about the optimizer: experts start with the base's moments, and idle slots stay as they are."""

import pytest
import torch
from tiny import activate, routed_module, routed_modules, tiny_model, token_ids
from tiny_runs import Watcher, fit_steps, settings, train

from modeling_cse import ClusterExpertsCallback
from modeling_cse.training.moments import IdleSlots, start_moments


MODULES = ["attention", "ffn"]
BASE = {
    ("gpt2", "attention"): ("c_attn.weight", "qkv_proj", True),
    ("gpt2", "ffn"): ("c_fc.weight", "up_proj", True),
    ("bert", "attention"): ("output.dense.weight", "out_proj", False),
    ("bert", "ffn"): ("intermediate.dense.weight", "up_proj", False),
}


def stepped(model, optimizer_class=torch.optim.AdamW, steps: int = 3, **options):
    """An optimizer that has made steps with this model."""
    optimizer = optimizer_class(model.parameters(), lr=1e-2, **options)
    for step in range(steps):
        optimizer.zero_grad()
        ids = token_ids(seed=step)
        model.train()(ids, labels=ids).loss.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_copies_take_over_the_moments_of_the_base(family, module):
    model = tiny_model(family, cse_modules=[module])
    optimizer, routed = stepped(model), routed_module(model, 2, module)
    name, fused, transposed = BASE[family, module]
    base, expert = routed.get_parameter(name), dict(routed.experts.named_parameters())[fused]
    assert not optimizer.state.get(expert)
    start_moments(optimizer, routed, {1: None, 2: None})
    for moment in ("exp_avg", "exp_avg_sq"):
        wanted, state = optimizer.state[base][moment], optimizer.state[expert][moment]
        assert torch.equal(state[1], wanted.T if transposed else wanted) and torch.equal(state[1], state[2])
        assert not state[0].any() and state[1].any()
    assert float(optimizer.state[expert]["step"]) == 3


def test_copies_make_the_step_that_the_base_would_have_made():
    """All tokens go to one expert: the run with it is the run of the dense model, over several optimizer steps."""
    dense, model = (tiny_model("gpt2", cse_layers=[2], cse_modules=["attention", "ffn"]) for _ in range(2))
    optimizers = [stepped(each, weight_decay=0.1) for each in (dense, model)]
    for module in routed_modules(model).values():
        state = {name: rows[:1] for name, rows in module.router.empty_state().items()}
        module.router.write(**{**state, "cluster_sizes": torch.ones(1), "cluster_expert": torch.tensor([3])})
        module.fill_expert(3, torch.Generator().manual_seed(0))
        start_moments(optimizers[1], module, {3: None})
    for step in range(4):
        losses, ids = [], token_ids(seed=10 + step)
        for each, optimizer in zip((dense, model), optimizers, strict=True):
            optimizer.zero_grad()
            loss = each(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss)
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    routed, base = (routed_module(each, 2) for each in (model, dense))
    torch.testing.assert_close(routed.experts.up_proj[3], base.c_fc.weight.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_fresh_experts_start_with_second_moments_of_the_base_s_size(module):
    model = tiny_model("gpt2", cse_combine="add", cse_modules=[module])
    optimizer, routed = stepped(model, amsgrad=True), routed_module(model, 1, module)
    name, fused, _ = BASE["gpt2", module]
    base, expert = routed.get_parameter(name), dict(routed.experts.named_parameters())[fused]
    start_moments(optimizer, routed, {0: None})
    assert not optimizer.state[expert]["exp_avg"].any()
    for moment in ("exp_avg_sq", "max_exp_avg_sq"):
        mean = optimizer.state[base][moment].mean()
        torch.testing.assert_close(optimizer.state[expert][moment][0], mean.expand(expert.shape[1:]))


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adafactor], ids=lambda each: each.__name__)
def test_optimizers_without_such_moments_start_by_themselves(optimizer_class):
    model = tiny_model("gpt2")
    optimizer = stepped(model, optimizer_class)
    start_moments(optimizer, routed_module(model, 2), {0: None})
    assert not optimizer.state.get(routed_module(model, 2).experts.up_proj)


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_torch_8bit"])
def test_optimizers_in_eight_bits_train_over_fits(tmp_path, name):
    """Their codes have the shape of the weights; large tensors only. Slots without a cluster keep their weights."""
    pytest.importorskip("bitsandbytes" if "bnb" in name else "torchao")
    watcher = Watcher(lambda model: routed_module(model, 2).experts.up_proj.detach().clone())
    model = tiny_model("gpt2", n_embd=128)
    options = {"optim": name, "weight_decay": 0.5, "max_steps": 8, "callbacks": [watcher]}
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its steps, which takes a minute
        trainer = train(tmp_path, ClusterExpertsCallback(**settings(recluster_every=3)), model=model, **options)
    routed = routed_module(trainer.model, 2)
    used = set(routed.router.cluster_expert.tolist()) - {-1}
    assert fit_steps(trainer) == [4, 7] and trainer.optimizer.state[routed.experts.up_proj]
    assert used and all(torch.isfinite(parameter).all() for parameter in model.parameters())
    for slot in range(routed.experts.num_experts):
        assert torch.equal(watcher.seen[7][slot], routed.experts.up_proj[slot]) == (slot not in used)


@pytest.mark.parametrize("module", MODULES)
def test_idle_slots_stay_as_they_are_and_others_learn(module):
    """Weights and moments, under weight decay and old momentum."""
    model = activate(tiny_model("gpt2", cse_modules=[module]), owners=[-1, 2, 0])
    optimizer, routed = stepped(model, weight_decay=0.5), routed_module(model, 2, module)
    routed.router.cluster_expert[1] = -1  # slot 2 loses its cluster
    idle = IdleSlots()
    idle.take([routed], optimizer)
    before = {name: parameter.detach().clone() for name, parameter in routed.experts.named_parameters()}
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in routed.experts.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        ids = token_ids(seed=20 + step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        idle.restore()
    for name, parameter in routed.experts.named_parameters():
        assert torch.equal(parameter[1:], before[name][1:])
        assert torch.equal(optimizer.state[parameter]["exp_avg"][1:], moments[name][1:])
        assert not torch.equal(parameter[0], before[name][0])


def test_a_run_neither_decays_nor_moves_slots_without_a_cluster(tmp_path):
    watcher = Watcher(lambda model: routed_module(model, 2).experts.up_proj.detach().clone())
    callback = ClusterExpertsCallback(**settings(update="frozen"))
    trainer = train(tmp_path, callback, callbacks=[watcher], weight_decay=0.5)
    routed = routed_module(trainer.model, 2)
    used = set(routed.router.cluster_expert.tolist()) - {-1}
    assert used and len(used) < routed.experts.num_experts
    for slot in range(routed.experts.num_experts):
        assert torch.equal(watcher.seen[5][slot], routed.experts.up_proj[slot]) == (slot not in used)


@pytest.mark.parametrize("combine", ["replace", "add"])
def test_switching_on_makes_no_jump_in_the_loss(tmp_path, combine):
    """The step after the first fit is the dense model's own step, to rounding; the next ones differ little."""
    losses = {}
    for warmup in (4, 9):
        model = tiny_model("gpt2", cse_combine=combine)
        callback = ClusterExpertsCallback(**settings(warmup=warmup, update="frozen"))
        trainer = train(tmp_path / str(warmup), callback, model=model)
        losses[warmup] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[4][4] == pytest.approx(losses[9][4], abs=1e-5)
    assert losses[4][5] == pytest.approx(losses[9][5], abs=0.02)


@pytest.mark.parametrize("frozen", [False, True], ids=["the base learns", "the base is frozen"])
def test_a_slot_keeps_no_momentum_of_its_owner_before(frozen):
    model = activate(tiny_model("gpt2"))
    if frozen:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." in name)
    optimizer, routed = stepped(model), routed_module(model, 2)
    state = optimizer.state[routed.experts.up_proj]
    before = {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}
    used = sorted(set(routed.router.cluster_expert.tolist()) - {-1})
    assert before["exp_avg"][used[0]].any(), "which has learned"
    parent = used[0]
    fresh = next(slot for slot in range(routed.num_experts) if slot != parent)
    state["exp_avg"][fresh] = 1.0
    start_moments(optimizer, routed, {fresh: None})
    assert not (state["exp_avg"][fresh] == 1).any() and (not frozen or not state["exp_avg"][fresh].any())
    start_moments(optimizer, routed, {fresh: parent})
    for name, values in before.items():
        assert torch.equal(state[name][fresh], values[parent]) and torch.equal(state[name][parent], values[parent])
