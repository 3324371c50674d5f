# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Downstream tasks: what a linear probe reads from a frozen model, or what full fine-tuning makes of it.

    python examples/longtail_benchmark/tasks.py --model RUN/model --tokenizer CORPUS/tokenizer --tasks DIR \\
        --output RUN/tasks.json [--finetune] [--only overruling gad]

`DIR` (or the environment variable CSE_TASKS) holds `<task>/{train,validation,test}.jsonl.gz`, rows with `text` and
`label`; pairs have `text_a` and `text_b`, questions `choices`, whose `label` is the index of the right one. A task
that stands in the output already is not computed again.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from corpus import TEN_FOLDS, read_rows
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modeling_cse.evaluation import Accuracy, MacroF1, MatthewsCorrelation
from modeling_cse.evaluation.embedding import embed, load_base_model
from modeling_cse.evaluation.encoding import TextEncoder
from modeling_cse.evaluation.finetuning import Examples, FineTuning, fine_tune
from modeling_cse.evaluation.probe import GRID, Split, linear_probe


SPLITS = ("train", "validation", "test")
METRICS = {"accuracy": Accuracy, "macro_f1": MacroF1, "matthews_correlation": MatthewsCorrelation}


@dataclass(frozen=True)
class Task:
    """
    One task.

    Fields:
        domain: that of its texts; "general" for those that are not of the long tail.
        metric: the one that the penalty or learning rate is chosen by. Accuracy is always measured.
        questions: whether rows have choices.
        ten_folds: whether it is cross-validated on `all_10fold.jsonl.gz`, for a test split of a few rows
            (`corpus.TEN_FOLDS`, which keeps all of them out of the training text).
    """

    domain: str
    metric: str = "accuracy"
    questions: bool = False
    ten_folds: bool = False


# gad has ten folds as well, but a test split that is large enough. Accuracy is the micro F1 that chemprot is known by.
TASKS = {
    "overruling": Task("legal"),
    "casehold": Task("legal", questions=True),
    "casehold_style_nm": Task("legal", questions=True),
    "gad": Task("medical"),
    "euadr": Task("medical", ten_folds="euadr" in TEN_FOLDS),
    "chemprot": Task("medical"),
    "pubmedqa_roles": Task("medical", "macro_f1"),
    "citation_intent": Task("academic", "macro_f1"),
    "scicite": Task("academic", "macro_f1"),
    "cola": Task("general", "matthews_correlation"),
    "sst2": Task("general"),
    "mrpc": Task("general"),
    "qnli": Task("general"),
    "qqp": Task("general"),
    "rte": Task("general"),
}


@dataclass(frozen=True)
class Settings:
    """
    How tasks are measured; numbers are comparable only where all of this is the same.

    Fields:
        rows: most rows of train, validation and test; of more a sample is drawn, the same for every model.
        question_rows: the same of questions, each of which is as many texts as it has choices.
        seed: of these samples and of fine-tuning, not of the model.
        max_length: tokens of a text, if the model has so many positions.
        choice_length: tokens around the gap of a question, the choice included.
        batch_size: texts embedded at a time.
        bf16: whether models run under bf16 autocast.
        grid: inverse penalties of the probe.
        learning_rates, epochs: of fine-tuning.
    """

    rows: tuple[int, int, int] = (1000, 500, 1000)
    question_rows: tuple[int, int, int] = (400, 100, 400)
    seed: int = 0
    max_length: int = 256
    choice_length: int = 64
    batch_size: int = 32
    bf16: bool = False
    grid: tuple[float, ...] = GRID
    learning_rates: tuple[float, ...] = FineTuning().learning_rates
    epochs: int = FineTuning().epochs
    without_copies: bool = True


