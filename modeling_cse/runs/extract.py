# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The extract of a corpus that a comparison works on: cut once, the same for every seed and for both models."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data import load_corpus, train_tokenizer
from ..data.folders import expand
from ..data.packing import check_domains, is_missing
from ..training.memory import replace_whole


# Of a corpus that is larger than the run can read, so many characters a token are kept: more than any text has.
CHARACTERS_PER_TOKEN = 8
HELD_OUT_PERCENTAGE = 10
# Blocks: fewer than the first three show nothing. Held out is enough text for the last, however long its tokens are:
# ordinary text, with about four characters a token, makes twice as many.
LEAST_TRAINING, LEAST_HELD_OUT, LEAST_OF_DOMAIN, MOST_HELD_OUT = 128, 16, 4, 512
OTHER = "other (small domains)"


@dataclass
class Extract:
    """
    Where the text lies, and what is in it.

    Fields:
        folder: holds `train.jsonl` and `validation.jsonl` with the columns `text` and, with domains, `domain`; the
            tokenizer in `tokenizer`; and this in `extract.json`, written last.
        blocks: whole blocks by split, "train" and "validation", over all domains.
        domains: blocks by split and domain; None without domains.
        merged: domains too small for results of their own, which are one domain, `OTHER`.
        left_out: domains of which not one block can be trained on or held out.
    """

    folder: str
    blocks: dict[str, int]
    domains: dict[str, dict[str, int]] | None
    merged: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def make_extract(
    folder: Path,
    *,
    train: list[str],
    validation: list[str] | None,
    text_column: str,
    domain_column: str | None,
    tokens: int,
    block_size: int,
    vocab_size: int,
) -> Extract:
    """
    Cuts the extract, or reads the one that is there.

    Held out without `validation`: a tenth of the documents of each domain. Nothing depends on the seeds of training.

    Args:
        tokens: that a run reads of each text at least once; of a larger corpus a random part is kept.
        block_size, vocab_size: of the model.

    Raises:
        ValueError: see `load_corpus`; a row without domain; a domain `all` beside others; or too little text.
    """
    done = folder / "extract.json"
    if done.is_file():
        return Extract(**{**json.loads(done.read_text(encoding="utf-8")), "folder": str(folder)})
    corpus = load_corpus(
        train_file=train,
        validation_file=validation,
        validation_split_percentage=HELD_OUT_PERCENTAGE,
        text_column=text_column,
        domain_column=domain_column,
    )
    splits = {
        "train": _documents(_part(corpus["train"], text_column, tokens), text_column, domain_column),
        "validation": _documents(
            _part(corpus["validation"], text_column, MOST_HELD_OUT * block_size), text_column, domain_column
        ),
    }
    check_domains({domain for rows in splits.values() for _, domain in rows})
    tokenizer = train_tokenizer((text for text, _ in splits["train"]), kind="gpt2", vocab_size=vocab_size)
    counts = {name: _tokens_by_domain(rows, tokenizer) for name, rows in splits.items()}
    small = sorted(
        domain
        for domain in counts["train"] | counts["validation"]
        if min(count[domain] for count in counts.values()) < LEAST_OF_DOMAIN * block_size
    )
    if len(small) < 2:  # there is nothing to merge
        small = []
    splits = {
        name: [(text, OTHER if domain in small else domain) for text, domain in rows] for name, rows in splits.items()
    }
    counts = {name: _merged(count, small) for name, count in counts.items()}
    # a domain may be in one split alone
    found = counts["train"] | counts["validation"]
    lost = [domain for domain in found if min(count[domain] for count in counts.values()) < block_size]
    splits = {name: [row for row in rows if row[1] not in lost] for name, rows in splits.items()}
    blocks = {
        name: {domain: count // block_size for domain, count in sorted(by_domain.items()) if domain not in lost}
        for name, by_domain in counts.items()
    }
    extract = Extract(
        str(folder),
        {name: sum(by_domain.values()) for name, by_domain in blocks.items()},
        None if domain_column is None else blocks,
        small,
        lost if domain_column is not None else [],
    )
    _check_enough(extract, block_size)
    for name, rows in splits.items():
        _write(folder / f"{name}.jsonl", rows, domain_column is not None)
    tokenizer.save_pretrained(folder / "tokenizer")
    replace_whole(done, lambda path: path.write_text(json.dumps(asdict(extract), indent=2) + "\n", encoding="utf-8"))
    return extract


def digest(paths: Iterable[str], names: bool = False) -> str:
    """A number for the content of files or folders, by which a changed corpus is told from a run's own.

    Args:
        names: whether the paths count too. In a folder they say the domain.

    Raises:
        ValueError: a file that there is not.
    """
    total = hashlib.blake2b(digest_size=8)
    for path in expand(paths):
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not allowed: it must be an existing file, or a folder of text files.")
        if names:
            total.update(f"{path.as_posix()}\0".encode("utf-8", "surrogateescape"))
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "blake2b").digest())
    return total.hexdigest()


def _part(documents: Dataset, text_column: str, tokens: int) -> Dataset:
    """A seeded random part of the documents that is large enough for so many tokens, in their order."""
    order = np.random.default_rng(0).permutation(len(documents))
    wanted, kept = CHARACTERS_PER_TOKEN * tokens, []
    for row in order:
        if wanted <= 0:
            break
        kept.append(row)
        wanted -= len(documents[int(row)][text_column])
    return documents.select(np.sort(kept))


def _documents(documents: Dataset, text_column: str, domain_column: str | None) -> list[tuple[str, str]]:
    domains = documents[domain_column][:] if domain_column else [""] * len(documents)
    if domain_column is not None and any(map(is_missing, domains)):
        raise ValueError(f"domain_column={domain_column!r} has rows without a value; every row needs one.")
    return list(zip(documents[text_column][:], map(str, domains), strict=True))


def _tokens_by_domain(rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Counter:
    counts: Counter[str] = Counter()
    for text, domain in rows:
        counts[domain] += len(tokenizer(text, verbose=False)["input_ids"]) + 1  # and the end-of-text token
    return counts


def _merged(counts: Counter, small: list[str]) -> Counter:
    result: Counter[str] = Counter()
    for domain, count in counts.items():
        result[OTHER if domain in small else domain] += count
    return result


def _check_enough(extract: Extract, block_size: int) -> None:
    for split, name, least in (("train", "train", LEAST_TRAINING), ("validation", "validation", LEAST_HELD_OUT)):
        found = extract.blocks[split]
        if found < least:
            raise ValueError(
                f"{name}: the text is too short for a comparison: {found} sequences of {block_size} tokens to "
                f"{'train on' if split == 'train' else 'hold out'}, where at least {least} are needed (about "
                f"{least * block_size * 4 // 1000 + 1} kB; without --validation a tenth of the documents of each "
                "domain is held out). Add text."
            )


def _write(path: Path, rows: list[tuple[str, str]], with_domain: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {"text": [text for text, _ in rows]}
    if with_domain:
        columns["domain"] = [domain for _, domain in rows]
    Dataset.from_dict(columns).to_json(path, force_ascii=False)
