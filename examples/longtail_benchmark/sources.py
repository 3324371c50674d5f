# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Text and tasks from public sources, in the form that corpus.py and the probes read; sources.yaml names them.

    python examples/longtail_benchmark/sources.py --output data --characters 40000000

writes `data/text/<domain>/<source>.jsonl.gz` and `data/tasks/<task>/{train,validation,test}.jsonl.gz`.
"""

import argparse
import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from corpus import hash_of
from datasets import load_dataset


SHORTEST_TEXT = 150
# Of the rows of a task without validation rows, or without a split at all.
HELD_OUT = 10


def field_of(row: dict[str, Any], path: str) -> str:
    """
    A column as text; a dot leads into a struct, and a list is joined by line ends.

    Raises:
        ValueError: the row has no such column.
    """
    value: Any = row
    for name in path.split("."):
        if not isinstance(value, dict) or name not in value:
            raise ValueError(f"text={path!r} is not allowed: the rows have the columns {sorted(row)}.")
        value = value[name]
    return "\n".join(value) if isinstance(value, list) else (value or "")


def documents(rows: Iterable[dict[str, Any]], columns: list[str], characters: int) -> Iterator[str]:
    """The texts of rows up to so many characters, without those that are short, blank or there already."""
    seen, left = set(), characters
    for row in rows:
        if left <= 0:
            return
        text = "\n".join(filter(None, (field_of(row, column).strip() for column in columns)))
        if len(text) < SHORTEST_TEXT or hash_of(text) in seen:
            continue
        seen.add(hash_of(text))
        left -= len(text)
        yield text


def task_row(row: dict[str, Any], task: dict[str, Any]) -> dict[str, Any]:
    """A row in the form of the tasks: "text", "label", for pairs also "text_a" and "text_b", and "choices"."""
    parts = [field_of(row, column) for column in task["text"]]
    label = row[task.get("label", "label")]
    label = label[0] if isinstance(label, list) else label
    made = {"text": " [SEP] ".join(parts)}
    if len(parts) == 2:
        made |= {"text_a": parts[0], "text_b": parts[1]}
    if "choices" in task:
        made["choices"] = list(row[task["choices"]])
    return made | {"label": task["labels"][label] if "labels" in task else label}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes a .jsonl.gz file, whole or not at all; returns the number of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, count = path.with_suffix(".partial"), 0
    with gzip.open(partial, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    os.replace(partial, path)
    return count


def write_text(name: str, source: dict[str, Any], path: Path, characters: int) -> int:
    """
    Writes a source of text; a stream is read no further than it is needed.

    Raises:
        ValueError: it has other columns, or no text.
    """
    stream = load_dataset(**source["load"], streaming=True)
    count = write_rows(path, ({"text": text} for text in documents(stream, source["text"], characters)))
    if not count:
        raise ValueError(f"source={name!r} is not allowed: it holds no text of {SHORTEST_TEXT} characters.")
    return count


def write_task(task: dict[str, Any], folder: Path) -> dict[str, int]:
    """Writes a task; splits that it lacks are cut off its training rows by the hash of their text."""
    splits, parts = load_dataset(**task["load"]), {}
    for split, theirs in task["splits"].items():
        parts[split] = [task_row(row, task) for row in splits[theirs]]
    for place, split in enumerate(("validation", "test")):
        if split not in parts:
            cut = [hash_of(row["text"]) % HELD_OUT == place for row in parts["train"]]
            parts[split] = [row for row, out in zip(parts["train"], cut, strict=True) if out]
            parts["train"] = [row for row, out in zip(parts["train"], cut, strict=True) if not out]
    return {split: write_rows(folder / f"{split}.jsonl.gz", rows) for split, rows in parts.items()}


def main(arguments: list[str] | None = None) -> None:
    """Writes all sources and tasks, or those that are named, and says what was not confirmed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=Path(__file__).parent / "sources.yaml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=40_000_000, help="of each source of text, at most")
    parser.add_argument("--only", nargs="*", help="names of sources and tasks")
    options = parser.parse_args(arguments)
    listed = yaml.safe_load(options.sources.read_text(encoding="utf-8"))
    texts = {(domain, name): source for domain, part in listed["text"].items() for name, source in part.items()}
    names = {name for _, name in texts} | set(listed["tasks"])
    if unknown := set(options.only or ()) - names:
        raise ValueError(f"only={sorted(unknown)} is not allowed: it must be among {sorted(names)}.")
    wanted = set(options.only or names)
    for (domain, name), source in texts.items():
        if name in wanted:
            path = options.output / "text" / domain / f"{name}.jsonl.gz"
            count = write_text(name, source, path, options.characters)
            print(name, count, source["licence"], "" if source["confirmed"] else "(not confirmed)", flush=True)
    for name, task in listed["tasks"].items():
        if name in wanted:
            counts = write_task(task, options.output / "tasks" / name)
            print(name, counts, task["licence"], "" if task["confirmed"] else "(not confirmed)", flush=True)


if __name__ == "__main__":
    main()
