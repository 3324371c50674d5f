# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The corpus of the benchmark: documents of named domains in exact shares, in blocks, with held-out documents.

    python examples/longtail_benchmark/corpus.py --text DIR --tasks DIR --output runs/longtail/corpus

`DIR` of `--text` holds `<domain>/<source>.jsonl.gz`, that of `--tasks` `<task>/test.jsonl.gz` (see README.md).
"""

import argparse
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from modeling_cse.data import train_tokenizer


GENERAL = "general"
SPLITS = ("test", "validation", "train")
# Brown et al. (arXiv 2005.14165, appendix C) look for runs of 13 words.
OVERLAP_WORDS = 13
# A shorter test row is too common a phrase to be looked for.
SHORTEST_ROW = 8
# Tasks that are tested on all of their rows, in ten folds.
TEN_FOLDS = ("euadr",)
# A token has about four characters.
CHARACTERS = 4
FEATURES = Features({"input_ids": List(Value("uint16")), "domain": Value("string")})


@dataclass(frozen=True)
class Mixture:
    """
    What a corpus is made of.

    Fields:
        domains: name to the sources it is drawn from, paths below the text folder without their ending.
        shares: name to the share of the training tokens; their sum is 1.
        tokens: training tokens.
        held_out: tokens of each domain for validation, and as many for the test.
        block_size: tokens of a block.
        document_size: a longer document is cut after so many tokens, so that no article fills a domain.
        vocab_size: of the tokenizer, trained on the training documents.
        family: "gpt2" or "bert", whose kind of tokenizer is trained.
        packed_together: blocks are cut from documents of all domains in random order, as real pipelines do, and not
            from one domain each. Held-out blocks always have one domain.
        seed: of the choice and order of documents.
    """

    domains: dict[str, list[str]]
    shares: dict[str, float]
    tokens: int = 4_194_304
    held_out: int = 65_536
    block_size: int = 256
    document_size: int = 1024
    vocab_size: int = 4096
    family: str = "gpt2"
    packed_together: bool = False
    seed: int = 0

    def __post_init__(self):
        if set(self.domains) != set(self.shares) or GENERAL not in self.domains:
            raise ValueError(
                f"shares={self.shares!r} is not allowed: it must name the domains {sorted(self.domains)}, "
                f"{GENERAL!r} among them."
            )
        if abs(sum(self.shares.values()) - 1) > 1e-9 or min(self.shares.values()) <= 0:
            raise ValueError(f"shares={self.shares!r} is not allowed: shares must be above 0 with the sum 1.")
        if self.vocab_size > 2**16:
            raise ValueError(f"vocab_size={self.vocab_size} is not allowed: blocks are stored in 16 bits.")

    @property
    def rare(self) -> list[str]:
        """The long-tail domains, sorted."""
        return sorted(set(self.domains) - {GENERAL})


def normalised_words(text: str) -> list[str]:
    """Lower-case words and numbers, without punctuation."""
    return re.findall(r"[a-z0-9]+", text.lower())


def hash_of(text: str) -> int:
    """A number of 64 bits that is the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _split_of(text: str) -> str:
    """The split of a document: a twentieth each for the test and for validation, by hash."""
    return {0: "test", 1: "validation"}.get(hash_of(text) % 20, "train")


def _runs(words: list[str], length: int) -> Iterator[bytes]:
    for start in range(len(words) - length + 1):
        run = " ".join(words[start : start + length])
        yield hashlib.blake2b(run.encode(), digest_size=8).digest()


