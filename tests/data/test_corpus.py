# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of `load_corpus`, and of the sample corpus that comes with the repository."""

import gzip
import json
import os
import re
import runpy
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset, IterableDatasetDict

from modeling_cse.data import load_corpus


SAMPLE = Path(__file__).parents[2] / "examples" / "data"
ROWS = [{"text": f"{domain} text number {i}", "domain": domain} for i in range(40) for domain in ("law", "news")]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def load(tmp_path):
    def load(**arguments):
        return load_corpus(cache_dir=tmp_path / "cache", **arguments)

    return load


def as_texts(corpus):
    return {split: [row["text"] for row in corpus[split]] for split in ("train", "validation")}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a.txt", "a.json", "a.jsonl", "a.csv", "a.parquet", "a.txt.gz", "a.jsonl.gz", "a.csv.gz"]
)
def test_every_format_gives_the_same_texts(tmp_path, load, name, streaming):
    texts = ["one", "two, with a comma", "drei ü"]
    path = tmp_path / name.removesuffix(".gz")
    dataset = Dataset.from_dict({"text": texts})
    if path.suffix == ".txt":
        path.write_text("\n".join(texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        write_jsonl(path, [{"text": text} for text in texts])
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    corpus = load(train_file=tmp_path / name, validation_file=str(tmp_path / name), streaming=streaming)
    assert isinstance(corpus, IterableDatasetDict) == streaming
    assert as_texts(corpus) == {"train": texts, "validation": texts}


def test_a_list_of_files_is_read_in_order(tmp_path, load):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"text {i}"}]) for i in range(3)]
    corpus = load(train_file=paths, validation_file=paths[0])
    assert as_texts(corpus)["train"] == ["text 0", "text 1", "text 2"]


def test_a_named_dataset_goes_the_same_way(tmp_path, load):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    write_jsonl(tmp_path / "validation.jsonl", ROWS[:5])
    corpus = load(dataset_name=str(tmp_path), domain_column="domain")
    assert as_texts(corpus) == {
        "train": [row["text"] for row in ROWS],
        "validation": [row["text"] for row in ROWS[:5]],
    }