@dataclass(frozen=True)
class Rows:
    """
    The rows of a task.

    Fields:
        rows: all of them, as they are in the files.
        labels: (N,) int64, classes or the indices of right choices.
        num_classes: None for questions.
        folds: indices of train, validation and test rows; more than one such triple for cross-validation.
    """

    rows: list[dict]
    labels: np.ndarray
    num_classes: int | None
    folds: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(repr=False)

    @classmethod
    def load(
        cls, folder: Path, task: Task, limits: Sequence[int], seed: int, without_copies: bool = True
    ) -> "Rows":
        """
        Reads a task, and of each split at most so many rows. With `ten_folds` all rows are read, and every fold is the
        test once, the next one validation, and the other eight train.

        Args:
            without_copies: leave out of each split the rows that those after it have too. Ten folds have no such rows.

        Raises:
            ValueError: a file is not there.
        """
        names = ["all_10fold"] if task.ten_folds else SPLITS
        missing = [name for name in names if not (folder / f"{name}.jsonl.gz").is_file()]
        if missing:
            raise ValueError(f"folder={str(folder)!r} is not allowed: it must hold {missing[0]}.jsonl.gz.")
        parts = [read_rows(folder / f"{name}.jsonl.gz") for name in names]
        if task.ten_folds:
            rows = parts[0]
            place = np.unique([row["fold"] for row in rows], return_inverse=True)[1]
            turns = [(place - fold) % (place.max() + 1) for fold in range(place.max() + 1)]
            folds = [
                (np.flatnonzero(turn > 1), np.flatnonzero(turn == 1), np.flatnonzero(turn == 0)) for turn in turns
            ]
        else:
            generator = np.random.default_rng(seed)
            kept = [np.sort(generator.permutation(len(p))[:n]) for p, n in zip(parts, limits, strict=True)]
            kept = _without_copies(parts, kept) if without_copies else kept
            rows = [part[i] for part, indices in zip(parts, kept, strict=True) for i in indices]
            ends = np.cumsum([0, *map(len, kept)])
            folds = [tuple(np.arange(*ends[i : i + 2]) for i in range(3))]
        if task.questions:
            return cls(rows, np.asarray([row["label"] for row in rows]), None, folds)
        classes, labels = np.unique([str(row["label"]) for row in rows], return_inverse=True)
        return cls(rows, labels, len(classes), folds)

    def encode(self, encoder: TextEncoder, choice_length: int) -> list:
        """Token ids of each row, one list a choice for questions."""
        if self.num_classes is None:
            return [[encoder.around_gap(r["text"], each, choice_length) for each in r["choices"]] for r in self.rows]
        return [
            encoder.pair(row["text_a"], row["text_b"]) if "text_a" in row else encoder.text(row["text"])
            for row in self.rows
        ]

    def majority(self) -> float:
        """Accuracy on test of the most frequent label of train."""
        told = [self.labels[test] == np.bincount(self.labels[train]).argmax() for train, _, test in self.folds]
        return float(np.concatenate(told).mean())


