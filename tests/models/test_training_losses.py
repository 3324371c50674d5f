# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the losses: one optimizer step means the same however its batch was cut up."""

import pytest
import torch
from tiny import EVERY_HEAD, LANGUAGE_HEADS, activate, labelled, tiny_model
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


@pytest.mark.parametrize(("family", "head"), HEADS_WITH_LOSS)
@pytest.mark.parametrize("active", [False, True], ids=["dense", "routed"])
def test_a_step_is_the_same_however_its_rows_are_cut(family, head, active, tmp_path):
    found = []
    for batch, accumulate in ((8, 1), (2, 4), (1, 8), (3, 3)):
        model = tiny_model(family, head)
        found.append(step(activate(model) if active else model, rows_of(family, head), batch, accumulate, tmp_path))
    if head == "ForQuestionAnswering":
        del found[-1]  # answers are not counted by `Trainer`: micro-batches must have as many rows
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_numbers_and_several_labels_a_row_are_cut_alike(family, kind, tmp_path):
    width = 1 if kind == "regression" else 3
    rows = [
        {**row, "labels": torch.rand(width, generator=torch.Generator().manual_seed(i)).squeeze()}
        for i, row in enumerate(rows_of(family, "ForSequenceClassification"))
    ]
    found = []
    for cut in ((8, 1), (2, 4), (3, 3)):
        model = tiny_model(family, "ForSequenceClassification", num_labels=width, problem_type=kind)
        found.append(step(model, rows, *cut, tmp_path))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(("family", "head"), [pair for pair in HEADS_WITH_LOSS if pair[1] != "ForQuestionAnswering"])
def test_a_micro_batch_without_labels_adds_nothing(family, head):
    model, batch = tiny_model(family, head).train(), labelled(family, head)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_pretraining_loss_is_the_stock_one_where_rows_have_as_many_labels():
    model, batch = tiny_model("bert", "ForPreTraining"), labelled("bert", "ForPreTraining")
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, 5:] = -100
    counted = model(**batch, num_items_in_batch=20)
    stock = model(**batch)
    torch.testing.assert_close(counted.loss, stock.loss)
    assert list(counted) == list(stock)


def test_pretraining_loss_weighs_rows_by_their_labels():
    model, batch = tiny_model("bert", "ForPreTraining"), labelled("bert", "ForPreTraining")
    outputs = model(**batch)
    counts = (batch["labels"] != -100).sum(-1)
    tokens = torch.nn.functional.cross_entropy(outputs.prediction_logits.flatten(0, 1), batch["labels"].flatten())
    rows = torch.nn.functional.cross_entropy(
        outputs.seq_relationship_logits, batch["next_sentence_label"], reduction="none"
    )
    wanted = tokens + (rows * counts).sum() / counts.sum()
    torch.testing.assert_close(model(**batch, num_items_in_batch=counts.sum()).loss, wanted)


@pytest.mark.parametrize(("family", "head"), HEADS_WITH_LOSS)
def test_tuples_have_the_same_loss(family, head):
    model, batch = tiny_model(family, head), labelled(family, head)
    asked = {} if head == "ForQuestionAnswering" else {"num_items_in_batch": 5}
    wanted = model(**batch, **asked)
    found = model(**batch, **asked, return_dict=False)
    torch.testing.assert_close(found[0], wanted.loss)
    torch.testing.assert_close(found[1], wanted[1])


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