def test_split_holds_the_percentage_of_every_domain(tmp_path, load):
    rows = ROWS + [{"text": "one rare", "domain": "rare"}, {"text": "another rare", "domain": "rare"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    corpus = load(train_file=path, domain_column="domain", validation_split_percentage=10)
    assert Counter(corpus["validation"]["domain"]) == {"law": 4, "news": 4, "rare": 1}
    texts = as_texts(corpus)
    assert sorted(texts["train"] + texts["validation"]) == sorted(row["text"] for row in rows)


def test_split_and_sample_follow_the_seed(tmp_path, load):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    sizes = {"max_train_samples": 20, "max_eval_samples": 2, "validation_split_percentage": 10}
    first, again, other = (as_texts(load(train_file=path, seed=seed, **sizes)) for seed in (0, 0, 1))
    assert first == again != other
    assert (len(first["train"]), len(first["validation"])) == (20, 2)


def test_streaming_split_is_disjoint_complete_and_repeatable(tmp_path, load):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    corpus = load(train_file=path, streaming=True, validation_split_percentage=20)
    texts = as_texts(corpus)
    assert sorted(texts["train"] + texts["validation"]) == sorted(row["text"] for row in ROWS)
    assert 4 <= len(texts["validation"]) <= 28
    assert texts == as_texts(corpus)
    limited = load(
        train_file=path, streaming=True, validation_split_percentage=20, max_train_samples=3, max_eval_samples=2
    )
    assert {split: len(texts) for split, texts in as_texts(limited).items()} == {"train": 3, "validation": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_blank_rows_are_left_out(tmp_path, load, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("", "a", " \n", None, "b")])
    assert as_texts(load(train_file=path, validation_file=path, streaming=streaming))["train"] == ["a", "b"]


def test_changed_file_of_the_same_age_is_read_again(tmp_path, load):
    path = tmp_path / "a.jsonl"
    for text in ("old", "new"):
        write_jsonl(path, [{"text": text}])
        os.utime(path, (1, 1))
        assert as_texts(load(train_file=path, validation_file=path))["train"] == [text]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "name", "arguments", "message"),
    [
        # datasets 4.0 streams an empty file without complaint
        ("", "a.jsonl", {}, r"train_file=.*a\.jsonl'\] holds no rows readable as json|split is empty"),
        ("", "a.csv", {}, "train_file=.*holds no rows"),
        ("", "a.txt", {}, "(train_file=.*holds no rows|split is empty)"),
        ("text\n", "a.csv", {}, "(train_file=.*holds no rows|split is empty)"),
        ("{oops", "a.jsonl", {}, "train_file=.*holds no rows readable as json"),
        ('{"text": " "}\n{"text": ""}\n', "a.jsonl", {}, "train.* is empty: text_column='text' holds only blank"),
        ('{"body": "b", "x": "y"}', "a.jsonl", {}, r"text_column='text' is not a column.*\['body', 'x'\]"),
        ('{"text": "b"}', "a.jsonl", {"domain_column": "d"}, r"domain_column='d' is not a column.*\['text'\]"),
        ('{"text": 3}', "a.jsonl", {}, "text_column='text' must hold strings; found int 3"),
    ],
)
def test_unusable_content_is_named(tmp_path, load, content, name, arguments, message, streaming):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load(train_file=path, streaming=streaming, **arguments)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.jsonl.gz", "a.txt.gz"])
def test_text_that_is_no_utf8_is_named_with_its_place(tmp_path, load, name, streaming):
    lines = ["text", *["some words"] * 9, "café"]
    if ".jsonl" in name:
        lines = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
    content = "\n".join(lines).encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    message = rf"train_file: .*{name}' is no UTF-8 text: .* in position {content.index(bytes([0xE9]))}\.$"
    with pytest.raises(ValueError, match=message) as told:
        load(train_file=tmp_path / name, streaming=streaming)
    assert "some words" not in str(told.value), "it does not tell the text"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "dataset_name=None and train_file=None"),
        ({"validation_file": "v.txt"}, "validation_file='v.txt' alone is not enough"),
        ({"dataset_name": "name", "train_file": "a.txt"}, "cannot be combined with train_file='a.txt'"),
        ({"train_file": "absent.txt"}, "train_file='absent.txt' is not an existing file"),
        ({"train_file": "my_texst"}, "train_file='my_texst' is not an existing file or folder"),
        ({"train_file": [str(SAMPLE), "my_texst"]}, "train_file='my_texst' is not an existing file or folder"),
        ({"train_file": []}, r"train_file=\[\] names no file"),
        ({"train_file": "a.txt", "validation_split_percentage": 0}, "validation_split_percentage=0 must lie between"),
        ({"train_file": "a.txt", "max_train_samples": 0}, "max_train_samples=0 must be at least 1"),
        ({"train_file": "a.txt", "max_eval_samples": -1}, "max_eval_samples=-1 must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**arguments)


@pytest.mark.parametrize("name", ["a.docx", "a.parquet.gz", "a"])
def test_an_unknown_format_is_named(tmp_path, load, name):
    path = write_jsonl(tmp_path / name, ROWS)
    with pytest.raises(ValueError, match=rf"{name}' has the extension '{name[1:]}'; allowed are \['.txt'"):
        load(train_file=path)


def test_formats_cannot_be_mixed(tmp_path, load):
    paths = [write_jsonl(tmp_path / name, ROWS) for name in ("a.jsonl", "b.txt")]
    with pytest.raises(ValueError, match=r"mixes the formats \['json', 'text'\]"):
        load(train_file=paths)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5, "domain": "law"}, "text_column='text' must hold strings; found int 5"),
        ({"text": "a", "domain": ["law"]}, r"domain_column='domain' must hold strings, .*; found list \['law'\]"),
    ],
)
def test_unusable_rows_are_named_wherever_they_stand(tmp_path, load, row, message, streaming):
    for rows in ([row], [*ROWS, *ROWS, row]):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        with pytest.raises(ValueError, match=message):
            as_texts(load(train_file=path, validation_file=path, domain_column="domain", streaming=streaming))


