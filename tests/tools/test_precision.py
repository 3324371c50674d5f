# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises under activation checkpointing and autocast, alone and together, in runs with the callback: the losses are
those of the plain run, clusters are found all the same, and routing stays in fp32."""

import pytest
import torch
from tiny import EVIDENCE, activate, first_tensor, routed_modules, tiny_model, token_ids
from tiny_runs import fit_steps, make_trainer, rows, settings
from transformers import TrainerCallback

from modeling_cse import ClusterExpertsCallback


BOTH = ["attention", "ffn"]
MODELS = {"gpt2": {}, "bert": {}, "gpt2 by evidence": EVIDENCE}
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(params=MODELS)
def kind(request):
    return request.param


def made(kind: str):
    return tiny_model(kind.split()[0], cse_modules=BOTH, **MODELS[kind])


class Spy(TrainerCallback):
    """Notes the dtype of the scores of every router, and how many sequences each store saw until the first fit."""

    def __init__(self, callback):
        self.callback, self.dtypes, self.counts = callback, set(), {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        for name, module in model.named_modules():
            if name.endswith("router"):
                module.register_forward_hook(lambda router, args, outputs: self.dtypes.add(outputs[0].dtype))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            self.counts = {site: store.seen for site, store in self.callback.collector.stores.items()}


def run(folder, kind: str, precision: str | None = None, **changes):
    """A run; `bf16` by the Trainer's own argument. Its `fp16` does nothing on a CPU, silently: there autocast is put
    around its forward passes."""
    callback = ClusterExpertsCallback(**settings(sample_size=16))
    spy = Spy(callback)
    options = {"model": made(kind), "learning_rate": 1e-3, "bf16": precision == "bf16"}
    trainer = make_trainer(folder, callback, callbacks=[spy], **options, **changes)
    if precision == "fp16":
        trainer.compute_loss_context_manager = lambda: torch.autocast("cpu", torch.float16)
    trainer.train()
    return trainer, spy


def seen(kind: str) -> int:
    """Sequences until the first fit, after four steps of eight: a sample, or by evidence up to three."""
    return 32 if "evidence" in kind else 16


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return {kind: losses(run(tmp_path_factory.mktemp("plain"), kind)[0]) for kind in MODELS}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("precision", [None, "bf16"])
def test_checkpointing_is_the_plain_run(tmp_path, kind, plain, use_reentrant, precision):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer, spy = run(tmp_path, kind, precision, **options)
    assert losses(trainer) == pytest.approx(plain[kind], rel=1e-4 if precision is None else 0.02)
    assert fit_steps(trainer) == [4, 6, 8]
    assert set(spy.counts.values()) == {seen(kind)} and len(spy.counts) == 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autocast_is_close_to_the_plain_run_and_routes_in_fp32(tmp_path, kind, plain, precision):
    trainer, spy = run(tmp_path, kind, precision)
    assert losses(trainer) == pytest.approx(plain[kind], rel=0.02)
    assert losses(trainer) != plain[kind]
    assert fit_steps(trainer) == [4, 6, 8]
    assert spy.dtypes == {torch.float32} and set(spy.counts.values()) == {seen(kind)}
    for module in routed_modules(trainer.model).values():
        floats = [buffer for buffer in module.router.buffers() if buffer.is_floating_point()]
        assert len(floats) == 4 and all(buffer.dtype == torch.float32 for buffer in floats)


@pytest.mark.parametrize("dtype", PRECISIONS.values())
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_compute_in_the_dtype_of_autocast(kind, dtype, implementation):
    """Grouped products do not know autocast, and would run in fp32."""
    model = activate(made(kind))
    model.set_experts_implementation(implementation)
    ids = token_ids()
    with torch.no_grad():
        exact = first_tensor(model(ids))
    seen = []
    for module in routed_modules(model).values():
        module.experts.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        rough = first_tensor(model(ids))
    assert seen and (implementation == "eager" or set(seen) == {dtype})
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_label_smoothing_smooths_the_next_token(tmp_path):
    """Upstream shifts labels for classes whose names it knows."""
    model = activate(tiny_model("gpt2"))
    trainer = make_trainer(tmp_path, model=model, label_smoothing_factor=0.1)
    batch = {name: torch.stack([row[name] for row in rows(4)]) for name in ("input_ids", "attention_mask", "labels")}
    with torch.no_grad():
        found = trainer.compute_loss(model, dict(batch)).item()
        scores = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    nll = -scores.gather(-1, batch["labels"][:, 1:, None]).mean().item()
    assert found == pytest.approx(0.9 * nll - 0.1 * scores.mean().item(), rel=1e-5)
