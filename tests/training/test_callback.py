# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the callback: when experts switch on, what is recorded, what is logged, and what is refused."""

import logging
from types import SimpleNamespace

import pytest
import torch
from tiny import dense_model, routed_modules, tiny_model
from tiny_runs import Watcher, fit_steps, history, make_trainer, rows, settings, train
from transformers import TrainerCallback

from modeling_cse import ClusterExpertsCallback, fit_experts
from modeling_cse.training.saving import CheckpointSaves


WRONG = [
    ("warmup", -1),
    ("warmup", 1.5),
    ("warmup", 0.0),
    ("warmup", "0.1"),
    ("warmup", True),
    ("warmup", float("nan")),
    ("recluster_every", 0),
    ("recluster_every", 2.5),
    ("recluster_every", True),
    ("update", "online"),
    ("update", None),
    ("algorithm", "spectral"),
    ("num_clusters", 0),
    ("num_clusters", "6"),
    ("common_share", 1.5),
    ("sample_size", 5),
    ("sample_size", 100.0),
    ("seed", -1),
    ("patience", 0),
    ("ema_decay", 1.1),
    ("ema_decay", -0.1),
    ("ema_decay", "0.9"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda part: repr(part))
def test_wrong_argument_is_refused_by_name(name, value):
    options = {"update": "ema"} if name == "ema_decay" else {}
    with pytest.raises(ValueError) as error:
        ClusterExpertsCallback(**{name: value, **options})
    assert f"{name}={value!r} is not allowed" in str(error.value)


def clusters_in_use(model) -> list[int]:
    return [ffn.router.num_clusters for ffn in routed_modules(model).values()]


def buffers(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if ".router." in name}


def changed(first: dict, second: dict, name: str) -> bool:
    return any(not torch.equal(first[key], second[key]) for key in first if key.endswith(name))


@pytest.mark.parametrize(("warmup", "first"), [(4, 4), (1, 1), (9, 9), (0.4, 4), (0.31, 4), (0.05, 1)])
def test_experts_switch_on_at_the_end_of_the_warm_up(tmp_path, warmup, first):
    watcher = Watcher(clusters_in_use)
    callback = ClusterExpertsCallback(**settings(warmup=warmup, update="frozen", sample_size=8))
    trainer = train(tmp_path, callback, callbacks=[watcher])
    assert watcher.seen == {step: [0, 0] if step < first else [3, 3] for step in range(10)}
    assert fit_steps(trainer) == [first]


@pytest.mark.parametrize("update", ["recluster", "ema", "frozen"])
def test_update_rules(tmp_path, update):
    watcher = Watcher(buffers)
    trainer = train(tmp_path, ClusterExpertsCallback(**settings(update=update)), callbacks=[watcher])
    # not at the last step, 10: experts that start there would never be trained
    assert fit_steps(trainer) == ([4, 6, 8] if update == "recluster" else [4])
    states = [watcher.seen[step] for step in range(4, 10)] + [buffers(trainer.model)]
    pairs = list(zip(states, states[1:], strict=False))
    moved = [changed(before, after, "centroids") for before, after in pairs]
    wanted = {"recluster": [False, True, False, True, False, False], "ema": [True] * 6, "frozen": [False] * 6}[update]
    assert moved == wanted
    assert [changed(before, after, "discriminant_weight") for before, after in pairs] == wanted
    if update != "recluster":
        assert not any(changed(before, after, "cluster_expert") for before, after in pairs)


def test_a_moving_average_with_full_weight_of_the_past_is_frozen(tmp_path):
    options = ({"update": "ema", "ema_decay": 1.0}, {"update": "frozen"})
    callbacks = [ClusterExpertsCallback(**settings(**each)) for each in options]
    first, second = (buffers(train(tmp_path, callback).model) for callback in callbacks)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-5, rtol=1e-4)


