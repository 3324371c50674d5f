# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `pack` and `split_by_domain`."""

import logging
import random
from collections import defaultdict

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, default_data_collator

from modeling_cse.data import end_token_id, pack, split_by_domain, train_tokenizer


DOMAINS = ("general", "law", "medicine")


def make_rows(count=250, seed=0):
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        domain = generator.choices(DOMAINS, weights=(8, 1, 1))[0]
        words = [f"{domain}{generator.randrange(30)}" for _ in range(generator.randrange(1, 60))]
        rows.append({"text": " ".join(words), "domain": domain, "id": i})
    return rows


ROWS = make_rows()


@pytest.fixture(scope="module")
def tokenizers():
    texts = [row["text"] for row in ROWS]
    return {kind: train_tokenizer(texts, kind=kind, vocab_size=300) for kind in ("gpt2", "bert")}


def expected_tokens(tokenizer):
    """Every document's tokens by domain, encoded one by one."""
    tokens = defaultdict(list)
    for row in ROWS:
        ids = tokenizer(row["text"])["input_ids"]
        tokens[row["domain"]] += ids if tokenizer.mask_token else [*ids, tokenizer.eos_token_id]
    return tokens


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_no_token_is_lost_but_the_remainder_of_a_domain(tokenizers, kind, num_proc):
    packed = pack(Dataset.from_list(ROWS), tokenizers[kind], block_size=16, domain_column="domain", num_proc=num_proc)
    assert set(packed.column_names) == {"input_ids", "attention_mask", "domain"} | (
        {"labels"} if kind == "gpt2" else set()
    )
    found = defaultdict(list)
    for row in packed:
        assert len(row["input_ids"]) == 16 and row["attention_mask"] == [1] * 16
        found[row["domain"]] += row["input_ids"]
    expected = expected_tokens(tokenizers[kind])
    assert set(found) == set(DOMAINS)
    for domain, tokens in expected.items():
        assert found[domain] == tokens[: len(tokens) // 16 * 16]


def test_nothing_is_dropped_between_batches_of_documents(tokenizers):
    dataset = Dataset.from_dict({"text": ["a b"] * 2500})
    packed = pack(dataset, tokenizers["gpt2"], block_size=7)
    tokens = len(tokenizers["gpt2"]("a b")["input_ids"]) + 1
    assert len(packed) == 2500 * tokens // 7


def test_documents_end_with_end_of_text_and_labels_keep_it(tokenizers):
    tokenizer = tokenizers["gpt2"]
    packed = pack(Dataset.from_list(ROWS), tokenizer, block_size=16)
    assert sum(row["input_ids"].count(tokenizer.eos_token_id) for row in packed) in (len(ROWS), len(ROWS) - 1)
    batch = default_data_collator([packed[i] for i in range(4)])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_bert_documents_are_wrapped_and_the_collator_masks_them(tokenizers):
    tokenizer = tokenizers["bert"]
    packed = pack(Dataset.from_list(ROWS), tokenizer, block_size=16)
    tokens = [token for row in packed for token in row["input_ids"]]
    ends = [i for i, token in enumerate(tokens[:-1]) if token == tokenizer.sep_token_id]
    assert tokens[0] == tokenizer.cls_token_id
    assert len(ends) > 200 and all(tokens[i + 1] == tokenizer.cls_token_id for i in ends)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=0)([packed[i] for i in range(8)])
    special = (torch.tensor(packed[:8]["input_ids"]) == tokenizer.cls_token_id).nonzero(as_tuple=True)
    assert (batch["labels"] != -100).any() and (batch["labels"][special] == -100).all()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_the_end_token_is_told(tokenizers, kind):
    end, blocks = end_token_id(tokenizers[kind]), pack(Dataset.from_list(ROWS), tokenizers[kind], block_size=32)
    ends = sum(ids.count(end) for ids in blocks["input_ids"])
    assert len(ROWS) - 32 < ends <= len(ROWS)  # the last block is dropped


def test_blocks_never_mix_domains(tokenizers):
    tokenizer = tokenizers["gpt2"]
    for row in pack(Dataset.from_list(ROWS), tokenizer, block_size=64, domain_column="domain"):
        text = tokenizer.decode(row["input_ids"])
        assert not any(other in text for other in DOMAINS if other != row["domain"])


