# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Draws the sample corpus of this folder from larger files of redistributable text.

    python examples/data/build_sample.py --source pretrain --out examples/data --seed 0

`--source` holds `general/wikipedia_2015.jsonl.gz`, `medical/medquad.jsonl.gz` and `legal/nm_court_opinions.jsonl.gz`,
one JSON object a line with "text" and the fields that `Source` names. The same input and seed give the same bytes.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


MAX_WORDS = 600
MIN_WORDS = 60
VALIDATION_BYTES = 60_000


@dataclass(frozen=True)
class Source:
    """Where a domain comes from: `document` tells documents apart, `name` is what stands in the column `source`."""

    domain: str
    path: str
    train_bytes: int
    document: Callable[[dict], str]
    name: Callable[[dict], str]


SOURCES = (
    Source(
        "general",
        "general/wikipedia_2015.jsonl.gz",
        2_580_000,
        document=lambda row: row["id"],
        name=lambda row: f"Wikipedia: {row['title']} (page id {row['id']})",
    ),
    Source(
        "medical",
        "medical/medquad.jsonl.gz",
        210_000,
        document=lambda row: row["text"],
        name=lambda row: f"MedQuAD: {row['source']}",
    ),
    Source(
        "legal",
        "legal/nm_court_opinions.jsonl.gz",
        210_000,
        document=lambda row: row["doc"],
        name=lambda row: f"New Mexico appellate opinion {row['doc'].removesuffix('.json')}",
    ),
)


def cut(text: str) -> list[str]:
    """`text` in passages of at most `MAX_WORDS` words, cut between paragraphs, or between sentences within one."""
    passages, words = [""], 0
    for unit in _units(text):
        length = len(unit.split())
        if passages[-1] and words + length > MAX_WORDS:
            passages.append("")
            words = 0
        passages[-1] += unit
        words += length
    return [passage.strip() for passage in passages]


def _units(text: str) -> Iterator[str]:
    for paragraph in text.splitlines(keepends=True):
        if len(paragraph.split()) <= MAX_WORDS:
            yield paragraph
        else:
            # Four small letters, since "v." and "Inc." end no sentence.
            yield from re.split(r"(?<=[a-z]{4}[.!?] )(?=[A-Z])", paragraph)


def draw(source: Source, folder: Path, seed: int) -> tuple[list[dict], list[dict]]:
    """Training and validation rows of one domain: one passage of each document, until the bytes are reached."""
    generator = random.Random(f"{seed}/{source.domain}")
    documents: dict[str, list[dict]] = {}
    for row in _read(folder / source.path):
        passages = [passage for passage in cut(row["text"]) if MIN_WORDS <= len(passage.split()) <= MAX_WORDS]
        rows = [{"text": text, "domain": source.domain, "source": source.name(row)} for text in passages]
        documents.setdefault(source.document(row), []).extend(rows)
    order = sorted(key for key, rows in documents.items() if rows)
    generator.shuffle(order)
    drawn = (generator.choice(documents[key]) for key in order)
    validation = _take(drawn, VALIDATION_BYTES)
    return _take(drawn, source.train_bytes), validation


def _read(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _take(rows: Iterable[dict], limit: int) -> list[dict]:
    taken, size = [], 0
    for row in rows:
        taken.append(row)
        size += len(row["text"].encode())
        if size >= limit:
            return taken
    raise ValueError(f"--source has too little text: {size:,} bytes where {limit:,} are needed.")


def write(rows: list[dict], path: Path) -> None:
    """Writes JSON lines, without the time and the file name that gzip would put into its header."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as handle:
        handle.write(lines.encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with one subfolder for each domain")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl.gz and validation.jsonl.gz")
    parser.add_argument("--seed", type=int, default=0, help="which documents are drawn, and their order")
    arguments = parser.parse_args()

    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for source in SOURCES:
        train, validation = draw(source, arguments.source, arguments.seed)
        splits["train"] += train
        splits["validation"] += validation
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        # Mixed, so that the first rows of a file show every domain.
        random.Random(f"{arguments.seed}/{split}").shuffle(rows)
        write(rows, arguments.out / f"{split}.jsonl.gz")
        for domain in sorted({row["domain"] for row in rows}):
            texts = [row["text"] for row in rows if row["domain"] == domain]
            size, words = sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts)
            print(f"{split} {domain}: {len(texts)} documents, {size:,} bytes, {words:,} words")


if __name__ == "__main__":
    main()