def test_dataset_without_train_split_is_named(tmp_path, load):
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    with pytest.raises(ValueError, match=r'has no "train" split; it has \[\'test\'\]'):
        load(dataset_name=str(tmp_path))


@pytest.mark.parametrize("streaming", [False, True])
def test_one_document_cannot_be_split(tmp_path, load, streaming):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match="validation_split_percentage=5"):
        load(train_file=path, streaming=streaming)


def read_sample(split):
    with gzip.open(SAMPLE / f"{split}.jsonl.gz", "rt", encoding="utf-8") as handle:
        return [json.loads(line) for line in handle]


def test_sample_has_the_shares_of_its_card():
    sizes = {split: Counter() for split in ("train", "validation")}
    for split, counts in sizes.items():
        for row in read_sample(split):
            assert set(row) == {"text", "domain", "source"}
            assert 1 <= len(row["text"].split()) <= 600
            counts[row["domain"]] += len(row["text"].encode())
    total = sizes["train"].total()
    assert 2_900_000 < total < 3_100_000
    assert sizes["train"]["general"] / total == pytest.approx(0.85, abs=0.01)
    for domain in ("medical", "legal"):
        assert 0.06 < sizes["train"][domain] / total < 0.10
    assert all(50_000 < sizes["validation"][domain] < 70_000 for domain in ("general", "legal", "medical"))
    written = sum(len(gzip.decompress(path.read_bytes())) for path in SAMPLE.glob("*.gz"))
    assert 2_500_000 < written < 3_500_000


def test_sample_splits_share_no_document():
    train, validation = read_sample("train"), read_sample("validation")
    texts = [row["text"] for row in train + validation]
    assert len(set(texts)) == len(texts)
    # MedQuAD rows name the collection, the others the very document.
    named = [{row["source"] for row in rows if row["domain"] != "medical"} for rows in (train, validation)]
    assert not named[0] & named[1]
    known = set().union(*(runs_of_words(row["text"], 25) for row in train))
    assert all(known.isdisjoint(runs_of_words(row["text"], 25)) for row in validation)


def runs_of_words(text, length):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_sample_loads(load):
    corpus = load(
        train_file=SAMPLE / "train.jsonl.gz", validation_file=SAMPLE / "validation.jsonl.gz", domain_column="domain"
    )
    assert {split: set(corpus[split]["domain"]) for split in corpus} == {
        split: {"general", "legal", "medical"} for split in ("train", "validation")
    }


def test_sample_builder_repeats_itself(tmp_path, monkeypatch):
    def text(i, lines):
        return "\n".join(f"Line {line} of the text {i} ends here. [Laughter]" for line in range(lines))

    def write_zip(name, files):
        (tmp_path / "general").mkdir(exist_ok=True)
        with zipfile.ZipFile(tmp_path / "general" / f"{name}.zip", "w") as archive:
            for file in files:
                archive.writestr(f"{name}/{file}.txt", text(file, 1500))

    write_zip("state_union", [f"{1900 + i}-Speaker-1" for i in range(25)])
    write_zip("inaugural", [f"{1900 + i}-VanSpeaker" for i in range(25)])
    rows = {
        "medical/medquad": lambda i: {"text": text(i, 300), "source": "GARD"},
        "legal/nm_court_opinions": lambda i: {"text": text(i, 300), "doc": f"{i}.json"},
    }
    for path, row in rows.items():
        (tmp_path / path).parent.mkdir()
        lines = "".join(json.dumps(row(i)) + "\n" for i in range(200))
        (tmp_path / f"{path}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), compresslevel=1))
    written = []
    for out, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        arguments = ["--source", str(tmp_path), "--seed", seed, "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["build_sample.py", *arguments])
        runpy.run_path(str(SAMPLE / "build_sample.py"), run_name="__main__")
        written.append([(tmp_path / out / f"{split}.jsonl.gz").read_bytes() for split in ("train", "validation")])
    assert written[0] == written[1] != written[2]