def test_without_domain_column_all_documents_share_blocks(tokenizers):
    packed = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16)
    tokens = []
    for row in ROWS:
        tokens += [*tokenizers["gpt2"](row["text"])["input_ids"], tokenizers["gpt2"].eos_token_id]
    assert [token for row in packed for token in row["input_ids"]] == tokens[: len(tokens) // 16 * 16]


@pytest.mark.parametrize("domain_column", [None, "domain"])
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_streaming_equals_not_streaming(tokenizers, kind, domain_column):
    dataset = Dataset.from_list(ROWS)
    arguments = {"block_size": 16, "domain_column": domain_column}
    expected = list(pack(dataset, tokenizers[kind], **arguments))
    for stream in (
        pack(dataset.to_iterable_dataset(num_shards=3), tokenizers[kind], **arguments),
        pack(dataset, tokenizers[kind], streaming=True, **arguments),
    ):
        assert list(stream) == expected
        assert list(stream) == expected, "a second epoch must not begin with the first one's remainder"


def test_streams_feed_a_data_loader(tokenizers):
    stream = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16, streaming=True)
    batches = list(DataLoader(stream, batch_size=4, collate_fn=default_data_collator))
    assert batches[0]["input_ids"].shape == (4, 16)


def write_and_load(folder):
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    return Dataset.from_parquet(str(folder / "rows.parquet"), cache_dir=str(folder / "cache"))


def test_cache_tells_tokenizers_and_block_sizes_apart(tmp_path, tokenizers):
    other = train_tokenizer([row["text"][::-1] for row in ROWS], kind="gpt2", vocab_size=300)
    assert other.get_vocab() != tokenizers["gpt2"].get_vocab()
    dataset = write_and_load(tmp_path)
    packed = {}
    for name, tokenizer, block_size in (("a", tokenizers["gpt2"], 16), ("b", other, 16), ("c", tokenizers["gpt2"], 8)):
        packed[name] = pack(dataset, tokenizer, block_size=block_size)
        fresh = pack(Dataset.from_list(ROWS), tokenizer, block_size=block_size)
        assert packed[name]["input_ids"][:] == fresh["input_ids"][:]
    again = pack(dataset, tokenizers["gpt2"], block_size=16)
    assert again.cache_files == packed["a"].cache_files and again["input_ids"][:] == packed["a"]["input_ids"][:]
    assert len({str(blocks.cache_files) for blocks in packed.values()}) == 3


def test_errors_are_raised_from_the_cache_too(tmp_path, tokenizers):
    dataset = write_and_load(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match="block_size=1000000 leaves no block"):
            pack(dataset, tokenizers["gpt2"], block_size=1_000_000)


def test_numbers_and_class_labels_name_domains(tokenizers):
    numbers = Dataset.from_list([row | {"domain": DOMAINS.index(row["domain"])} for row in ROWS])
    packed = pack(numbers, tokenizers["gpt2"], block_size=8, domain_column="domain")
    assert set(packed["domain"]) == {"0", "1", "2"}
    labels = numbers.cast_column("domain", ClassLabel(names=list(DOMAINS)))
    packed = pack(labels, tokenizers["gpt2"], block_size=8, domain_column="domain")
    assert set(packed["domain"]) == set(DOMAINS)
    assert list(pack(labels, tokenizers["gpt2"], block_size=8, domain_column="domain", streaming=True)) == list(packed)


def test_other_column_names(tokenizers):
    dataset = Dataset.from_list(ROWS).rename_columns({"text": "body", "domain": "field"})
    packed = pack(dataset, tokenizers["gpt2"], block_size=16, text_column="body", domain_column="field")
    expected = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16, domain_column="domain")
    assert list(packed) == list(expected)


def test_split_by_domain_is_sorted_and_complete(tokenizers):
    packed = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16, domain_column="domain")
    parts = split_by_domain(packed)
    assert list(parts) == sorted(DOMAINS)
    for domain, part in parts.items():
        assert "domain" not in part.column_names
        assert part["input_ids"][:] == [row["input_ids"] for row in packed if row["domain"] == domain]


def test_split_by_domain_without_domains(tokenizers):
    packed = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16)
    assert split_by_domain(packed) == {"all": packed}
    stream = pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=16, domain_column="domain", streaming=True)
    with pytest.raises(ValueError, match="dataset is an IterableDataset; only a Dataset can be split"):
        split_by_domain(stream)


