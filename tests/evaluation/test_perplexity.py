# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of perplexity: exp of the token-mean loss, whoever asks and however the sequences arrive."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    EvalPrediction,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

from modeling_cse.evaluation import (
    Perplexity,
    PerplexityByDomain,
    perplexity_for_trainer,
    row_losses_for_trainer,
    token_losses,
)


NLL, TOKENS = [2.0, 30.0, 0.0], [1, 10, 0]
EXPECTED = math.exp(32 / 11)


def test_it_is_exp_of_the_token_mean_loss():
    result = Perplexity().compute(predictions=NLL, references=TOKENS)
    assert result == {"perplexity": pytest.approx(EXPECTED), "loss": pytest.approx(32 / 11), "tokens": 11}


def test_batches_add_up_and_compute_forgets_them():
    metric = Perplexity()
    metric.add_batch(predictions=np.array(NLL[:2]), references=np.array(TOKENS[:2]))
    metric.add_batch(predictions=torch.tensor(NLL[2:]), references=torch.tensor(TOKENS[2:]))
    assert metric.compute()["perplexity"] == pytest.approx(EXPECTED)
    assert metric.compute(predictions=[5.0], references=[5])["perplexity"] == pytest.approx(math.e)


def test_instances_do_not_see_each_other_and_write_no_file(tmp_path):
    first, second = Perplexity(cache_dir=str(tmp_path)), Perplexity(cache_dir=str(tmp_path))
    first.add_batch(predictions=[1.0], references=[1])
    second.add_batch(predictions=[4.0], references=[2])
    assert second.compute()["loss"] == 2.0
    assert first.compute()["loss"] == 1.0
    assert list(tmp_path.iterdir()) == []


def test_the_file_backed_mode_of_the_library_still_works(tmp_path):
    metrics = [Perplexity(keep_in_memory=False, cache_dir=str(tmp_path)) for _ in range(2)]
    for loss, metric in enumerate(metrics, start=1):
        metric.add_batch(predictions=[float(loss)], references=[1])
    assert [metric.compute()["loss"] for metric in metrics] == [1.0, 2.0]


def test_a_failed_compute_leaves_nothing_behind():
    metric = Perplexity()
    with pytest.raises(ValueError, match="0 predicted tokens"):
        metric.compute(predictions=[0.0], references=[0])
    with pytest.raises(ValueError, match="no sequence was given"):
        metric.compute()
    assert metric.compute(predictions=[1.0], references=[1])["tokens"] == 1


@pytest.mark.parametrize("metric", [Perplexity, PerplexityByDomain])
def test_no_sequence_at_all_is_an_error(metric):
    empty = {"predictions": [], "references": []} | ({"domains": []} if metric is PerplexityByDomain else {})
    with pytest.raises(ValueError, match="`references` has 0 predicted tokens"):
        metric().compute(**empty)


def test_impossible_values_are_errors_that_name_the_argument():
    with pytest.raises(ValueError, match=r"`predictions` has a loss of -3\.0"):
        Perplexity().compute(predictions=[-3.0], references=[1])
    with pytest.raises(ValueError, match="`references` has a count of -1"):
        Perplexity().compute(predictions=[3.0], references=[-1])


def test_a_diverged_model_is_shown_not_hidden():
    assert math.isnan(Perplexity().compute(predictions=[1.0, math.nan], references=[1, 1])["perplexity"])
    assert Perplexity().compute(predictions=[math.inf], references=[1])["perplexity"] == math.inf
    assert Perplexity().compute(predictions=[5000.0], references=[1])["perplexity"] == math.inf


def test_domains_have_their_own_number_and_the_overall_is_that_of_all_tokens():
    metric = PerplexityByDomain()
    metric.add_batch(predictions=[2.0, 9.0], references=[1, 3], domains=["law", "medicine"])
    metric.add_batch(predictions=[4.0], references=[5], domains=["law"])
    result = metric.compute()
    assert result["perplexity"] == pytest.approx(math.exp(15 / 9))
    assert result["loss"] == pytest.approx(15 / 9)
    assert result["perplexity_by_domain"] == pytest.approx({"law": math.e, "medicine": math.exp(3)})
    assert result["tokens_by_domain"] == {"law": 6, "medicine": 3}


