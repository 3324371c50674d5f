# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises in `pipeline`: each task runs from a saved folder, nothing is called unsupported, and a batch with padding
says what its rows say alone."""

import logging

import pytest
import torch
from tiny import CONFIGS, SIZES, activate, model_class
from transformers import pipeline
from transformers.models.auto import modeling_auto

from modeling_cse.configuration_cse import BERT_AUTO_MAP, GPT2_AUTO_MAP
from modeling_cse.data import train_tokenizer


TEXTS = ["a court of law heard the case", "the patient", "rain in the north, and later snow over the hills", "law"]
LABELS = {"entailment": 0, "neutral": 1, "contradiction": 2}
TASKS = [
    ("text-generation", "gpt2", "ForCausalLM"),
    ("fill-mask", "bert", "ForMaskedLM"),
    ("text-classification", "gpt2", "ForSequenceClassification"),
    ("text-classification", "bert", "ForSequenceClassification"),
    ("token-classification", "gpt2", "ForTokenClassification"),
    ("token-classification", "bert", "ForTokenClassification"),
    ("feature-extraction", "gpt2", "Model"),
    ("feature-extraction", "bert", "Model"),
    ("zero-shot-classification", "gpt2", "ForSequenceClassification"),
    ("zero-shot-classification", "bert", "ForSequenceClassification"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saves a tiny model with a tokenizer, once a head."""
    root, made = tmp_path_factory.mktemp("pipelines"), {}

    def save(family: str, head: str):
        if (family, head) not in made:
            made[family, head] = root / f"{family}-{head}"
            tokenizer = train_tokenizer(TEXTS * 3, kind=family, vocab_size=300)
            tokenizer.save_pretrained(made[family, head])
            ids = {"pad_token_id": tokenizer.pad_token_id}
            if family == "gpt2":
                ids |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
            fields = SIZES[family] | ids | {"vocab_size": len(tokenizer), "label2id": LABELS}
            config = CONFIGS[family](**fields, id2label={number: name for name, number in LABELS.items()})
            torch.manual_seed(0)
            activate(model_class(family, head)(config).eval()).save_pretrained(made[family, head])
        return made[family, head]

    return save


def ask(task: str, run, texts: str | list[str], **options):
    if task == "text-generation":
        options |= {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_full_text": False}
    if task == "fill-mask":
        texts = f"[MASK] {texts}" if isinstance(texts, str) else [f"[MASK] {text}" for text in texts]
    if task == "zero-shot-classification":
        options["candidate_labels"] = ["law", "medicine"]
    return run(texts, **options)


def parts(answer) -> tuple[list[str], list[float]]:
    """All words and all numbers of a nested answer."""
    if isinstance(answer, dict | list | tuple):
        inner = [parts(value) for value in (answer.values() if isinstance(answer, dict) else answer)]
        return [word for words, _ in inner for word in words], [value for _, values in inner for value in values]
    return ([answer], []) if isinstance(answer, str) else ([], [float(answer)])


@pytest.mark.parametrize(("task", "family", "head"), TASKS)
def test_a_batch_with_padding_says_what_its_rows_say_alone(folder, caplog, monkeypatch, task, family, head):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        run = pipeline(task, model=str(folder(family, head)), device="cpu")
    assert "not supported" not in caplog.text and type(run.model) is model_class(family, head)
    if task == "text-generation":
        run.tokenizer.padding_side = "left"
    single = [ask(task, run, text) for text in TEXTS]
    batched = ask(task, run, TEXTS, batch_size=4)
    assert len(batched) == len(TEXTS)
    for alone, together in zip(single, batched, strict=True):
        (words, values), (other_words, other_values) = parts(alone), parts(together)
        if task == "feature-extraction":  # it hands out the states of the padding at the end as well
            assert len(values) <= len(other_values)
            other_values = other_values[: len(values)]
        assert words == other_words
        assert values == pytest.approx(other_values, abs=1e-5)
    assert parts(single[0]) != parts(single[2])


@pytest.mark.parametrize("auto_map", [GPT2_AUTO_MAP, BERT_AUTO_MAP], ids=["gpt2", "bert"])
def test_every_head_stands_in_the_tables_that_upstream_reads_by_name(auto_map):
    for auto_class, name in auto_map.items():
        if auto_class != "AutoConfig":
            table = getattr(modeling_auto, auto_class)._model_mapping._model_mapping
            assert name.split(".")[-1] in table.values()
    assert "CSEGPT2ForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