def test_experts_learn_after_the_fit_and_not_before(tmp_path):
    watcher = Watcher(lambda model: {n: p.detach().clone() for n, p in model.named_parameters() if ".experts." in n})
    train(tmp_path, ClusterExpertsCallback(**settings(update="frozen")), callbacks=[watcher])
    assert all(torch.equal(watcher.seen[0][name], watcher.seen[3][name]) for name in watcher.seen[0])
    assert all(changed(watcher.seen[5], watcher.seen[6], part) for part in ("up_proj", "down_proj"))


class Counting(ClusterExpertsCallback):
    """Keeps what was collected for the first fit."""

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 4:
            self.kept = {layer: store.all() for layer, store in self.collector.stores.items()}
            self.counts = {layer: store.seen for layer, store in self.collector.stores.items()}
        super().on_step_end(args, state, control, model, optimizer, **kwargs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_every_sequence_is_recorded_once(tmp_path, checkpointing, batch, accumulate):
    """Evaluation in between is not recorded, a block that is computed again is not, and the features are the same."""
    callback = Counting(**settings(sample_size=16, update="frozen"))
    train(
        tmp_path,
        callback,
        model=tiny_model("gpt2"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        activation_checkpointing=checkpointing,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=5,
        learning_rate=0.0,
    )
    assert callback.counts == {(1, "ffn"): 16, (2, "ffn"): 16}
    if (checkpointing, batch) != (False, 8):
        plain = Counting(**settings(sample_size=16, update="frozen"))
        train(tmp_path, plain, model=tiny_model("gpt2"), max_steps=5, learning_rate=0.0)
        for layer, features in plain.kept.items():
            torch.testing.assert_close(callback.kept[layer].embeddings, features.embeddings, atol=1e-5, rtol=0)


def test_attached_metrics_reach_reports_and_no_loss_is_lost(tmp_path):
    watcher = Watcher()
    trainer = train(tmp_path, callbacks=[watcher])
    for logs in (watcher.logs, trainer.state.log_history):
        assert [entry["step"] for entry in logs if "loss" in entry] == list(range(1, 11))
        assert [entry["step"] for entry in logs if "cse/seconds" in entry] == [4, 6, 8]
    first, second, *_ = (entry for entry in trainer.state.log_history if "cse/seconds" in entry)
    names = {"clusters", "experts", "share_routed", "clarity", "agreement", "unserved"}
    assert {f"cse/layer_{layer}/ffn/{name}" for layer in (1, 2) for name in names} | {"cse/seconds"} <= set(first)
    assert "cse/layer_2/ffn/churn" not in first and "cse/layer_2/ffn/churn" in second


def test_without_attaching_metrics_are_in_the_state_and_a_warning_says_so(tmp_path, caplog):
    watcher = Watcher()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, ClusterExpertsCallback(**settings()), callbacks=[watcher], attach=False)
        trainer.args.report_to = ["tensorboard"]
        trainer.train()
    assert fit_steps(trainer) == [4, 6, 8]
    assert not any("cse/seconds" in entry for entry in watcher.logs)
    assert "attach(trainer)" in caplog.text


def test_logging_seldom_does_not_move_the_loss(tmp_path):
    """A loss that is due every five steps is logged then, as in a run without the callback."""
    trainer = train(tmp_path, logging_steps=5)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [5, 10]


def test_metrics_of_one_trainer_never_go_to_another(tmp_path):
    callback = ClusterExpertsCallback(**settings())
    first, second = (make_trainer(tmp_path / name, callback) for name in "ab")
    with pytest.raises(ValueError, match=r"call attach\(trainer\) with the one that trains"):
        first.train()
    second.train()
    assert fit_steps(second) and not fit_steps(first)
    callback.attach(first).trainer.train()
    assert fit_steps(first) == fit_steps(second)


def test_attaching_twice_adds_one_callback(tmp_path):
    callback = ClusterExpertsCallback(**settings())
    trainer = make_trainer(tmp_path, callback)
    assert callback.attach(trainer) is callback
    assert trainer.callback_handler.callbacks.count(callback) == 1


def test_a_second_callback_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, ClusterExpertsCallback(**settings()))
    with pytest.raises(ValueError, match="trainer has another ClusterExpertsCallback, and takes one"):
        ClusterExpertsCallback(**settings()).attach(trainer)


