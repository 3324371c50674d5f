# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Draws the sample corpus of this folder from larger files of redistributable text.

    python examples/data/build_sample.py --source pretrain --out examples/data --seed 0

`--source` holds `general/state_union.zip` and `general/inaugural.zip` as NLTK ships them, and, with one JSON object a
line, `medical/medquad.jsonl.gz` ("text", "source") and `legal/nm_court_opinions.jsonl.gz` ("text", "doc"). The same
input and seed give the same bytes.
"""

import argparse
import gzip
import json
import random
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


MAX_WORDS = 600
MIN_WORDS = 60
VALIDATION_BYTES = 60_000
# A validation passage that shares so many words in a row with a training passage says what training has said.
LONG_RUN = 25
SHORT_RUN = 13

SPEECHES = {"general/state_union.zip": "message to Congress", "general/inaugural.zip": "inaugural address"}
# Two presidents, or two messages of one, can share a year, so that the whole name of the file tells speeches apart.
SPEECH_NAME = re.compile(r"(?P<year>\d{4})-(?P<president>\w+?)(?:-(?P<number>\d))?")
REACTION = re.compile(r"\s*[(\[][^)\]]*(?:applause|laughter)[^)\]]*[)\]]", re.IGNORECASE)
# Four messages end with the links of the page that they were copied from.
PAGE_LINKS = "State of the Union Archives"


@dataclass(frozen=True)
class Document:
    """A text that lies in one split as a whole; `name` is what stands in the column `source`."""

    key: str
    name: str
    text: str


@dataclass(frozen=True)
class Source:
    """Where a domain comes from, and how many passages of one document either split may take (None: all)."""

    domain: str
    read: Callable[[Path], Iterator[Document]]
    train_bytes: int
    train_passages: int | None = 1
    validation_passages: int = 1


def read_speeches(folder: Path) -> Iterator[Document]:
    for path, kind in SPEECHES.items():
        with zipfile.ZipFile(folder / path) as archive:
            for file in sorted(name for name in archive.namelist() if name.endswith(".txt")):
                name = SPEECH_NAME.fullmatch(PurePosixPath(file).stem)
                number = f" ({name['number']})" if name["number"] else ""
                title = f"{name['president']}, {kind}, {name['year']}{number}"
                yield Document(file, title, clean(_decode(archive.read(file))))


def _decode(data: bytes) -> str:
    # Most files are UTF-8. Those with typographic quotation marks are Big5, and one with fractions is Latin; neither
    # says so.
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("big5" if b"\xa1" in data else "cp1252")


def clean(text: str) -> str:
    """The paragraphs of a speech without headings, dates, the noises of the audience and the links of its page."""
    lines = (" ".join(line.split()) for line in unicodedata.normalize("NFC", text).splitlines())
    paragraphs = []
    for line in lines:
        if line == PAGE_LINKS:
            break
        paragraph = REACTION.sub("", line).strip()
        heading = len(paragraph.split()) < 6 and not paragraph.endswith((".", ",", ";", ":", "?", "!", '"'))
        if paragraph and not heading and not paragraph.isupper():
            paragraphs.append(paragraph)
    return "\n".join(paragraphs)


def read_medquad(folder: Path) -> Iterator[Document]:
    for row in _read(folder / "medical" / "medquad.jsonl.gz"):
        yield Document(row["text"], f"MedQuAD: {row['source']}", row["text"])


def read_opinions(folder: Path) -> Iterator[Document]:
    # A row is a part of an opinion.
    for row in _read(folder / "legal" / "nm_court_opinions.jsonl.gz"):
        yield Document(row["doc"], f"New Mexico appellate opinion {row['doc'].removesuffix('.json')}", row["text"])


SOURCES = (
    # Few speeches, but long ones: all that is said in them is needed to train, and some of each to validate.
    Source("general", read_speeches, 2_500_000, train_passages=None, validation_passages=6),
    Source("medical", read_medquad, 220_000),
    Source("legal", read_opinions, 220_000),
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
    """Training and validation rows of one domain: passages of documents in random order, until the bytes are reached.

    Validation takes its documents first, three times the bytes, since passages that training repeats are left out.
    """
    generator = random.Random(f"{seed}/{source.domain}")
    documents: dict[str, list[dict]] = {}
    for document in source.read(folder):
        passages = [passage for passage in cut(document.text) if MIN_WORDS <= len(passage.split()) <= MAX_WORDS]
        rows = [{"text": text, "domain": source.domain, "source": document.name} for text in passages]
        documents.setdefault(document.key, []).extend(rows)
    order = sorted(key for key, rows in documents.items() if rows)
    generator.shuffle(order)
    keys = iter(order)

    def drawn(limit: int | None) -> Iterator[list[dict]]:
        for key in keys:
            rows = documents[key]
            yield rows if limit is None else generator.sample(rows, min(limit, len(rows)))

    held = _take(drawn(source.validation_passages), 3 * VALIDATION_BYTES)
    train = _take(drawn(source.train_passages), source.train_bytes)
    generator.shuffle(held)
    known = set().union(*(runs(row["text"], LONG_RUN) for row in train))
    fresh = ([row] for row in held if known.isdisjoint(runs(row["text"], LONG_RUN)))
    return train, _take(fresh, VALIDATION_BYTES)


def runs(text: str, length: int) -> set[tuple[str, ...]]:
    """All runs of `length` words in `text`, whatever their case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def _read(path: Path) -> Iterator[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _take(groups: Iterable[list[dict]], limit: int) -> list[dict]:
    taken, size = [], 0
    for rows in groups:
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
            print(f"{split} {domain}: {len(texts)} passages, {size:,} bytes, {words:,} words")
    known = set().union(*(runs(row["text"], SHORT_RUN) for row in splits["train"]))
    for domain in sorted({row["domain"] for row in splits["validation"]}):
        found = [runs(row["text"], SHORT_RUN) for row in splits["validation"] if row["domain"] == domain]
        shared = sum(not known.isdisjoint(passage) for passage in found)
        print(f"validation {domain}: {shared} passages share a run of {SHORT_RUN} words with training")


if __name__ == "__main__":
    main()