def test_a_domain_named_as_the_union_stands_alone_or_is_refused(tokenizers):
    rows = [row | {"domain": "all" if row["domain"] == "law" else "b"} for row in ROWS]
    packed = pack(Dataset.from_list(rows), tokenizers["gpt2"], block_size=16, domain_column="domain")
    with pytest.raises(ValueError, match=r"domain 'all' is not allowed beside others \['b'\]"):
        split_by_domain(packed)
    alone = split_by_domain(packed.filter(lambda row: row["domain"] == "all"))
    assert list(alone) == ["all"] and len(alone["all"])


def test_no_warning_about_long_documents(tokenizers, caplog, monkeypatch):
    tokenizer, text = tokenizers["gpt2"], "word " * 200
    monkeypatch.setattr(tokenizer, "model_max_length", 16)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pack(Dataset.from_dict({"text": [text]}), tokenizer, block_size=16)
    assert "longer than" not in caplog.text
    tokenizer(text)
    assert "longer than" in caplog.text, "the warning is no longer where this test looks for it"


@pytest.mark.parametrize("block_size", [1, 0, -4, 2.5, True, None])
def test_wrong_block_size_is_named(tokenizers, block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size} must be a whole number of at least 2"):
        pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=block_size)


def test_block_size_above_the_model_is_named(tokenizers, monkeypatch):
    monkeypatch.setattr(tokenizers["gpt2"], "model_max_length", 32)
    pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=32)
    with pytest.raises(
        ValueError, match="block_size=33 is above the tokenizer's model_max_length=32. Lower block_size"
    ):
        pack(Dataset.from_list(ROWS), tokenizers["gpt2"], block_size=33)


@pytest.mark.parametrize(
    ("rows", "domain_column", "message"),
    [
        ([{"text": "a b", "domain": "x"}], None, r"block_size=16 leaves no block: the dataset has \d tokens"),
        ([{"text": " ", "domain": "x"}], None, "block_size=16 leaves no block: the dataset has 0 tokens"),
        (
            [*ROWS, {"text": "a", "domain": "tiny"}],
            "domain",
            r"block_size=16 leaves no block: domain 'tiny' has \d tokens",
        ),
        ([*ROWS, {"text": "", "domain": "blank"}], "domain", "domain 'blank' has 0 tokens"),
    ],
)
def test_too_little_text_is_named(tokenizers, rows, domain_column, message):
    with pytest.raises(ValueError, match=message):
        pack(Dataset.from_list(rows), tokenizers["gpt2"], block_size=16, domain_column=domain_column)


def test_stream_without_any_block_is_named(tokenizers):
    stream = pack(Dataset.from_dict({"text": ["a"]}), tokenizers["gpt2"], block_size=16, streaming=True)
    with pytest.raises(ValueError, match="block_size=16 leaves no block: the dataset has 2 tokens"):
        list(stream)


def test_wrong_dataset_is_named(tokenizers):
    dataset, tokenizer = Dataset.from_list(ROWS), tokenizers["gpt2"]
    for data in (dataset, dataset.to_iterable_dataset()):
        with pytest.raises(ValueError, match=r"text_column='body' is not a column of the dataset; it has \['text'"):
            pack(data, tokenizer, block_size=16, text_column="body")
        with pytest.raises(ValueError, match="domain_column='field' is not a column"):
            pack(data, tokenizer, block_size=16, domain_column="field")
    with pytest.raises(ValueError, match="dataset is a DatasetDict; it must be one split"):
        pack(DatasetDict(train=dataset), tokenizer, block_size=16)
    for name in (None, "", " "):
        missing = Dataset.from_list([*ROWS, {"text": "a", "domain": name}])
        with pytest.raises(ValueError, match="domain_column='domain' has rows without a value"):
            pack(missing, tokenizer, block_size=16, domain_column="domain")
    lists = Dataset.from_list([row | {"domain": [row["domain"]]} for row in ROWS])
    with pytest.raises(ValueError, match=r"domain_column='domain' must hold strings, .*; found list \['"):
        pack(lists, tokenizer, block_size=16, domain_column="domain")


def test_tokenizer_without_end_of_text_is_named(tokenizers, monkeypatch):
    tokenizer = train_tokenizer([row["text"] for row in ROWS], kind="gpt2", vocab_size=260)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer=GPT2Tokenizer must have an eos_token"):
        pack(Dataset.from_list(ROWS), tokenizer, block_size=16)
