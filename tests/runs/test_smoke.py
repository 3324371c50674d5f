# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""A run is tried on little text, but on enough of it."""

import json

import pytest
from datasets import Dataset
from small_run import SHORT, flags

from modeling_cse.data import load_corpus
from modeling_cse.runs import GPT2
from modeling_cse.runs.arguments import parse_arguments
from modeling_cse.runs.pretraining import Pretraining
from modeling_cse.runs.smoke import few_documents, first_documents


def test_short_documents_of_a_rare_domain_fill_a_block(tmp_path):
    """Of twenty documents to validate on hardly one would be of the rare domain."""
    files = {}
    for split, count in (("train", 3000), ("validation", 1500)):
        domains = ["b" if row % 50 else "rare" for row in range(count)]
        rows = [{"text": f"word {row % 7} is short", "domain": domain} for row, domain in enumerate(domains)]
        files[f"{split}_file"] = tmp_path / f"{split}.jsonl"
        files[f"{split}_file"].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {**SHORT, **files, "tokenizer_vocab_size": 300}
    run = Pretraining(GPT2, *parse_arguments([*flags(tmp_path / "run", **changes), "--smoke"]))
    run._load_data()
    assert list(run.validation) == ["b", "rare"] and set(run.training_domains) == {"b", "rare"}
    assert len(run.training) >= 64 and run.data_arguments.max_train_samples == 80


def test_long_documents_are_the_sample_of_the_corpus(tmp_path):
    rows = [{"text": f"{row} " * 400, "domain": "ab"[row % 2]} for row in range(40)]
    Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    files = {"train_file": tmp_path / "a.jsonl", "validation_file": tmp_path / "a.jsonl", "seed": 3}
    expected = load_corpus(**files, max_train_samples=10)["train"]
    settings = {"block_size": 16, "text_column": "text", "seed": 3}
    for column in (None, "domain"):
        found = few_documents(load_corpus(**files)["train"], 10, blocks=4, domain_column=column, **settings)
        assert found["text"][:] == expected["text"][:]


@pytest.mark.parametrize("words, taken", [(400, 10), (8, 63)])
def test_a_stream_begins_with_as_many_documents_as_fill_the_blocks(tmp_path, words, taken):
    """Four blocks of 64 tokens, at eight characters a token: 2,048 characters."""
    rows = [{"text": f"{row:04d}" * words + "."} for row in range(100)]
    Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    files = {"train_file": tmp_path / "a.jsonl", "validation_file": tmp_path / "a.jsonl"}
    stream = load_corpus(**files, streaming=True)
    found = first_documents(stream["train"], 10, blocks=4, block_size=64, text_column="text")
    assert list(found) == rows[:taken]


def test_a_stream_of_short_documents_is_tried_on_enough_of_them(tmp_path):
    rows = [{"text": f"word {row % 7} is short", "domain": "ab"[row % 2]} for row in range(3000)]
    Dataset.from_list(rows).to_json(tmp_path / "a.jsonl")
    files = {"train_file": tmp_path / "a.jsonl", "validation_file": tmp_path / "a.jsonl"}
    changes = {**SHORT, **files, "tokenizer_vocab_size": 300}
    run = Pretraining(GPT2, *parse_arguments([*flags(tmp_path / "run", **changes), "--streaming", "--smoke"]))
    run._load_data()
    assert len(list(run.training)) >= 64 and list(run.validation) == ["a", "b"]