class HeldOutOverlap:
    """
    Finds documents that share a run of 13 words with a test row of a task. Rows shorter than that are looked for
    whole, from 8 words on.

    Args:
        tasks: name to the texts of its test rows.
    """

    def __init__(self, tasks: dict[str, Iterable[str]]):
        self.runs: dict[bytes, str] = {}
        self.short: dict[int, dict[bytes, str]] = {}
        self.numbers: dict[str, int] = {}
        self.factors = np.random.default_rng(0).integers(1, 2**63, SHORTEST_ROW, dtype=np.uint64)
        beginnings = [np.zeros(0, np.uint64)]
        for task, texts in tasks.items():
            for text in texts:
                words = normalised_words(text)
                if len(words) >= OVERLAP_WORDS:
                    self.runs.update(dict.fromkeys(_runs(words, OVERLAP_WORDS), task))
                elif len(words) >= SHORTEST_ROW:
                    self.short.setdefault(len(words), {}).update(dict.fromkeys(_runs(words, len(words)), task))
                for word in words:
                    self.numbers.setdefault(word, len(self.numbers) + 1)
                beginnings.append(self._beginnings(words))
        self.beginnings = np.unique(np.concatenate(beginnings))

    def _beginnings(self, words: list[str]) -> np.ndarray:
        """(words - 7,) uint64: a weak hash of 8 words from each place on, cheap for all places at once."""
        numbers = np.array([self.numbers.get(word, 0) for word in words], dtype=np.uint64)
        if len(numbers) < SHORTEST_ROW:
            return numbers[:0]
        return np.lib.stride_tricks.sliding_window_view(numbers, SHORTEST_ROW) @ self.factors

    def task_of(self, text: str) -> str | None:
        """The task of which a test row stands in a document; None for a document that may be trained on."""
        words = normalised_words(text)
        # every run begins with 8 words of a test row, so that few places are left to look at
        found = self._beginnings(words)
        nearest = np.searchsorted(self.beginnings, found).clip(max=len(self.beginnings) - 1)
        places = np.flatnonzero(self.beginnings[nearest] == found).tolist() if len(self.beginnings) else []
        for length, runs in ((OVERLAP_WORDS, self.runs), *sorted(self.short.items())):
            for place in places:
                run = next(_runs(words[place : place + length], length), None)
                if run in runs:
                    return runs[run]
        return None


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_texts(tasks: Path) -> dict[str, list[str]]:
    """The texts of the test rows of every task in a folder: each field by itself, the choices of a question too. Of
    a task in `TEN_FOLDS` every row is one."""
    texts = {}
    for path in sorted(tasks.glob("*/test.jsonl.gz")):
        fields = texts.setdefault(path.parent.name, [])
        for row in read_rows(path.with_name("all_10fold.jsonl.gz") if path.parent.name in TEN_FOLDS else path):
            parts = [row["text_a"], row["text_b"]] if "text_a" in row else [row["text"]]
            fields.extend(parts + list(row.get("choices", [])))
    return texts


@dataclass
class Drawn:
    """Tokenised documents of one domain by split, and what was left out."""

    documents: dict[str, list[np.ndarray]]
    removed: Counter