def test_a_domain_without_tokens_is_named():
    with pytest.raises(ValueError, match="in domain 'law'"):
        PerplexityByDomain().compute(predictions=[1.0, 0.0], references=[1, 0], domains=["medicine", "law"])


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 2500), (2, 1)])
def test_token_losses_equal_the_plain_formula(shift, shape):
    torch.manual_seed(0)
    logits = torch.randn(*shape, 11)
    labels = torch.randint(0, 11, shape).masked_fill(torch.rand(shape) < 0.3, -100)
    log_probabilities = logits.log_softmax(-1)
    if shift:
        log_probabilities, labels_used = log_probabilities[:, :-1], labels[:, 1:]
    else:
        labels_used = labels
    chosen = log_probabilities.gather(-1, labels_used.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    nll, tokens = token_losses(logits, labels, shift=shift)
    torch.testing.assert_close(nll, -(chosen * (labels_used != -100)).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, (labels_used != -100).sum(1))
    assert nll.dtype == torch.float32 and tokens.dtype == torch.int64


def test_token_losses_of_bf16_logits_are_taken_in_fp32_and_ignored_positions_may_hold_anything():
    logits = torch.randn(2, 5, 11, dtype=torch.bfloat16)
    labels = torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, 8]])
    expected, _ = token_losses(logits.float(), labels, shift=False)
    logits[0, 3:] = torch.nan
    nll, _ = token_losses(logits, labels, shift=False)
    assert torch.equal(nll, expected)


def test_token_losses_say_which_shape_is_wrong():
    with pytest.raises(ValueError, match=r"`logits` has shape \(2, 5\)"):
        token_losses(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.long), shift=True)
    with pytest.raises(ValueError, match=r"`labels` has shape \(2, 4\), allowed is \(2, 5\)"):
        token_losses(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.long), shift=True)


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def tiny_bert() -> BertForMaskedLM:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForMaskedLM(BertConfig(vocab_size=17, max_position_embeddings=16, **sizes))


def ragged_rows(count: int, masked: bool) -> list[dict[str, torch.Tensor]]:
    """Rows of 3 to 12 tokens; for a masked model only every third token is predicted."""
    rows = []
    for index in range(count):
        ids = torch.randint(1, 17, (3 + (5 * index) % 10,))
        labels = torch.where(torch.arange(len(ids)) % 3 == 0, ids, -100) if masked else ids
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def pad(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    columns = {"input_ids": 0, "labels": -100}
    stacked = {
        name: torch.nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in columns.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    stacked["attention_mask"] = (torch.arange(stacked["input_ids"].shape[1]) < lengths[:, None]).long()
    return stacked


@torch.no_grad()
def perplexity_by_hand(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]], shift: bool) -> tuple[float, int]:
    """One row at a time, unpadded, in float64."""
    total, count = 0.0, 0
    for row in rows:
        logits, labels = model(input_ids=row["input_ids"][None]).logits[0].double(), row["labels"]
        if shift:
            logits, labels = logits[:-1], labels[1:]
        kept = labels != -100
        total -= logits.log_softmax(-1)[kept].gather(1, labels[kept][:, None]).sum().item()
        count += int(kept.sum())
    return math.exp(total / count), count


@pytest.mark.parametrize("concatenate", [True, False])
@pytest.mark.parametrize("make, shift", [(tiny_gpt2, True), (tiny_bert, False)])
def test_the_trainer_reports_the_exact_number_of_every_domain(tmp_path, make, shift, concatenate):
    torch.manual_seed(0)
    model = make().eval()
    sets = {name: ragged_rows(count, masked=not shift) for name, count in {"law": 7, "medicine": 9}.items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        eval_do_concat_batches=concatenate,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=pad,
        eval_dataset=sets,
        compute_metrics=perplexity_for_trainer(),
        preprocess_logits_for_metrics=row_losses_for_trainer(shift),
    )
    metrics = trainer.evaluate()
    for name, rows in sets.items():
        expected, tokens = perplexity_by_hand(model, rows, shift)
        assert metrics[f"eval_{name}_perplexity"] == pytest.approx(expected, rel=1e-5)
        assert metrics[f"eval_{name}_tokens"] == tokens


def test_the_adapters_say_what_is_missing():
    with pytest.raises(ValueError, match="`labels` is None"):
        row_losses_for_trainer(True)(torch.zeros(1, 2, 3), None)
    with pytest.raises(ValueError, match="row_losses_for_trainer"):
        perplexity_for_trainer()(EvalPrediction(predictions=np.zeros((2, 3, 4)), label_ids=np.zeros((2, 3))))


def test_the_first_of_several_model_outputs_is_taken_as_logits():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, 3], [4, 0, -100]])
    with_extras = row_losses_for_trainer(True)((logits, torch.zeros(2)), labels)
    for found, expected in zip(with_extras, token_losses(logits, labels, shift=True), strict=True):
        assert torch.equal(found, expected)
