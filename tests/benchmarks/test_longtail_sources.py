# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the public sources: real loading code on data sets that lie here in the Hub's layout, rows in the
benchmark's form, every source with its licence and revision."""

import pytest
import yaml
from datasets import Dataset
from longtail_tiny import EXAMPLES


import sources  # isort: skip
from corpus import read_rows  # isort: skip


LISTED = yaml.safe_load((EXAMPLES / "sources.yaml").read_text())


def write_parquet(folder, name, splits):
    for split, rows in splits.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    return {"path": str(folder), "name": "default", "data_dir": name}


def write_list(tmp_path, text=None, tasks=None):
    path = tmp_path / "sources.yaml"
    path.write_text(yaml.safe_dump({"text": {"legal": text or {}}, "tasks": tasks or {}}))
    return ["--sources", str(path), "--output", str(tmp_path / "out")]


def test_text_is_streamed_cut_and_cleaned(tmp_path):
    long = [f"{number} " + "word " * 40 for number in range(9)]
    texts = [long[0], "   ", "short", long[0], *long[1:]]
    rows = [{"question": "Why?", "context": {"contexts": [text, "More."]}, "blank": None} for text in texts]
    load = {**write_parquet(tmp_path / "hub", "qa", {"train": rows}), "split": "train"}
    source = {"load": load, "text": ["question", "context.contexts", "blank"], "licence": "none", "confirmed": True}
    flags = write_list(tmp_path, {"opinions": source})
    sources.main([*flags, "--characters", "900"])
    found = [row["text"] for row in read_rows(tmp_path / "out" / "text" / "legal" / "opinions.jsonl.gz")]
    assert found == [f"Why?\n{text}\nMore." for text in long[:5]]  # each has some 212 characters
    source["text"] = ["answer"]
    with pytest.raises(ValueError, match="text='answer' is not allowed: the rows have the columns"):
        sources.main(write_list(tmp_path, {"opinions": source}))
    with pytest.raises(ValueError, match="only=\\['other'\\] is not allowed"):
        sources.main([*flags, "--only", "other"])


def test_tasks_have_the_benchmarks_rows_and_three_splits(tmp_path):
    pairs = [{"question": f"q{number}", "sentence": f"s{number}", "label": number % 2} for number in range(200)]
    choice = {"context": "It held (<HOLDING>).", "endings": list("abcde"), "label": 3}
    qnli, hold = dict(LISTED["tasks"]["qnli"]), dict(LISTED["tasks"]["casehold"])
    splits = {"train": pairs, "validation": pairs[:7], "test": pairs[:3]}
    qnli["load"] = write_parquet(tmp_path / "hub", "qnli", splits)
    hold["load"] = write_parquet(tmp_path / "hub2", "hold", dict.fromkeys(("train", "validation", "test"), [choice]))
    sources.main(write_list(tmp_path, tasks={"qnli": qnli, "casehold": hold}))
    read = {name: read_rows(tmp_path / "out" / "tasks" / "qnli" / f"{name}.jsonl.gz") for name in splits}
    assert len(read["test"]) == 7 and len(read["train"]) + len(read["validation"]) == 200
    assert 8 < len(read["validation"]) < 35
    assert not {row["text_a"] for row in read["train"]} & {row["text_a"] for row in read["validation"]}
    first = {"text": "q1 [SEP] s1", "text_a": "q1", "text_b": "s1", "label": "not_entailment"}
    assert read["test"][1] == first
    (row,) = read_rows(tmp_path / "out" / "tasks" / "casehold" / "test.jsonl.gz")
    assert row == {"text": choice["context"], "choices": list("abcde"), "label": 3}


def test_separated_values_are_read_as_they_stand(tmp_path):
    """EU-ADR's form: no header, tabs, quotes that are part of the text."""
    files = {}
    for split in ("train", "test"):
        files[split] = str(tmp_path / f"{split}.tsv")
        lines = [f'A "@GENE$ in {number}\t{number % 2}\n' for number in range(40)]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    task = {**LISTED["tasks"]["euadr"]}
    task["load"] = {**task["load"], "data_files": files}
    sources.main(write_list(tmp_path, tasks={"euadr": task}))
    rows = read_rows(tmp_path / "out" / "tasks" / "euadr" / "test.jsonl.gz")
    assert len(rows) == 40 and rows[3] == {"text": 'A "@GENE$ in 3', "label": 1}


def test_every_source_says_where_it_is_from_and_under_which_licence():
    assert set(LISTED["text"]) == {"general", "legal", "medical", "academic"}
    entries = [source for part in LISTED["text"].values() for source in part.values()] + list(LISTED["tasks"].values())
    for entry in entries:
        assert entry["url"].startswith("https://") and entry["licence"] and entry["text"]
        pinned = entry["load"].get("revision", str(entry["load"].get("data_files")))
        # what cannot be told to the commit is not called confirmed
        assert not entry["confirmed"] or (len(pinned) == 40 and int(pinned, 16))