def _without_copies(parts: Sequence[list[dict]], kept: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of the rows that are kept of train, validation and test those that no split after theirs has."""
    later: set[tuple] = set()
    left = []
    for part, indices in zip(reversed(parts), reversed(kept), strict=True):
        texts = [tuple(str(part[i].get(name)) for name in ("text", "text_a", "text_b", "choices")) for i in indices]
        left.append(indices[np.array([text not in later for text in texts], dtype=bool)])
        later.update(texts)
    return left[::-1]


# Of the row indices of a fold: the chosen setting, and predictions of validation and test.
Method = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[float, np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Benchmark:
    """
    The tasks of a folder.

    Fields:
        folder: holds `<task>/{train,validation,test}.jsonl.gz`.
        settings: how tasks are measured.
    """

    folder: Path
    settings: Settings = Settings()

    def probe(self, task: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict:
        """A linear probe on the frozen model; `c` in the record is the penalty that was chosen."""
        clock = time.perf_counter()
        settings, score = self.settings, self._score(task)
        rows, ids = self._read(task, base, tokenizer)
        flat = ids if rows.num_classes else [each for choices in ids for each in choices]
        features = embed(base, flat, batch_size=settings.batch_size, bf16=settings.bf16)
        features = features if rows.num_classes else features.reshape(len(ids), -1, features.shape[-1])

        def method(*fold: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            probed = linear_probe(*(Split(features[i], rows.labels[i]) for i in fold), score, settings.grid)
            return probed.c, probed.validation, probed.test

        return self._record(task, rows, "c", method, clock)

    def fine_tune(self, task: str, load: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerBase) -> dict:
        """Fine-tuning of all parameters; `learning_rate` in the record is the one that was chosen."""
        clock = time.perf_counter()
        score = self._score(task)
        rows, ids = self._read(task, load(), tokenizer)
        names = ("learning_rates", "epochs", "seed", "bf16")
        settings = FineTuning(**{name: getattr(self.settings, name) for name in names})

        def method(*fold: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
            splits = [Examples([ids[i] for i in indices], rows.labels[indices]) for indices in fold]
            tuned = fine_tune(load, rows.num_classes, *splits, score, settings)
            return tuned.learning_rate, tuned.validation, tuned.test

        return self._record(task, rows, "learning_rate", method, clock)

    def _read(self, task: str, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[Rows, list]:
        settings, about = self.settings, TASKS[task]
        limits = settings.question_rows if about.questions else settings.rows
        rows = Rows.load(self.folder / task, about, limits, settings.seed, settings.without_copies)
        encoder = TextEncoder(tokenizer, min(settings.max_length, base.config.max_position_embeddings))
        return rows, rows.encode(encoder, min(settings.choice_length, encoder.max_length))

    def _score(self, task: str) -> Callable[[np.ndarray, np.ndarray], float]:
        name = TASKS[task].metric
        return lambda told, labels: METRICS[name]().compute(predictions=told, references=labels)[name]

    def _record(self, task: str, rows: Rows, choice: str, method: Method, clock: float) -> dict:
        """Runs a method on every fold, and measures the predictions of all folds together."""
        chosen, *told = zip(*(method(*fold) for fold in rows.folds), strict=True)
        record = {"domain": TASKS[task].domain, "metric": TASKS[task].metric}
        for place, split in enumerate(SPLITS[1:]):
            labels = np.concatenate([rows.labels[fold[place + 1]] for fold in rows.folds])
            given = {"predictions": np.concatenate(told[place]), "references": labels}
            record[split] = Accuracy().compute(**given) | METRICS[TASKS[task].metric]().compute(**given)
        return record | {
            "majority_accuracy": rows.majority(),
            choice: chosen[0] if len(chosen) == 1 else list(chosen),
            "train_rows": len(rows.folds[0][0]),
            "seconds": round(time.perf_counter() - clock, 1),
        }


class Record:
    """
    The numbers of one model in a file, written whole after every task. What another process has added meanwhile, of
    the other method or of other tasks, stays.

    Args:
        path: of the JSON.
        method: "probe" or "finetune", which stand side by side.
        settings: what must be the same for all that is in the file.

    Raises:
        ValueError: the file holds numbers of this method with other settings, or of another model.
    """

    def __init__(self, path: Path, method: str, settings: dict):
        self.path, self.method = path, method
        self.settings = json.loads(json.dumps(settings))
        self.tasks = self._read()[method]["tasks"]

    def add(self, task: str, numbers: dict) -> None:
        """Writes the file with one more task."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = self._read()
        self.tasks = found[self.method]["tasks"]
        self.tasks[task] = numbers
        partial = self.path.with_suffix(f".{self.method}.partial")
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def _read(self) -> dict:
        """What the file holds, this method in any case."""
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        own = found.setdefault(self.method, {"settings": self.settings, "tasks": {}})
        if own["settings"] != self.settings:
            raise ValueError(
                f"output={str(self.path)!r} is not allowed: it holds numbers with the settings {own['settings']}, "
                f"these are {self.settings}."
            )
        return found


def digest(model: Path) -> str:
    """Tells the weights of a saved model from others."""
    weights = hashlib.blake2b(digest_size=8)
    for path in sorted(model.glob("*.safetensors")):
        weights.update(path.read_bytes())
    return weights.hexdigest()


def run(
    model: Path, tokenizer: Path, benchmark: Benchmark, output: Path, *, tasks: Sequence[str], finetune: bool = False
) -> dict:
    """
    Measures a saved model on tasks, but for those that stand in `output` already.

    Returns:
        The numbers of every task in `output`, of this method.

    Raises:
        ValueError: an unknown task or one that is not there, a model without routes of its own, or an `output` with
            other settings.
    """
    unknown = sorted({*tasks} - {*TASKS})
    if unknown:
        raise ValueError(f"only={unknown} is not allowed: tasks must be of {list(TASKS)}.")
    method = "finetune" if finetune else "probe"
    record = Record(output, method, {"model": digest(model), **asdict(benchmark.settings)})
    words = AutoTokenizer.from_pretrained(tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base_model(model).to(device)
    for task in tasks:
        if task in record.tasks:
            continue
        if finetune:
            numbers = benchmark.fine_tune(task, lambda: load_base_model(model), words)
        else:
            numbers = benchmark.probe(task, base, words)
        record.add(task, numbers)
        metric = numbers["metric"]
        print(f"{task}: {metric} {numbers['test'][metric]:.4f} ({numbers['seconds']} s)", flush=True)
    return record.tasks


def report(tasks: dict) -> dict[str, float]:
    """Mean test accuracy of the tasks of each domain, and of all that are not general."""
    by_domain: dict[str, list[float]] = {}
    for numbers in tasks.values():
        for group in {numbers["domain"], "general" if numbers["domain"] == "general" else "long tail"}:
            by_domain.setdefault(group, []).append(numbers["test"]["accuracy"])
    return {group: float(np.mean(values)) for group, values in sorted(by_domain.items())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures one model from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, default=os.environ.get("CSE_TASKS"), help="default: $CSE_TASKS")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--finetune", action="store_true", help="tune all parameters instead of probing")
    parser.add_argument("--only", nargs="+", default=list(TASKS), metavar="TASK")
    parser.add_argument("--train_rows", type=int, default=Settings().rows[0], help="most rows to train on")
    parser.add_argument("--with_copies", action="store_true", help="as tasks were measured until 2026-11-29")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    if given.tasks is None:
        parser.error("--tasks is not given, and CSE_TASKS is not set.")
    torch.set_num_threads(given.threads)
    few = given.train_rows * Settings().question_rows[0] // Settings().rows[0]
    limits = {"rows": (given.train_rows, *Settings().rows[1:]), "question_rows": (few, *Settings().question_rows[1:])}
    settings = Settings(**limits, bf16=given.bf16, without_copies=not given.with_copies)
    benchmark = Benchmark(Path(given.tasks), settings)
    tasks = run(given.model, given.tokenizer, benchmark, given.output, tasks=given.only, finetune=given.finetune)
    print(report(tasks))


if __name__ == "__main__":
    main()