class CorpusBuilder:
    """
    Builds the blocks of a mixture.

    Args:
        mixture: what to build.
        text: folder with `<source>.jsonl.gz` files, rows with "text".
        overlap: tells documents that hold test rows.
    """

    def __init__(self, mixture: Mixture, text: Path, overlap: HeldOutOverlap):
        self.mixture, self.text, self.overlap = mixture, text, overlap

    def build(self, output: Path) -> None:
        """Writes `<split>.parquet`, the tokenizer and `corpus.json` (the mixture and what was counted)."""
        texts = {domain: self._texts(domain) for domain in self.mixture.domains}
        tokenizer = self._tokenizer({domain: parts["train"] for domain, parts in texts.items()})
        drawn = {domain: self._draw(domain, parts, tokenizer) for domain, parts in texts.items()}
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(output / "tokenizer")
        counts = {}
        for split in SPLITS:
            blocks = self._blocks(split, {domain: part.documents[split] for domain, part in drawn.items()})
            blocks.to_parquet(output / f"{split}.parquet")
            counts[split] = dict(sorted(Counter(blocks["domain"]).items()))
        record = {
            "mixture": asdict(self.mixture),
            "blocks": counts,
            "documents": {
                domain: {split: len(rows) for split, rows in part.documents.items()} for domain, part in drawn.items()
            },
            "documents_removed_for_test_overlap": {domain: dict(part.removed) for domain, part in drawn.items()},
        }
        (output / "corpus.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    def _texts(self, domain: str) -> dict[str, list[str]]:
        """The texts of a domain by split, in seeded order; sources take turns, so that a large one does not stand for
        all. A hash of its text decides the split of a document, whatever else is in the corpus."""
        generator = np.random.default_rng([self.mixture.seed, *domain.encode()])
        turns = {split: [] for split in SPLITS}
        for source in self.mixture.domains[domain]:
            texts = [row["text"] for row in read_rows(self.text / f"{source}.jsonl.gz")]
            length = dict.fromkeys(SPLITS, 0)
            for i in generator.permutation(len(texts)):
                split = _split_of(texts[i])
                # a document's turn comes by the length of what its source has given before
                turns[split].append((length[split], texts[i]))
                length[split] += min(len(texts[i]), CHARACTERS * self.mixture.document_size)
        return {split: [text for _, text in sorted(rows, key=lambda turn: turn[0])] for split, rows in turns.items()}

    def _tokenizer(self, texts: dict[str, list[str]]) -> PreTrainedTokenizerBase:
        """Trained on training text in the shares of the mixture, about as much as the model is. Documents that `_draw`
        leaves out, as a task's test row stands in them, are read here too: they help to decide what is a token, and
        no model is trained on them. In mixtures/main.json they are 34 documents, without which 38 of 4,096 tokens
        would be others: records that are there could not be compared with new ones of the same corpus."""
        mixture = self.mixture

        def rows() -> Iterator[str]:
            for domain, documents in texts.items():
                wanted = CHARACTERS * mixture.tokens * mixture.shares[domain]
                for text in documents:
                    if wanted <= 0:
                        break
                    yield text[: CHARACTERS * mixture.document_size]
                    wanted -= min(len(text), CHARACTERS * mixture.document_size)

        return train_tokenizer(rows(), kind=mixture.family, vocab_size=mixture.vocab_size)

    def _draw(self, domain: str, texts: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> Drawn:
        mixture = self.mixture
        documents, removed = {split: [] for split in SPLITS}, Counter()
        for split in SPLITS:
            missing = self._wanted(split, domain)
            rows = iter(texts[split])
            while missing > 0:
                text = next(rows, None)
                if text is None:
                    raise ValueError(
                        f"shares[{domain!r}]={mixture.shares[domain]} is not allowed: the sources lack {missing} "
                        f"tokens for the {split} split. Lower `tokens`, `held_out` or the share."
                    )
                task = self.overlap.task_of(text)
                if task is not None:
                    removed[task] += 1
                    continue
                documents[split].append(self._encode(text, tokenizer))
                missing -= len(documents[split][-1])
        return Drawn(documents, removed)

    def _wanted(self, split: str, domain: str) -> int:
        """Tokens of a domain in a split."""
        return self.mixture.held_out if split != "train" else round(self.mixture.tokens * self.mixture.shares[domain])

    def _encode(self, text: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        masked = self.mixture.family == "bert"
        ids = tokenizer(text, add_special_tokens=masked, verbose=False)["input_ids"][: self.mixture.document_size - 1]
        end = tokenizer.sep_token_id if masked else tokenizer.eos_token_id
        return np.asarray(ids if ids and ids[-1] == end else [*ids, end], dtype=np.uint16)

    def _blocks(self, split: str, documents: dict[str, list[np.ndarray]]) -> Dataset:
        mixture, size = self.mixture, self.mixture.block_size
        if split == "train" and mixture.packed_together:
            together = [document for rows in documents.values() for document in rows]
            order = np.random.default_rng(mixture.seed).permutation(len(together))
            documents = {"": [together[i] for i in order]}
        ids, domains = [], []
        for domain, rows in documents.items():
            tokens = np.concatenate(rows)
            blocks = tokens[: len(tokens) // size * size].reshape(-1, size)
            blocks = blocks[: (self._wanted(split, domain) if domain else mixture.tokens) // size]
            ids.extend(blocks)
            domains.extend([domain] * len(blocks))
        return Dataset.from_dict({"input_ids": ids, "domain": domains}, features=FEATURES)


@dataclass
class Corpus:
    """A corpus that was built: columns `input_ids` (T,) and `domain`; a block of several domains has the domain ""."""

    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    validation: Dataset
    test: Dataset

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Corpus":
        """Reads what `CorpusBuilder.build` wrote.

        Raises:
            ValueError: there is no corpus.
        """
        folder = Path(folder)
        if not (folder / "corpus.json").is_file():
            raise ValueError(f"folder={str(folder)!r} is not allowed: it holds no corpus.json; corpus.py builds it.")
        mixture = Mixture(**json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["mixture"])
        files = {split: str(folder / f"{split}.parquet") for split in SPLITS}
        splits = load_dataset("parquet", data_files=files)
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        return cls(mixture, tokenizer, splits["train"], splits["validation"], splits["test"])


def main() -> None:
    """Builds a corpus from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixture", type=Path, default=Path(__file__).parent / "mixtures" / "main.json")
    parser.add_argument("--text", type=Path, required=True, help="folder of <source>.jsonl.gz files")
    parser.add_argument("--tasks", type=Path, help="folder of <task>/test.jsonl.gz, removed from the text")
    parser.add_argument("--family", choices=("gpt2", "bert"), help="in place of the mixture's")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    mixture = Mixture(**json.loads(arguments.mixture.read_text(encoding="utf-8")))
    if arguments.family:
        mixture = replace(mixture, family=arguments.family)
    overlap = HeldOutOverlap(test_texts(arguments.tasks) if arguments.tasks else {})
    CorpusBuilder(mixture, arguments.text, overlap).build(arguments.output)
    print((arguments.output / "corpus.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