def test_hooks_are_gone_after_training_and_nothing_is_kept_twice(tmp_path):
    trainer = train(tmp_path)
    modules = list(trainer.model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    trainer.train()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


@pytest.mark.parametrize("warmup", [4, "auto"])
def test_what_an_interrupt_has_left_is_gone_in_the_next_training(tmp_path, warmup):
    class Interrupt(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise KeyboardInterrupt

    model = tiny_model("gpt2")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, ClusterExpertsCallback(**settings(warmup=warmup)), model=model, callbacks=[Interrupt()])
    assert model.base_model._forward_pre_hooks
    again = train(tmp_path, model=model)
    assert fit_steps(again)[0] == 4 and not model.base_model._forward_pre_hooks


def test_a_longer_training_does_not_fit_frozen_clusters_again(tmp_path):
    own = {"warmup": 0.2, "update": "frozen"}
    saving = {"save_strategy": "steps", "save_steps": 5}
    first = train(tmp_path, ClusterExpertsCallback(**settings(**own)), **saving)
    assert fit_steps(first) == [2]
    place = str(tmp_path / "checkpoint-5")
    longer = train(tmp_path, ClusterExpertsCallback(**settings(**own)), resume=place, max_steps=50, **saving)
    assert fit_steps(longer) == [2]


def test_a_trial_of_a_search_leaves_checkpoints_of_other_runs_alone(tmp_path):
    """The Trainer saves a trial's into a folder of the trial."""
    trainer = train(tmp_path, save_strategy="steps", save_steps=5)
    place, written = tmp_path / "checkpoint-5", []
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    trainer.state.is_hyper_param_search, trainer.state.global_step = True, 5
    CheckpointSaves().end(trainer.args, trainer.state, written.append)
    assert not written and {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_warm_up_changes_nothing(tmp_path):
    """Until the first fit the run is that without the callback, to the bit."""
    plain = make_trainer(tmp_path)
    plain.train()
    ours = train(tmp_path, ClusterExpertsCallback(**settings(warmup=9, update="frozen", sample_size=8)))
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, ours)]
    assert losses[0][:9] == losses[1][:9]


def test_same_run_twice_is_the_same_run(tmp_path):
    first, second = train(tmp_path), train(tmp_path)
    assert history(first) == history(second)
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("warmup", [10, 11])
def test_warm_up_as_long_as_training_is_refused(tmp_path, warmup):
    with pytest.raises(ValueError, match=rf"warmup={warmup} .*only 10 steps"):
        train(tmp_path, ClusterExpertsCallback(**settings(warmup=warmup)))


