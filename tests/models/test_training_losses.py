# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the losses: one optimizer step means the same however its batch was cut up."""

import pytest
import torch
from tiny import EVERY_HEAD, LANGUAGE_HEADS, activate, labelled, model_class, tiny_model
from transformers import Trainer, TrainingArguments


HEADS_WITH_LOSS = [(family, head) for family, head in EVERY_HEAD if head != "Model"]


def rows_of(family: str, head: str) -> list[dict]:
    """Eight rows, their labels unequally many."""
    batch = labelled(family, head, rows=16 if head == "ForMultipleChoice" else 8)
    return [{name: value[row] for name, value in batch.items()} for row in range(8)]


def step(model, rows: list[dict], batch: int, accumulate: int, folder) -> tuple[float, float]:
    """Loss and gradient norm of one optimizer step, as `Trainer` logs them."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    logged = trainer.state.log_history[0]
    return logged["loss"], logged["grad_norm"]


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
@pytest.mark.parametrize("active", [False, True], ids=["dense", "routed"])
def test_language_losses_are_token_means_of_the_step(family, head, active, tmp_path):
    found = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = tiny_model(family, head)
        found.append(step(activate(model) if active else model, rows_of(family, head), batch, accumulate, tmp_path))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(("family", "head"), [pair for pair in HEADS_WITH_LOSS if pair not in LANGUAGE_HEADS])
def test_other_losses_are_means_over_micro_batches(family, head, tmp_path):
    """Micro-batches of as many labels each: then the mean of their means is the mean of the step."""
    assert model_class(family, head).accepts_loss_kwargs is False
    rows = rows_of(family, head)
    if head in ("ForTokenClassification", "ForPreTraining"):
        rows = [{**row, "labels": torch.ones_like(row["labels"])} for row in rows]
    found = [step(tiny_model(family, head), rows, *cut, tmp_path) for cut in ((8, 1), (2, 4))]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_language_losses_take_a_number_of_items(family, head):
    """What `Trainer` counts over the whole step stands in the denominator."""
    model, batch = tiny_model(family, head), labelled(family, head)
    labels = batch["labels"][:, 1:] if family == "gpt2" else batch["labels"]
    items = (labels != -100).sum()
    with torch.no_grad():
        mean, quarter = model(**batch).loss, model(**batch, num_items_in_batch=4 * items).loss
    torch.testing.assert_close(quarter * 4, mean)


def test_masked_language_loss_is_the_stock_loss():
    """On one whole batch, and in a tuple too."""
    model, batch = tiny_model("bert"), labelled("bert", "ForMaskedLM")
    wanted = torch.nn.functional.cross_entropy(model(**batch).logits.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(model(**batch).loss, wanted)
    loss, logits = model(**batch, return_dict=False)
    torch.testing.assert_close(loss, wanted)
    assert logits.shape == (4, 16, 99)
