# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of gradient consistency measured while training: it is that of the exact gradients, and changes nothing."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE_HEAD, labelled, routed_module, tiny_model
from tiny_runs import DROPOUT, make_trainer
from transformers import TrainerCallback

from modeling_cse.training import consistency as module
from modeling_cse.training.consistency import GradientConsistency, output_projection
from modeling_cse.training.gradients import NO_TOKEN, gradient_consistency


RARE = torch.arange(8) % 4 == 0  # of the rows of `skewed`


def training_model(family: str = "gpt2", **flags):
    return tiny_model(family, **flags).train()


def padded(family: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Eight rows of unequal lengths."""
    return labelled(family, LANGUAGE_HEAD[family], rows=8, seed=seed)


def skewed(seed: int = 0) -> dict[str, torch.Tensor]:
    """Eight rows that mostly repeat one common token, but every fourth a rare one."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.where(RARE, 50, 5).unsqueeze(1)
    others = first + torch.randint(0, 40, (8, 16), generator=generator)
    ids = torch.where(torch.rand(8, 16, generator=generator) < 0.7, first, others)
    return {"input_ids": ids, "labels": ids}


def watched(model, *batches, factor: float = 1.0, **options) -> GradientConsistency:
    """What is recorded of one step a batch, at the same weights."""
    consistency = GradientConsistency(model, **options)
    consistency.attach()
    record(consistency, model, *batches, factor=factor)
    consistency.detach()
    return consistency


def record(consistency, model, *batches, factor: float = 1.0) -> None:
    for batch in batches:
        consistency.step += 1
        (factor * model(**batch).loss).backward()


def exact_gradients(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Gradients of the studied weight, (B, d, f), one backward pass a row; the loss is the mean over all labels."""
    weight = output_projection(routed_module(model, 2)).weight
    causal = model.config.model_type == "cse_gpt2"
    logits, labels = model(**batch).logits, batch["labels"]
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1) / (labels != -100).sum()
    found = torch.stack([torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses])
    return found.transpose(1, 2) if causal else found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- the sketch --------------------------------------------------------------------------------------------------


def test_sketches_are_the_projected_gradients_of_single_sequences(family):
    model, batch = training_model(family), padded(family)
    consistency = watched(model, batch, sketch_size=8)
    outer, inner = consistency._projections
    wanted = outer.T @ exact_gradients(model, batch) @ inner
    found = consistency.sequences().sketches.view_as(wanted)
    assert wanted.abs().amax((1, 2)).min() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_inner_products_are_kept_in_expectation(family):
    """One sketch of r = 32 is off by 0.09 to 0.13 here (root mean square, over the gradients' lengths), as expected of
    gradients of low rank: 0.2 is allowed. The mean of 40 must come nearer as an unbiased one does, by sqrt(40)."""
    model, batch = training_model(family), padded(family)
    exact = F.normalize(exact_gradients(model, batch).double().flatten(1), dim=1)
    lengths = exact_gradients(model, batch).double().flatten(1).norm(dim=1, keepdim=True)
    errors = []
    for seed in range(40):
        sketches = watched(model, batch, seed=seed).sequences().sketches.double() / lengths
        errors.append(sketches @ sketches.T - exact @ exact.T)
    errors = torch.stack(errors)
    assert errors.square().mean().sqrt() < 0.2
    assert errors.mean(0).square().mean().sqrt() < 2 * 0.2 / math.sqrt(40)


def test_consistency_is_near_that_of_the_exact_gradients(family):
    """Where there is a principal direction: without a gap between the largest eigenvalue and the next there is nothing
    to be near to. With r = 128 a cosine is off by 0.5 / sqrt(128) = 0.05 on average; three times that is allowed."""
    model, batches = training_model(family), [skewed(seed) for seed in range(4)]
    for batch in batches:  # fewer labels in rare rows, lest they make a second direction as strong as the first
        batch["labels"] = batch["labels"].masked_fill(RARE.unsqueeze(1) & (torch.arange(16) % 2 == 0), -100)
    exact = torch.cat([exact_gradients(model, batch).flatten(1) for batch in batches])
    rare = RARE.repeat(4)
    for part in (exact, exact[rare]):
        values = torch.linalg.eigvalsh(part.double() @ part.double().T)
        assert values[-1] > 3 * values[-2]
    wanted = gradient_consistency(exact, rare)
    assert abs(wanted) < 0.9
    for seed in range(5):
        found = watched(model, *batches, seed=seed, sketch_size=128).sequences().sketches
        assert gradient_consistency(found, rare) == pytest.approx(wanted, abs=0.15)


def test_padding_changes_no_sketch(family):
    """Padded positions carry no loss: a row beside longer ones has the sketch that it has alone, but for a factor."""
    model, batch = training_model(family), padded(family)
    together = watched(model, batch).sequences()
    for row in (1, 2):
        length = int(batch["attention_mask"][row].sum())
        alone = watched(model, {name: value[row : row + 1, :length] for name, value in batch.items()}).sequences()
        assert alone.tokens.shape[1] == length < together.tokens.shape[1]
        torch.testing.assert_close(
            F.normalize(alone.sketches[0], dim=0), F.normalize(together.sketches[row], dim=0), atol=1e-4, rtol=0
        )


def test_sketches_under_autocast_are_fp32_and_near(family):
    model, batch = training_model(family), padded(family)
    consistency = GradientConsistency(model)
    consistency.attach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    found, wanted = consistency.sequences().sketches, watched(model, batch).sequences().sketches
    assert found.dtype == torch.float32
    assert F.cosine_similarity(found, wanted).min() > 0.99


# ---- what is recorded --------------------------------------------------------------------------------------------


def test_tokens_are_counted_but_for_padding_and_ignored_ones(family):
    model, batch = training_model(family), padded(family)
    ignored = batch["input_ids"][0, 3].item()
    consistency = watched(model, batch, batch, ignored_tokens=[ignored, 2])
    kept = batch["input_ids"][(batch["attention_mask"] == 1) & (batch["input_ids"] != ignored)]
    assert torch.equal(consistency.counts, 2 * torch.bincount(kept, minlength=99))
    tokens = consistency.sequences().tokens
    assert (tokens == ignored).sum() == 0 and (tokens != NO_TOKEN).sum() == 2 * len(kept)


def test_only_training_is_recorded(family):
    model, batch = training_model(family), padded(family)
    consistency = GradientConsistency(model)
    consistency.attach()
    with torch.no_grad():
        model(**batch)
    model.eval()
    model(**batch).loss.backward()
    assert len(consistency.sequences()) == 0 and consistency.counts.sum() == 0
    model.train()
    loss = model(**batch).loss
    model.eval()
    with torch.no_grad():
        model(**padded(family, seed=1))
    model.train()
    loss.backward()
    assert len(consistency.sequences()) == 8 and consistency.counts.sum() == batch["attention_mask"].sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_records_the_same_and_once(family, reentrant):
    model, batches = training_model(family), [padded(family, seed) for seed in range(3)]
    plain = watched(model, *batches)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    again = watched(model, *batches)
    assert len(again.sequences()) == 24 and torch.equal(again.counts, plain.counts)
    assert same(vars(again.sequences()), vars(plain.sequences()))


def test_a_second_backward_pass_records_nothing_again():
    model = training_model()
    consistency = GradientConsistency(model)
    consistency.attach()
    loss = model(**skewed()).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert len(consistency.sequences()) == 8


class Watching(TrainerCallback):
    """Keeps what a run of the Trainer recorded."""

    def __init__(self, **options):
        self.options, self.consistency = options, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.consistency = GradientConsistency(model, **self.options)
        self.consistency.attach()

    def on_step_begin(self, args, state, control, **kwargs):
        self.consistency.step = state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self.consistency.detach()


@pytest.mark.parametrize(("batch", "accumulate", "checkpointing"), [(4, 2, False), (2, 4, True)])
def test_accumulation_records_every_row_once(tmp_path, batch, accumulate, checkpointing):
    """However a step is cut up, and with evaluation in between, its sketches are the same."""
    found = []
    for cut in ((8, 1, False), (batch, accumulate, checkpointing)):
        watching = Watching(window=24)
        trainer = make_trainer(
            tmp_path,
            model=tiny_model("gpt2"),
            callbacks=[watching],
            per_device_train_batch_size=cut[0],
            gradient_accumulation_steps=cut[1],
            activation_checkpointing=cut[2],
            eval_strategy="steps",
            eval_steps=1,
            max_steps=3,
            learning_rate=0.0,
        )
        trainer.train()
        found.append(watching.consistency)
    first, second = (consistency.sequences() for consistency in found)
    assert torch.equal(found[0].counts, found[1].counts) and found[0].counts.sum() == 24 * 12
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.steps, second.steps)
    assert first.steps.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    torch.testing.assert_close(
        first.sketches, second.sketches, rtol=1e-3, atol=1e-4 * float(first.sketches.abs().max())
    )


def test_training_is_the_same_with_and_without(tmp_path):
    """With dropout, whose random numbers nobody else may draw."""
    models = []
    for callbacks in ((), (Watching(window=8),)):
        trainer = make_trainer(tmp_path, model=tiny_model("gpt2", **DROPOUT), callbacks=callbacks, max_steps=3)
        trainer.train()
        models.append((trainer.model.state_dict(), torch.get_rng_state()))
    assert same(models[0][0], models[1][0])
    assert torch.equal(models[0][1], models[1][1])


def test_hooks_are_gone_after_detaching(family):
    model = training_model(family)
    watched(model, padded(family))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_nothing_is_measured_before_the_window_is_full_and_old_rows_leave_it():
    model = training_model()
    consistency = GradientConsistency(model, window=16)
    consistency.attach()
    assert consistency.measure() is None
    record(consistency, model, skewed(0))
    assert consistency.measure() is None
    record(consistency, model, skewed(1), skewed(2))
    assert math.isfinite(consistency.measure()["gradient_consistency"])
    consistency.detach()
    rows, wanted = consistency.sequences(), watched(model, skewed(1), skewed(2)).sequences()
    assert torch.equal(rows.sketches, wanted.sketches) and torch.equal(rows.tokens, wanted.tokens)
    assert rows.steps.tolist() == [2] * 8 + [3] * 8


def test_rows_of_rare_tokens_are_the_tail():
    """By the counts of all text so far: those rows are chosen that are rare by them, and not within the window."""
    model, batches = training_model(), [skewed(seed) for seed in range(4)]
    consistency = watched(model, *batches, window=32, tail_share=0.25)
    rows = consistency.sequences()
    wanted = gradient_consistency(module.scale_steps(rows.sketches, rows.steps), RARE.repeat(4), rows.steps)
    measured = consistency.measure()
    assert measured["gradient_consistency_signed"] == wanted and measured["gradient_consistency"] == abs(wanted)
    scores = module.sentence_frequency_scores(rows.tokens, consistency.counts)
    assert scores[RARE.repeat(4)].max() == measured["tail_frequency_score"] < scores[~RARE.repeat(4)].min()
    consistency.counts[50:] += 10_000
    assert consistency.measure()["gradient_consistency_signed"] != wanted


def test_the_whole_window_is_consistent_with_itself():
    consistency = watched(training_model(), skewed(0), skewed(1), window=16, tail_share=1)
    assert consistency.measure()["gradient_consistency"] == pytest.approx(1.0)


def test_the_factor_of_a_step_does_not_matter():
    model = training_model()
    consistency = GradientConsistency(model, window=16)
    consistency.attach()
    values = []
    for factor in (1.0, 1024.0):
        record(consistency, model, skewed(0))
        record(consistency, model, skewed(1), factor=factor)
        values.append(consistency.measure()["gradient_consistency"])
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def test_rows_whose_gradients_overflowed_are_left_out():
    model, options = training_model(), {"window": 16}
    whole = watched(model, skewed(0), skewed(1), **options)
    consistency = GradientConsistency(model, window=24)
    consistency.attach()
    record(consistency, model, skewed(0))
    record(consistency, model, skewed(5), factor=math.inf)
    record(consistency, model, skewed(1))
    consistency.counts = whole.counts
    assert not consistency.sequences().sketches[8:16].isfinite().any()
    assert consistency.measure()["gradient_consistency"] == pytest.approx(whole.measure()["gradient_consistency"])
    record(consistency, model, *[skewed(seed) for seed in range(3)], factor=math.inf)
    assert math.isnan(consistency.measure()["gradient_consistency"])


def test_ranks_measure_on_the_sequences_of_all(monkeypatch):
    """Two halves of a window, and of the counts, give what the whole gives."""
    model, batches = training_model(), [skewed(seed) for seed in range(4)]
    wanted = watched(model, *batches, window=32).measure()
    halves = [watched(model, *batches[:2], window=32), watched(model, *batches[2:], window=32)]
    assert halves[0].measure() is None
    parts = [(half.sequences(), half.counts) for half in halves]
    parts[1][0].steps.add_(2)
    monkeypatch.setattr(module, "gather_objects", lambda own: parts)
    assert halves[0].measure() == halves[1].measure() == wanted


SCRIPT = """
import json, pathlib, sys, torch
sys.path[:0] = {paths!r}
torch.set_num_threads(1)
from test_consistency import skewed, training_model, watched
import accelerate
rank = accelerate.PartialState(cpu=True).process_index
found = watched(training_model(), skewed(2 * rank), skewed(2 * rank + 1), window=32)
result = {{"rows": len(found.sequences()), **found.measure()}}
pathlib.Path({folder!r}, f"rank{{rank}}.json").write_text(json.dumps(result))
"""


@pytest.mark.slow
def test_two_processes_get_one_number(tmp_path):
    here = Path(__file__).resolve()
    script = tmp_path / "script.py"
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[2])]
    script.write_text(SCRIPT.format(paths=paths, folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["rows"] == 16 and math.isfinite(first["gradient_consistency"])


# ---- state -------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_from_its_state(tmp_path):
    """Also through a file, and with rows of other lengths to come."""
    model, batches = training_model(), [padded("gpt2", seed) for seed in range(4)]
    options = {"window": 24, "ignored_tokens": [7]}
    whole = watched(model, *batches[:2], **options)
    save_file(whole.state(), tmp_path / "state.safetensors")
    resumed = GradientConsistency(model, **options)
    resumed.load(load_file(tmp_path / "state.safetensors"))
    assert same(resumed.state(), whole.state())
    resumed.step = whole.step
    for consistency in (whole, resumed):
        consistency.attach()
        record(consistency, model, *batches[2:])
        consistency.detach()
    assert same(resumed.state(), whole.state()) and len(whole.sequences()) == 24
    assert resumed.measure() == whole.measure() and whole.measure() is not None


def test_an_empty_state_goes_round(tmp_path):
    empty = GradientConsistency(training_model())
    save_file(empty.state(), tmp_path / "state.safetensors")
    empty.load(load_file(tmp_path / "state.safetensors"))
    assert len(empty.sequences()) == 0


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({}, {"counts": torch.zeros(98, dtype=torch.int64)}, r"counts of \(98,\).*99 tokens"),
        ({"sketch_size": 8}, {}, "sketch_size=8"),
        ({"seed": 1}, {}, "seed=1 is not allowed.*seed=0"),
        ({}, {"steps": None}, "'steps'.* must be there too"),
    ],
)
def test_foreign_states_are_refused(options, changes, message):
    model = training_model()
    state = {**watched(model, skewed()).state(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    consistency = GradientConsistency(model, **options)
    with pytest.raises(ValueError, match=message):
        consistency.load(state)
    assert len(consistency.sequences()) == 0 and consistency.counts.sum() == 0