def test_a_batch_size_that_was_found_counts(tmp_path, monkeypatch):
    """Batches of eight do not fit, and the search goes down to four: a sample of sixteen is four steps of them."""
    counts = []

    class TooLarge(ClusterExpertsCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            if state.train_batch_size > 4:
                raise RuntimeError("CUDA out of memory.")
            super().on_train_begin(args, state, control, model=model, **kwargs)

        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            counts.append(next(iter(self.collector.stores.values())).seen)
            super().on_step_end(args, state, control, model, optimizer, **kwargs)

    callback = TooLarge(**settings(warmup=6, update="frozen"))
    trainer = train(tmp_path, callback, auto_find_batch_size=True)
    rows = trainer.state.train_batch_size
    assert trainer.args.train_batch_size == 8 and rows <= 4
    steps = -(-16 // rows)
    assert counts[:6] == [max(0, rows * (step - 6 + steps)) for step in range(1, 7)]


def test_several_gpus_in_one_process_are_refused():
    """A stand-in for the arguments: it comes first."""
    callback = ClusterExpertsCallback(**settings())
    with pytest.raises(ValueError, match="n_gpu=2 is not allowed: nn.DataParallel .* torchrun or accelerate launch"):
        callback.on_train_begin(SimpleNamespace(n_gpu=2), None, None, model=tiny_model("gpt2"))


@pytest.mark.parametrize("until", [3, 0.3])
def test_an_end_of_fits_before_the_first_is_refused(tmp_path, until):
    with pytest.raises(ValueError, match=rf"recluster_until={until} is not allowed with warmup=4: .* fit at step 4"):
        train(tmp_path, ClusterExpertsCallback(**settings(recluster_until=until)))
    assert fit_steps(train(tmp_path, ClusterExpertsCallback(**settings(recluster_until=4)))) == [4]


def test_no_warm_up_needs_clusters(tmp_path):
    with pytest.raises(ValueError, match="warmup=0.*fit_experts"):
        train(tmp_path, ClusterExpertsCallback(**settings(warmup=0)))
    model = tiny_model("gpt2")
    fit_experts(model, [{"input_ids": torch.stack([row["input_ids"] for row in rows(32)])}], num_clusters=3)
    trainer = train(tmp_path, ClusterExpertsCallback(**settings(warmup=0)), model=model)
    assert fit_steps(trainer) == [2, 4, 6, 8]


def test_more_clusters_than_sequences_are_refused_and_nothing_is_written(tmp_path):
    callback = ClusterExpertsCallback(**settings(num_clusters=12, warmup=1))
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(ValueError, match="num_clusters=12 is more than the 8 sequences"):
        trainer.train()
    assert clusters_in_use(trainer.model) == [0, 0]


@pytest.mark.parametrize(
    ("routing", "changes", "message"),
    [
        ("evidence", {"num_clusters": None, "sample_size": 8}, "sample_size=8 .* num_clusters=10"),
        ("discriminant", {"projection": 64}, "projection=64 is not allowed for embeddings of 32 dimensions"),
    ],
)
def test_what_would_fail_at_the_first_fit_is_refused_at_the_start(tmp_path, routing, changes, message):
    watcher = Watcher()
    with pytest.raises(ValueError, match=message):
        model = tiny_model("gpt2", cse_routing=routing)
        train(tmp_path, ClusterExpertsCallback(**settings(**changes)), model=model, callbacks=[watcher])
    assert not watcher.seen


def test_more_layers_than_there_are_are_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"layer_budget=3 .* cse_layers=\[1, 2\]: it must be at most 2"):
        train(tmp_path, ClusterExpertsCallback(**settings(layer_budget=3)))


@pytest.mark.parametrize("asked", [17, (2, 17)])
def test_more_clusters_than_routers_hold_are_refused_at_the_start(tmp_path, asked):
    """The upper end of a range too: the silhouette may choose it."""
    watcher = Watcher()
    with pytest.raises(ValueError, match=r"num_clusters=.*17.* is not allowed: .* at most cse_max_clusters=16"):
        train(tmp_path, ClusterExpertsCallback(**settings(num_clusters=asked, sample_size=32)), callbacks=[watcher])
    assert not watcher.logs


def test_activations_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path):
    """Also not in the layer before the one that diverged."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[2].ln_2.weight[0] = float("nan")
    trainer = make_trainer(tmp_path, ClusterExpertsCallback(**settings()), model=model)
    before = buffers(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        trainer.train()
    assert all(torch.equal(buffer, before[name]) for name, buffer in buffers(model).items())


@pytest.mark.parametrize("model", [dense_model, lambda family: tiny_model(family, cse_layers=[])])
def test_models_without_experts_are_refused(tmp_path, family, model):
    with pytest.raises(ValueError, match="must be a CSE GPT-2|set cse_layers"):
        train(tmp_path, model=model(family))


def test_bert_trains_with_sequence_routes(tmp_path, combine):
    trainer = train(tmp_path, model=tiny_model("bert", cse_combine=combine))
    assert fit_steps(trainer) == [4, 6, 8] and clusters_in_use(trainer.model) == [3, 3]
